"""What is written is read: every tap of every record, by any reader, whatever else happens to the directory."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors import safe_open

from hyperdflash.contracts import ENCODING_VERSION
from hyperdflash.data.tokenizer import tokenizer_fingerprint
from hyperdflash.preparing.job import StatesJob
from hyperdflash.states.codecs import rounded
from hyperdflash.states.manifest import check_manifest
from hyperdflash.states.shard_file import MissingShard, OpenFiles
from hyperdflash.states.store import StateStore, collate, make_shards
from hyperdflash.targets.load import fingerprint, load_heads
from tests.states.conftest import make_documents, make_key, random_states


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_records_are_the_rows_that_were_written(filled, dtype):
    store, shards, states = filled(dtype, (2, 5))
    for shard, taps in zip(shards, states, strict=True):
        start = 0
        for index, document in enumerate(shard.documents):
            end = start + len(document.input_ids)
            row = store.read(shard, index, (5, 2))
            assert row.ids == (document.id,) and row.domains == ("code",) and row.layer_ids == (5, 2)
            assert torch.equal(row.input_ids[0], document.input_ids) and torch.equal(row.loss_mask[0], document.loss_mask)
            assert row.lengths.tolist() == [end - start]
            assert row.residual.dtype == store.codec.dtype
            assert torch.equal(row.residual[0], rounded(taps[None], store.codec)[start:end])
            assert torch.equal(row.layers[0, :, 0], rounded(taps[5], store.codec)[start:end])
            assert torch.equal(row.layers[0, :, 1], rounded(taps[2], store.codec)[start:end])
            start = end


def test_another_safetensors_reader_finds_the_same(filled):
    store, shards, states = filled("bf16")
    with safe_open(store.path(shards[1]), framework="pt") as file:
        assert torch.equal(file.get_tensor("states"), states[1][None].bfloat16())
        assert file.get_tensor("offsets").tolist() == [0, 24, 53, 87]
        assert file.metadata() == {"cache": store.key.digest, "codec": "bf16", "shard": shards[1].name, "tap": "residual"}


def test_a_record_is_a_view_of_the_page_cache(filled):
    store, shards, _ = filled("bf16", ())
    places = [store.read(shards[0], index).residual.data_ptr() for index in (0, 1, 0)]
    assert places[0] == places[2] and places[1] - places[0] == 9 * 4 * 16 * 2


def test_any_width_and_number_of_paths(tmp_path):
    for number, (paths, width, dtype) in enumerate([(1, 1, "fp8"), (3, 5, "fp8"), (3, 5, "bf16"), (2, 7, "fp32")]):
        key = make_key(dtype, num_paths=paths, hidden_size=width)
        store = StateStore(tmp_path / str(number), key)
        (shard,) = make_shards(make_documents(2), 2)
        states = random_states(shard, key=key)
        store.write(shard, states)
        assert torch.equal(torch.cat([store.read(shard, i).residual[0] for i in range(2)]), rounded(states, store.codec))


def test_missing_by_file_and_by_listing(filled):
    store, shards, _ = filled("bf16", (2,))
    other = make_shards(make_documents()[:2], 2)[0]
    store.path(shards[1], 2).unlink()
    wanted = {shards[0].name: [3], shards[1].name: [2, 3], shards[2].name: [3], other.name: [None, 2, 3]}
    assert {shard.name: store.missing(shard, (2, 3)) for shard in (*shards, other)} == wanted
    assert store.missing_of([*shards, other], (2, 3)) == wanted


def test_removed_shards_are_gone_for_this_and_other_readers(filled):
    store, shards, states = filled("bf16", (2,))
    reader = StateStore(store.directory, store.key)
    kept = reader.read(shards[0], 1, (2,))
    size = sum(path.stat().st_size for path in store.directory.rglob(f"{shards[0].name}.*"))
    store.read(shards[0], 1, (2,))
    assert store.remove(shards[0]) == size
    assert not list(store.directory.rglob(f"{shards[0].name}.*")) and store.missing(shards[0], (2,)) == [None, 2]
    assert store.remove(shards[0]) == 0
    with pytest.raises(MissingShard, match=rf"no {shards[0].name}\.residual.*src\.capture"):
        store.read(shards[0], 1, (2,))
    assert torch.equal(kept.residual[0], states[0][None][9:23].bfloat16())  # what was read before stays readable
    assert store.read(shards[1], 0, (2,)).residual.shape == (1, 24, 4, 16)


def test_files_of_others_are_no_shards(filled):
    store, shards, _ = filled("bf16", ())
    own = store.path(shards[0])
    for other in (
        own.parent.with_name("my") / own.name,
        own.with_name(f"{own.name}.bak"),
        own.with_name("abcd.residual.safetensors"),
    ):
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"mine")
    assert sorted(path for path, *_ in store.files()) == sorted(store.path(shard) for shard in shards)


def test_a_shard_without_one_of_its_taps_is_missing(filled):
    store, shards, _ = filled("bf16", (2,))
    with pytest.raises(MissingShard, match=r"layer3.*src\.capture"):
        store.read(shards[0], 0, (2, 3))


def test_few_files_stay_open(filled):
    store, shards, states = filled("bf16", (2,))
    sizes = sorted(path.stat().st_size for path in store.directory.rglob("*.safetensors"))
    for opened, most in ((OpenFiles(most_files=2), 2), (OpenFiles(most_bytes=sizes[-1]), 3), (OpenFiles(most_bytes=1), 1)):
        store._opened = opened
        for _ in range(2):
            for shard, taps in zip(shards, states, strict=True):
                row = store.read(shard, 0, (2,))
                assert torch.equal(row.residual[0], taps[None][: row.residual.shape[1]].bfloat16())
                assert len(opened) <= most
    assert len(opened) == 1


def test_a_store_goes_to_another_process_without_its_open_files(filled):
    store, shards, states = filled("bf16", ())
    store.read(shards[0], 0)
    sent = ForkingPickler.loads(ForkingPickler.dumps(store))
    assert len(sent._opened) == 0 and len(store._opened) == 1
    assert torch.equal(sent.read(shards[0], 0).residual[0], states[0][None][:9].bfloat16())


def test_other_tokens_are_another_shard():
    documents = make_documents()
    one, two = make_shards(documents, 3), make_shards(documents[:-1], 3)
    assert one[0].name == two[0].name and one[-1].name != two[-1].name
    masked = [replace(documents[0], loss_mask=~documents[0].loss_mask), *documents[1:]]
    assert make_shards(masked, 3)[0].name != one[0].name
    documents[0].input_ids[0] += 1
    assert make_shards(documents, 3)[0].name != one[0].name


def test_collate_pads_on_the_right_with_masked_zeros(filled):
    store, shards, _ = filled("bf16", (2,))
    rows = [store.read(shards[0], 0, (2,)), store.read(shards[1], 0, (2,))]
    batch = collate(rows)
    assert batch.input_ids.shape == (2, 24) and batch.lengths.tolist() == [9, 24]
    assert batch.layers.shape == (2, 24, 1, 4, 16)
    assert not batch.loss_mask[0, 9:].any() and not batch.residual[0, 9:].any() and not batch.layers[0, 9:].any()
    assert torch.equal(batch.residual[0, :9], rows[0].residual[0]) and torch.equal(batch.layers[1], rows[1].layers[0])


def test_the_manifest_is_readable_and_says_what_states_depend_on(tmp_path):
    store = StateStore(tmp_path, make_key("fp8"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (
        manifest.items()
        >= {
            "target": "beef",
            "target_dtype": "fp32",
            "num_paths": 4,
            "hidden_size": 16,
            "dtype": "fp8",
            "tokenizer": "cafe",
            "mode": "non_think",
            "encoding_version": 1,
            "format_version": 3,
            "bytes_per_token": 4 * 16 + 4 * 4,
        }.items()
    )
    assert set(manifest["taps"]) == {"residual", "layer<i>"}
    check_manifest(tmp_path, store.key)


def test_a_configuration_opens_the_cache_of_its_target_codec_tokenizer_and_mode(compose_config, mini_target, tmp_path):
    heads = load_heads(mini_target)
    first = StatesJob(compose_config("train", [f"target.path={mini_target}"])).open_store(heads)
    options = [f"target.path={mini_target}", "cache.dtype=fp8", "mode=think_high"]
    other = StatesJob(compose_config("train", options)).open_store(heads)
    wanted = {"target": fingerprint(heads), "num_paths": 4, "hidden_size": 32, "dtype": "bf16", "mode": "non_think"}
    wanted |= {"tokenizer": tokenizer_fingerprint(mini_target), "encoding_version": ENCODING_VERSION}
    assert asdict(first.key).items() >= wanted.items() and len(first.key.tokenizer) == 16
    assert (other.key.dtype, other.key.mode) == ("fp8", "think_high")
    assert first.directory != other.directory and {first.directory.parent, other.directory.parent} == {tmp_path / "cache"}


def test_an_engine_has_a_cache_of_its_own(compose_config, mini_target, tmp_path, capsys):
    own = make_key(tokenizer="", mode="")
    assert "engine" not in own.content and own.digest == "b257629b1b82bf55"  # another digest makes every cache anew
    heads = load_heads(mini_target)

    def opened(*more: str) -> StateStore:
        return StatesJob(compose_config("train", [f"target.path={mini_target}", *more])).open_store(heads)

    served = opened("target.engine=sglang")
    assert served.key.engine == "sglang" and served.directory.name.endswith("-non_think-sglang")
    assert json.loads((served.directory / "manifest.json").read_text())["engine"] == "sglang"
    for engine in ("null", "vllm"):
        sentence = rf"has states of target\.engine=sglang, which differ in rounding from target\.engine={engine}: to train"
        with pytest.raises(ValueError, match=sentence):
            opened(f"target.engine={engine}", "cache=offline")
    assert not capsys.readouterr().out
    here = opened()
    assert here.directory.name + "-sglang" == served.directory.name and "are left alone" in capsys.readouterr().out
    assert opened("cache=offline").directory == here.directory != opened("target.engine=sglang").directory
    assert not capsys.readouterr().out  # both are there
    served.directory.rename(tmp_path / "cache" / "elsewhere")
    here.directory.rename(served.directory)
    with pytest.raises(ValueError, match="was written with engine='none' where this run needs 'sglang': give another"):
        opened("target.engine=sglang")


def test_only_a_writer_makes_the_directory(tmp_path):
    store = StateStore(tmp_path / "none", make_key(), create=False)
    shard = make_shards(make_documents(2), 2)[0]
    assert store.missing(shard, ()) == [None] and store.missing_of([shard], ()) == {shard.name: [None]}
    assert not (tmp_path / "none").exists()
