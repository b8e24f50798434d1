"""Nothing wrong is ever read: each fault ends in one sentence that names the file, the record and what to do."""

from __future__ import annotations

import builtins
import errno
import io
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperdflash.contracts import TargetStates
from hyperdflash.states.shard_file import DamagedShard, MissingShard
from hyperdflash.states.store import NoSpace, Shard, StateStore, make_shards
from tests.states.conftest import make_documents, make_key, random_states

FLIPS = 1000


def read_all(directory: Path, key, shard: Shard) -> list[TargetStates | str]:
    """What a new reader gets for each record of ``shard``: its states, or a sentence."""
    found: list[TargetStates | str] = []
    try:
        store = StateStore(directory, key)
    except ValueError as error:
        return [str(error)] * len(shard.documents)
    for index in range(len(shard.documents)):
        try:
            rows = store.read(shard, index, (2,))
            found.append(replace(rows, residual=rows.residual.clone(), layers=rows.layers.clone()))  # no views: files change
        except DamagedShard as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_every_flipped_byte_is_found(filled, dtype):
    """1,000 flips over two codecs, anywhere in the files of a store; records beside a damaged one are what was written."""
    store, shards, _ = filled(dtype)
    whole = {shard.name: read_all(store.directory, store.key, shard) for shard in shards}
    files = sorted(path for path in store.directory.rglob("*") if path.is_file())
    places = [(path, offset) for path in files for offset in range(path.stat().st_size)]
    draws = random.Random(0)
    kinds = Counter()
    for path, offset in draws.sample(places, FLIPS // 2):
        shard = next((shard for shard in shards if path.name.startswith(shard.name)), shards[0])
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[offset] ^= draws.randrange(1, 256)
        path.write_bytes(flipped)
        found = read_all(store.directory, store.key, shard)
        sentences = [text for text in found if isinstance(text, str)]
        assert sentences, f"byte {offset} of {path}, flipped from {content[offset]} to {flipped[offset]}, was not found"
        for index, rows in enumerate(found):
            document = shard.documents[index]
            if path.name == "manifest.json":
                assert str(store.directory) in rows
            elif isinstance(rows, str):
                assert rows.startswith(f"record {index} ({document.id}) of {path} is damaged: ")
                assert rows.endswith("; remove the file and run again, it is captured anew")
            else:
                assert torch.equal(rows.input_ids[0], document.input_ids) and torch.equal(rows.loss_mask[0], document.loss_mask)
                wanted = whole[shard.name][index]
                assert torch.equal(rows.residual, wanted.residual) and torch.equal(rows.layers, wanted.layers)
        path.write_bytes(content)
        kinds["record" if len(sentences) == 1 else path.name if path.name == "manifest.json" else "index"] += 1
    assert kinds["manifest.json"] > 0 and kinds["index"] > 10 and kinds["record"] > 300, kinds
    assert sum(kinds.values()) == FLIPS // 2


def test_every_byte_of_the_manifest_counts(tmp_path):
    """White space and punctuation included."""
    StateStore(tmp_path, make_key())
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for offset, byte in enumerate(content):
        others = {byte ^ (1 << offset % 8)} | ({9, 10, 13, 32} - {byte} if byte in b" \n" else set())
        for other in others:
            path.write_bytes(content[:offset] + bytes([other]) + content[offset + 1 :])
            with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
                StateStore(tmp_path, make_key())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target": "dead"}, "was written with target='beef' where this run needs 'dead': give another cache.directory"),
        ({"target_dtype": "bf16"}, "target_dtype='fp32' where this run needs 'bf16'"),
        ({"dtype": "fp8"}, "dtype='bf16' where this run needs 'fp8'"),
        ({"tokenizer": "dead"}, "tokenizer='cafe' where"),
        ({"mode": "think_high"}, "mode='non_think' where"),
        ({"encoding_version": 2}, "encoding_version=1 where"),
        ({"engine": "sglang"}, "was written with engine='none' where this run needs 'sglang'"),
        ({"hidden_size": 32, "num_paths": 2}, "num_paths=4 where this run needs 2, hidden_size=16 where this run needs 32"),
    ],
)
def test_another_manifest_is_refused(tmp_path, changes, sentence):
    StateStore(tmp_path, make_key())
    StateStore(tmp_path, make_key())
    with pytest.raises(ValueError, match=re.escape(sentence)):
        StateStore(tmp_path, replace(make_key(), **changes))


@pytest.mark.parametrize(("version", "words"), [(99, "in a newer format, 99 where"), (1, "in another format, 1 where")])
def test_another_format_is_refused(tmp_path, version, words):
    StateStore(tmp_path, make_key())
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version, "of": "the future"}))
    with pytest.raises(
        ValueError, match=rf"{words} this version of the code reads 3: give another cache\.directory, remove it"
    ):
        StateStore(tmp_path, make_key())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"target": "beef"}', '{"format_version": 3}', "\xff"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: remove .* and capture again"):
        StateStore(tmp_path, make_key())


@pytest.mark.parametrize("kept", [0, 5, 300, -100, -1])
@pytest.mark.parametrize("tap", [None, 2])
def test_a_truncated_file_is_named(filled, kept, tap):
    store, shards, _ = filled()
    path = store.path(shards[1], tap)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedShard, match=rf"record 2 \(d5\) of {re.escape(str(path))} is damaged"):
        store.read(shards[1], 2, (2,))
    assert store.read(shards[0], 2, (2,)).ids == ("d2",)


def test_a_file_that_is_truncated_while_it_is_open_is_named(filled):
    store, shards, states = filled()
    store.read(shards[1], 2, (2,))
    path = store.path(shards[1], 2)
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedShard, match=r"record 2 \(d5\).*has 1,000 now"):
        store.read(shards[1], 2, (2,))
    path.write_bytes(content)  # the same name, whole again
    assert torch.equal(store.read(shards[1], 2, (2,)).layers[0, :, 0], states[1][2][53:].bfloat16())


def test_a_file_of_another_shard_tap_or_cache_is_named(filled, tmp_path):
    store, shards, _ = filled()
    other = StateStore(tmp_path / "other", make_key(target="dead"))
    other.write(shards[0], random_states(shards[0]))
    for source, words in (
        (store.path(shards[1]), "shard="),
        (store.path(shards[0], 2), "tap=layer2"),
        (other.path(shards[0]), "cache="),
    ):
        store.path(shards[0]).write_bytes(source.read_bytes())
        with pytest.raises(DamagedShard, match=rf"record 0 \(d0\).*it says {words}"):
            StateStore(store.directory, store.key).read(shards[0], 0)


@pytest.mark.parametrize("tap", [None, 2])
def test_a_missing_file_is_named(filled, tap):
    store, shards, _ = filled()
    path = store.path(shards[1], tap)
    path.unlink()
    with pytest.raises(MissingShard, match=rf"the cache has no {path.name}: run `python -m src\.capture`"):
        store.read(shards[1], 0, (2,))


class FullDisk(io.FileIO):
    """A file on a disk with ``room`` bytes left."""

    room = 0

    def write(self, data) -> int:
        taken = memoryview(data).cast("B")[: self.room - self.tell()]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(taken)


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_stops_the_capture_cleanly_and_a_later_one_continues(tmp_path, monkeypatch, room):
    store = StateStore(tmp_path, make_key())
    shards = make_shards(make_documents(), 3)
    states = random_states(shards[0])
    store.write(shards[0], states)
    real = builtins.open

    def full(path, mode="r", *args, **kwargs):
        return io.BufferedWriter(FullDisk(path, mode)) if "w" in mode else real(path, mode, *args, **kwargs)

    FullDisk.room = room
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", full)
        with pytest.raises(
            NoSpace, match=rf"no space left for .*{shards[1].name}.* bytes\): free some or .*run the same command"
        ):
            store.write(shards[1], random_states(shards[1]))
    assert store.missing(shards[1], ()) == [None]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        ["manifest.json", store.path(shards[0]).name]
    )
    store.write(shards[1], random_states(shards[1]))
    assert torch.equal(store.read(shards[1], 0).residual[0], random_states(shards[1])[:24].bfloat16())
    assert torch.equal(store.read(shards[0], 0).residual[0], states[:9].bfloat16())


def test_other_errors_of_the_disk_keep_their_name_and_leave_nothing(tmp_path, monkeypatch):
    store = StateStore(tmp_path, make_key())
    shard = make_shards(make_documents(), 3)[0]

    def failing(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.write(shard, random_states(shard))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["manifest.json"]
