"""States within a byte budget: never over it, nothing removed that is needed sooner, readers that say what they wait for."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from hyperdflash.leases import Leases
from hyperdflash.states import stream
from hyperdflash.states.readers import CachedStates, LiveStates
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.states.stream import StreamedStates, make_room, shard_size, stored_shards, supply
from tests.states.random_states import RandomStates, documents, forwards, key

fork = multiprocessing.get_context("fork")
LAYERS = (1,)


@pytest.fixture
def shards():
    return make_shards(documents(24), 2)


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path / "cache", key())


def budget_of(store, shards, count: int) -> int:
    return sum(sorted(shard_size(store, shard, LAYERS) for shard in shards)[-count:])


def write(store, shard, used: float | None = None) -> None:
    for tap, states in RandomStates().states([d.input_ids for d in shard.documents], LAYERS).items():
        store.write(shard, states, tap)
        if used is not None:
            os.utime(store.path(shard, tap), (used, used))


def used_bytes(store) -> int:
    return sum(found.size for found in stored_shards(store).values())


def streamed(store, shards, count, **changes) -> StreamedStates:
    settings = {"producer": RandomStates, "budget_bytes": budget_of(store, shards, count), "wait_s": 20, **changes}
    return StreamedStates(store, shards, LAYERS, **settings)


def expected(shards, directory) -> CachedStates:
    whole = StateStore(directory, key())
    for shard in shards:
        write(whole, shard)
    return CachedStates(whole, shards, LAYERS)


def same(one, other) -> bool:
    return one.ids == other.ids and torch.equal(one.residual, other.residual) and torch.equal(one.layers, other.layers)


def read_epoch(data, reference, order, window, watch=lambda: None) -> bool:
    """Every document once, window after window, as training reads."""
    same_states = True
    places = [data.place(index) for index in range(len(data))]
    first = {shard.name: index for index, (shard, row) in enumerate(places) if row == 0}
    for start in range(0, len(order), window):
        data.prefetch(order[start:], window)
        for row in range(2):
            for position in order[start : start + window]:
                index = first[data.shards[position].name] + row
                same_states &= same(data[index], reference[index])
                watch()
    return same_states


def test_an_epoch_in_process_captures_each_shard_once_within_the_budget(store, shards, tmp_path):
    log = tmp_path / "log"
    data = streamed(store, shards, 4, producer=lambda: RandomStates(log))
    largest = []
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    reference = expected(shards, tmp_path / "whole")
    assert read_epoch(data, reference, order, 3, lambda: largest.append(used_bytes(store)))
    assert len(forwards(log)) == 12 and max(largest) <= data.budget_bytes
    assert len(stored_shards(store)) < 12
    assert read_epoch(data, reference, order[::-1], 3)  # what is still there is not made again
    assert 12 < len(forwards(log)) < 24


def test_order_of_removal(store, shards):
    now = time.time()
    for age, shard in enumerate(shards[:4]):
        write(store, shard, now - 100 + age)
    budget = used_bytes(store) + 100
    names = [shard.name for shard in shards]
    with Leases(store.directory) as leases, Leases(store.directory) as reader:

        def room_for(shard, demand) -> set[str] | None:
            reader.post("demand/reader", shards=demand)
            assert leases.acquire(f"leases/{shard.name}", bytes=200)
            before = set(stored_shards(store))
            fits = make_room(store, leases, shard, budget)
            leases.release(f"leases/{shard.name}")
            return before - set(stored_shards(store)) if fits else None

        wanted = shards[4]
        assert room_for(wanted, [*names[:4], wanted.name]) is None  # all are needed sooner
        assert room_for(wanted, [names[0], wanted.name]) == {names[1]}  # the least recently used that nobody needs
        write(store, shards[1], now)
        assert room_for(wanted, [names[3], wanted.name, names[0], names[1], names[2]]) == {names[2]}  # needed last


def test_capture_processes_supply_the_training(store, shards, tmp_path, capsys):
    """Two of them, one killed on the way; the training makes nothing itself."""
    settings = {"budget_bytes": budget_of(store, shards, 5), "wait_s": 20, "linger_s": 0.5}

    def capture_beside():
        supply(shards, StateStore(tmp_path / "cache", key()), lambda: RandomStates(tmp_path / "log", 0.02), LAYERS, **settings)

    processes = [fork.Process(target=capture_beside) for _ in range(2)]
    for process in processes:
        process.start()
    data = streamed(store, shards, 5, producer=None)
    reference = expected(shards, tmp_path / "whole")
    largest = []

    def watch():
        largest.append(used_bytes(store))

    assert read_epoch(data, reference, list(range(12)), 3, watch)
    processes[0].kill()
    assert read_epoch(data, reference, list(range(11, -1, -1)), 3, watch)
    assert max(largest) <= settings["budget_bytes"]
    made = forwards(tmp_path / "log")
    assert len({pid for pid, _ in made}) == 2 and os.getpid() not in {pid for pid, _ in made}
    data.leases.close()
    processes[1].join(20)
    assert processes[1].exitcode == 0  # no reader remains
    assert len(made) <= 24 + 4


def test_a_finished_pass_demands_no_shard(store, shards):
    """Its shards make room for those of another reader of the process, which it would have kept out."""
    training, validation = (streamed(store, shards, 3, name=name) for name in ("train", "validation"))
    validation[0]
    training.prefetch([6, 7], 1)
    with Leases(store.directory) as leases:
        assert shards[0].name == stream.demanded(leases)[1]
        validation.release()
        assert stream.demanded(leases) == [shards[6].name, shards[7].name]
        validation[2]  # it is there, so nothing is asked for
        validation[20]
        assert shards[10].name in stream.demanded(leases)


def test_room_is_made_from_one_listing(store, shards, monkeypatch):
    for shard in shards[:3]:
        write(store, shard)
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: listed.append((path, pattern)) or glob(path, pattern))
    with Leases(store.directory) as leases:
        assert leases.acquire(f"leases/{shards[4].name}", bytes=200)
        assert make_room(store, leases, shards[4], used_bytes(store))
        listed.clear()
        assert make_room(store, leases, shards[4], used_bytes(store) + 200)
    assert len([pattern for path, pattern in listed if path == store.directory]) == 2  # with the one of used_bytes
    assert len([path for path, _ in listed if path.name == "leases"]) == 1


def test_a_shard_that_does_not_appear_is_an_error(store, shards, monkeypatch, capsys):
    monkeypatch.setattr(stream, "TELL_S", 0.1)
    data = streamed(store, shards, 5, producer=None, wait_s=0.4)
    with pytest.raises(ValueError, match=rf"shard {shards[0].name} did not appear within cache.wait_s=0.4 s.*src\.capture"):
        data[0]
    assert f"waiting for shard {shards[0].name}" in capsys.readouterr().out


def test_a_capture_process_without_readers_ends(store, shards):
    assert supply(shards, store, RandomStates, LAYERS, budget_bytes=10**9, wait_s=0.3) == 0


def test_a_budget_below_a_window_is_refused(store, shards):
    data = streamed(store, shards, 3)
    with pytest.raises(ValueError, match=r"cache\.budget_gb=.* is too small: training mixes 4 shards"):
        data.prefetch(range(12), 4)


def test_a_damaged_shard_is_not_waited_for(store, shards):
    write(store, shards[0])
    path = store.path(shards[0])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged"):
        streamed(store, shards, 5)[0]


def test_two_processes_may_remove_the_same_shard(store, shards, monkeypatch):
    write(store, shards[0])
    found = list(store.files(shards[0].name))
    monkeypatch.setattr(store, "files", lambda _: found)
    found[0][0].unlink()
    rest = sum(path.stat().st_size for path, *_ in found[1:])
    assert store.remove(shards[0]) == rest and store.remove(shards[0]) == 0


def test_partial_files_of_a_killed_writer_take_no_room(store, shards):
    partial = store.path(shards[0]).with_suffix(".safetensors.1.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5000))
    with Leases(store.directory) as leases:
        assert leases.acquire(f"leases/{shards[1].name}", bytes=4000)
        assert make_room(store, leases, shards[1], budget_bytes=4500) and not partial.exists()


def test_a_loader_s_worker_computes_no_states(store, shards, monkeypatch):
    monkeypatch.setattr("hyperdflash.states.readers.get_worker_info", lambda: object())
    for data in (streamed(store, shards, 5), LiveStates(store, shards, RandomStates, LAYERS)):
        with pytest.raises(ValueError, match="set the number of loader workers to 0"):
            data[0]
