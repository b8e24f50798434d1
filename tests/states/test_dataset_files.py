"""A dataset holds the documents that were written, finds a cut write and every wrong byte, and opens in another process."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from hyperdflash.states import dataset as datasets
from hyperdflash.states.dataset import data_digest, is_complete, open_dataset, write_dataset
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import make_shards
from tests.states.conftest import make_documents, make_key

COUNT = {"documents": 7, "tokens": 168, "supervised_tokens": 140, "at_max_length": 2, "without_document": 0}
RECORD = {"mask_token_id": 5, "source_files": {}}
ROWS = {"sources": [], "train": COUNT, "validation": {**COUNT, "at_max_length": 0}}


def shards_of_splits() -> dict:
    odd = [replace(document, id=f"{document.id}/ä", domain="math") for document in make_documents(3)]
    return {"train": make_shards(make_documents(7), 3), "validation": make_shards([*odd, *make_documents(2)], 2)}


@pytest.fixture
def directory(tmp_path):
    write_dataset(tmp_path / "made", shards_of_splits(), make_key(), {**RECORD, "rows": ROWS})
    return tmp_path / "made"


def same(found, wanted) -> bool:
    return (
        (found.id, found.domain) == (wanted.id, wanted.domain)
        and found.input_ids.dtype == wanted.input_ids.dtype
        and torch.equal(found.input_ids, wanted.input_ids)
        and torch.equal(found.loss_mask, wanted.loss_mask)
    )


def test_documents_are_those_that_were_written(directory):
    found, wanted = open_dataset(directory), shards_of_splits()
    assert found.key == make_key() and found.mask_token_id == 5 and found.rows == ROWS
    assert found.digest == data_digest(make_key(), wanted)
    for split, shards in wanted.items():
        assert [shard.name for shard in found.shards[split]] == [shard.name for shard in shards]
        assert [shard.lengths for shard in found.shards[split]] == [shard.lengths for shard in shards]
        again = make_shards([d for shard in found.shards[split] for d in shard.documents], 3 if split == "train" else 2)
        assert [shard.name for shard in again] == [shard.name for shard in shards]  # digests of all tokens and masks
        data, documents = ShardedStates(found.shards[split]), [d for shard in shards for d in shard.documents]
        assert len(data) == len(documents)
        assert all(same(data.document(index), document) for index, document in enumerate(documents))
        with pytest.raises(IndexError):
            data.document(len(documents))
    assert found.summary()[0] == "train: 7 documents, 168 tokens, 140 supervised (2 as long as max_length)"


def test_an_incomplete_dataset_counts_as_missing_and_is_written_again(tmp_path, directory, monkeypatch):
    cut = tmp_path / "cut"

    def killed(*_):
        (cut / "validation.safetensors.1.partial").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "write_checked", killed)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(cut, shards_of_splits(), make_key(), {**RECORD, "rows": ROWS})
    assert (cut / "train.safetensors").exists() and not is_complete(cut)
    write_dataset(cut, shards_of_splits(), make_key(), {**RECORD, "rows": ROWS})
    assert is_complete(cut)
    assert {p.name: p.read_bytes() for p in cut.iterdir()} == {p.name: p.read_bytes() for p in directory.iterdir()}


def test_every_flipped_byte_is_found(directory):
    """600 flips anywhere in the files: opening the dataset or reading its documents names the file."""
    wanted = shards_of_splits()
    files = sorted(directory.iterdir())
    places = [(path, offset) for path in files for offset in range(path.stat().st_size)]
    draws, seen = random.Random(0), set()
    for path, offset in draws.sample(places, 600):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[offset] ^= draws.randrange(1, 256)
        path.write_bytes(flipped)
        wrong = 0
        try:
            found = open_dataset(directory)
        except ValueError as error:
            assert str(directory) in str(error) and "capture again" in str(error)
            seen.add("open")
        else:
            for split, shards in wanted.items():
                for mine, shard in zip(found.shards[split], shards, strict=True):
                    for row, document in enumerate(shard.documents):
                        try:
                            assert same(mine.documents[row], document)
                        except ValueError as error:
                            assert f"({document.id}) of {path} is damaged" in str(error)
                            wrong += 1
            assert wrong == 1, f"byte {offset} of {path}"
            seen.add("read")
        path.write_bytes(content)
    assert seen == {"open", "read"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda record: record.update(format_version=9), "is in a newer format, 9 where .* capture again"),
        (lambda record: record["states"].update(encoding_version=7), "captured with encoding_version=7 .* capture again"),
        (lambda record: record["states"].update(format_version=1), "captured with format_version=1 .* capture again"),
    ],
)
def test_another_version_is_refused(directory, change, sentence):
    record = json.loads((directory / "dataset.json").read_text())
    record.pop("checksum")
    change(record)
    datasets.write_checked(directory / "dataset.json", record)
    with pytest.raises(ValueError, match=sentence):
        open_dataset(directory)


def test_an_index_of_another_dataset_is_refused(tmp_path, directory):
    other = make_key(target="dead")
    write_dataset(tmp_path / "other", shards_of_splits(), other, {**RECORD, "rows": ROWS})
    (directory / "train.safetensors").write_bytes((tmp_path / "other" / "train.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"train\.safetensors is damaged.*it says dataset="):
        open_dataset(directory)


def test_another_process_opens_the_files_anew(directory):
    shards = open_dataset(directory).shards["train"]
    sent = ForkingPickler.loads(ForkingPickler.dumps(shards))
    assert all(same(d, w) for s, t in zip(sent, shards, strict=True) for d, w in zip(s.documents, t.documents, strict=True))
    assert len(ForkingPickler.dumps(shards)) < 10_000  # the place of the files, no token
