"""The four modes give training the same states bit for bit, so the same losses; offline reads no target's weights."""

from __future__ import annotations

import csv
import json
import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from hyperdflash.identity import run_name, train_run_dir
from hyperdflash.preparing import job as preparing
from hyperdflash.preparing.dataset import capture_states
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.modes import Disk, Off, Offline, Stream
from hyperdflash.states.store import collate, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess
from hyperdflash.training import job as runs
from hyperdflash.training.module import DraftingModule
from tests.states.random_states import documents

SHARED = {"dtype": "bf16", "documents_per_shard": 3}
STREAM = {"budget_gb": 0.001, "wait_s": 20, "in_process": True}


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp32"])
def test_states_are_the_same_in_every_mode(target, tmp_path, dtype):
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype=dtype)
    loads = []

    def producer():
        loads.append(1)
        return InProcess(target)

    found = {}
    for mode in (
        Disk(directory=str(tmp_path / "disk"), **SHARED),
        Offline(directory=str(tmp_path / "disk"), **SHARED),
        Off(directory=str(tmp_path / "off"), **SHARED),
        Stream(directory=str(tmp_path / "stream"), **SHARED, **STREAM),
    ):
        loads.clear()
        data = mode.states(make_shards(documents(7), 3), mode.open(key), producer, (0, 2))
        found[mode.name] = [data[index] for index in range(len(data))]
        assert bool(loads) == (mode.name != "offline")
    for rows in found.values():
        for row, reference in zip(rows, found["disk"], strict=True):
            assert row.ids == reference.ids and row.residual.dtype == reference.residual.dtype
            assert torch.equal(row.residual, reference.residual) and torch.equal(row.layers, reference.layers)
            assert not row.residual.is_inference() and not row.layers.is_inference()  # they enter a graph
            assert torch.equal(row.input_ids, reference.input_ids) and torch.equal(row.loss_mask, reference.loss_mask)
    assert not (tmp_path / "off").exists()


def test_live_states_compute_a_shard_once_per_window(target, tmp_path):
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    mode = Off(directory=str(tmp_path), **SHARED)
    made = []

    class Counted(InProcess):
        def states(self, sequences, layer_ids=()):
            made.append(len(sequences))
            return super().states(sequences, layer_ids)

    data = mode.states(make_shards(documents(15), 3), mode.open(key), lambda: Counted(target))
    data.prefetch([0, 1, 2, 3, 4], 2)
    for index in (0, 4, 1, 3, 2, 5, 6, 10, 7):  # documents of two shards mixed, then of the next two
        data[index]
    assert len(made) == 4
    for index in (12, 0):  # the fifth shard pushes the first out of the four that are kept
        data[index]
    assert len(made) == 6


def test_offline_names_missing_states_and_the_command_that_captures_them(target, tmp_path):
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    mode = Offline(directory=str(tmp_path / "none"), **SHARED)
    with pytest.raises(ValueError, match=r"3 of 3 shards .* are not in .*none.*: run `python -m src\.capture seed=3`"):
        mode.states(make_shards(documents(7), 3), mode.open(key), None, command="python -m src.capture seed=3")
    assert not (tmp_path / "none").exists()
    disk = Disk(directory=str(tmp_path / "disk"), **SHARED)
    disk.states(make_shards(documents(7), 3), disk.open(key), lambda: InProcess(target))
    mode = Offline(directory=str(tmp_path / "disk"), **SHARED)
    with pytest.raises(ValueError, match="3 of 3 shards with the taps"):
        mode.states(make_shards(documents(7), 3), mode.open(key), None, (1,))


def losses(config) -> list[tuple[str, ...]]:
    """What was logged, step by step: loss terms, tau; nothing that depends on the clock."""
    (path,) = train_run_dir(config).rglob("metrics.csv")
    with path.open() as file:
        return [
            tuple(value for name, value in sorted(row.items()) if "per_s" not in name and "time" not in name)
            for row in csv.DictReader(file)
        ]


@pytest.fixture
def few(mini_overrides, rows_file) -> list[str]:
    """A training of three steps, in one window of three shards."""
    source = f"corpus.stage1=[{{source: {rows_file}, domain: code, count: 12}}]"
    sizes = ["corpus.validation=2", "corpus.max_new_tokens=8", "cache.documents_per_shard=4", "trainer.max_epochs=1"]
    return ["experiment=stage1", *mini_overrides, source, *sizes, "trainer.log_every_n_steps=1"]


def test_a_training_has_the_same_losses_in_every_mode(compose_config, few, tmp_path, monkeypatch):
    """disk, then offline on its directory with a target that must not be read, then off and stream without a directory."""
    found, names = {}, set()
    instantiate = preparing.instantiate
    for mode in ("disk", "offline", "off", "stream"):
        monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path / mode))
        where = {"offline": [f"cache.directory={tmp_path}/disk/cache"], "stream": ["cache.budget_gb=0.01"]}.get(mode, [])
        config = compose_config("train", [*few, f"cache={mode}", *where])
        if mode != "disk":  # answers are the same too
            (tmp_path / mode).mkdir()
            for made in ("responses", "datasets") if mode == "offline" else ("responses",):
                (tmp_path / mode / made).symlink_to(tmp_path / "disk" / made)
        if mode == "offline":

            def no_target(group, *arguments, **keywords):
                assert "load_target" not in group.get("_target_", ""), "the target was loaded"
                return instantiate(group, *arguments, **keywords)

            monkeypatch.setattr(preparing, "instantiate", no_target)
            with pytest.raises(AssertionError, match="the target was loaded"):
                preparing.instantiate(config.target)
        demand = []
        folder = tmp_path / mode / "stream"
        monkeypatch.setattr(DraftingModule, "on_train_end", lambda _: demand.extend(folder.rglob("demand/*.json")))  # noqa: B023
        record = runs.train(config)
        assert [path.stem.rpartition("-")[2] for path in demand] == (["train"] if mode == "stream" else [])
        monkeypatch.setattr(preparing, "instantiate", instantiate)
        found[mode] = losses(config), record["val_tau"]
        names.add(run_name(config))
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path / "beside"))  # nothing there: the training waits for answers too
    beside = [*few, "cache=stream", "cache.budget_gb=0.001"]
    supplier = multiprocessing.get_context("fork").Process(target=capture_states, args=(compose_config("train", beside),))
    supplier.start()
    config = compose_config("train", [*beside, "cache.in_process=false", "cache.wait_s=60"])
    record = runs.train(config)
    assert supplier.is_alive()
    supplier.kill()
    supplier.join()
    found["beside"] = losses(config), record["val_tau"]
    assert len(found["disk"][0]) >= 3
    assert all(result == found["disk"] for result in found.values())
    assert len(names) == 1
    assert not (tmp_path / "off" / "cache").exists()
    assert len(list((tmp_path / "stream" / "stream").rglob("*.safetensors"))) > 0


def test_offline_without_answers_says_what_to_run(compose_config, mini_overrides):
    config = compose_config("train", ["experiment=stage1", *mini_overrides, "cache=offline"])
    with pytest.raises(ValueError, match=r"cache=offline loads no target.*python -m src\.capture"):
        runs.train(config)
    with pytest.raises(ValueError, match=r"cache=offline writes no states"):
        capture_states(config)


def test_a_damaged_record_ends_the_training_with_its_cause(compose_config, few, monkeypatch):
    """Through the data loader; what was trained on before is not taken again in its place."""
    trained = []
    step = DraftingModule.training_step

    def watched(module, batch, index):
        trained.append(batch.ids)
        return step(module, batch, index)

    monkeypatch.setattr(DraftingModule, "training_step", watched)
    config = compose_config("train", few)
    parts = runs.make_parts(config)
    _, store, data = runs.training_data(config, runs.load_heads(config.target.path), parts.layer_ids)
    order = runs.make_data(config, parts, data, 6, 1, 0).order
    shard, row = data["train"].place(order.batch(1)[0])  # in the second step
    path = store.path(shard)
    content = bytearray(path.read_bytes())
    start = int.from_bytes(content[:8], "little") + 8
    header = json.loads(content[8:start])
    begin, end = header["states"]["data_offsets"]
    before = sum(shard.lengths[:row])
    content[start + begin + before * (end - begin) // shard.num_tokens] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"record {row} .*{path.name} is damaged"):
        runs.train(config)
    places = [data["train"].place(index) for index in order.batch(0)]
    assert trained == [tuple(shard.documents[row].id for shard, row in places)]
    assert not (train_run_dir(config) / "result.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_a_loader_reaches_the_loop(target, tmp_path, workers):
    mode = Disk(directory=str(tmp_path), **SHARED)
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    data = mode.states(make_shards(documents(9), 3), mode.open(key), lambda: InProcess(target))
    mode.open(key).path(data.shards[1]).unlink()
    seen = []
    with pytest.raises(ValueError, match=rf"the cache has no {data.shards[1].name}"):
        for batch in DataLoader(
            data, batch_size=3, num_workers=workers, collate_fn=collate, multiprocessing_context="fork" if workers else None
        ):
            seen.append(batch.ids)
    assert seen == [("d0", "d1", "d2")]
