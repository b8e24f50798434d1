"""Several captures share the work, a killed one loses at most what it had in hand, and the writer's errors are told."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time

import pytest

from hyperdflash.leases import Leases
from hyperdflash.states.capture import ShardWriter, capture, lease_of
from hyperdflash.states.store import StateStore, make_shards
from tests.states.random_states import RandomStates, documents, forwards, key

fork = multiprocessing.get_context("fork")


def run_capture(directory, log, seconds=0.02):
    store = StateStore(directory, key())
    capture(make_shards(documents(24), 2), store, lambda: RandomStates(log, seconds))


def content(directory) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_three_processes_capture_each_shard_once(tmp_path):
    (tmp_path / "many").mkdir()
    processes = [fork.Process(target=run_capture, args=(tmp_path / "many", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    made = forwards(tmp_path / "log")
    assert len(made) == len({lengths for _, lengths in made}) == 12
    assert len({pid for pid, _ in made}) >= 2
    run_capture(tmp_path / "one", None, 0)
    assert content(tmp_path / "many") == content(tmp_path / "one")  # no claim, no partial file is left


def test_another_process_takes_over_the_shards_of_a_killed_capture(tmp_path):
    process = fork.Process(target=run_capture, args=(tmp_path / "cache", tmp_path / "log", 0.05))
    process.start()
    while len(forwards(tmp_path / "log")) < 5:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = len(forwards(tmp_path / "log"))
    partial = tmp_path / "cache" / "ab" / f"ab{'0' * 18}.residual.safetensors.1.partial"
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"half")
    assert list((tmp_path / "cache" / "leases").iterdir())
    run_capture(tmp_path / "cache", tmp_path / "log")
    repeated = len(forwards(tmp_path / "log")) - 12
    assert 1 <= repeated <= 2 and before >= 5  # the one in the forward, and one that was being written
    assert not partial.exists()
    run_capture(tmp_path / "one", None, 0)
    assert content(tmp_path / "cache") == content(tmp_path / "one")


def test_a_lease_belongs_to_one_process_until_its_release(tmp_path):
    with Leases(tmp_path) as leases, Leases(tmp_path) as other:
        assert leases.acquire("leases/a") and not other.acquire("leases/a") and not leases.acquire("leases/a")
        other.release("leases/a")  # not its own
        assert not other.acquire("leases/a")
        leases.release("leases/a")
        assert other.acquire("leases/a", bytes=7) and leases.living("leases")["a"]["bytes"] == 7
    assert not list((tmp_path / "leases").iterdir())


def test_leases_of_dead_owners_are_abandoned(tmp_path):
    def die():
        leases = Leases(tmp_path)
        assert leases.acquire("leases/gone", bytes=7) and leases.acquire("leases/too")
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=die)
    process.start()
    process.join()
    (tmp_path / "leases" / "empty.json").touch()  # its owner died before its first word
    assert len(list((tmp_path / "leases").iterdir())) == 3
    with Leases(tmp_path) as leases, Leases(tmp_path) as other:
        assert leases.acquire("leases/gone", bytes=1) and leases.acquire("leases/empty")
        assert not other.acquire("leases/gone")
        assert {name: record.get("bytes") for name, record in other.living("leases").items()} == {"gone": 1, "empty": None}
        assert not (tmp_path / "leases" / "too.json").exists()


def test_a_file_that_is_no_lease_stays(tmp_path):
    for name, text in {
        "notes.json": '{"mine": 1}',
        "gone (copy).json": '{"name": "gone.json", "pid": 1}',
        "x.json": "no",
    }.items():
        (tmp_path / name).write_text(text)
    assert not Leases(tmp_path).living(".") and len(list(tmp_path.iterdir())) == 3


def test_a_fork_does_not_hold_a_lease_beyond_its_parent_s_end(tmp_path):
    def die():
        leases = Leases(tmp_path)
        assert leases.acquire("leases/a")
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        (tmp_path / "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=die)
    process.start()
    process.join()
    child = int((tmp_path / "child").read_text())
    try:
        os.kill(child, 0)  # it lives
        with Leases(tmp_path) as leases:
            assert leases.acquire("leases/a")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_fork_leaves_the_leases_of_its_parent_alone(tmp_path):
    with Leases(tmp_path) as leases:
        assert leases.acquire("leases/a")
        process = fork.Process(target=leases.close)
        process.start()
        process.join()
        assert leases.living("leases").keys() == {"a"} and leases.owner("leases/a").startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("hyperdflash.leases.fcntl.flock", no_locks)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/leases lies on a file system without file locks"):
        Leases(tmp_path).acquire("leases/a")


def test_a_failing_forward_keeps_stored_shards_and_leaves_no_lease(tmp_path):
    class Fails(RandomStates):
        def states(self, sequences, layer_ids=()):
            if len(forwards(self.log)) == 5:
                raise RuntimeError("out of memory")
            return super().states(sequences, layer_ids)

    store = StateStore(tmp_path / "cache", key())
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(make_shards(documents(24), 2), store, lambda: Fails(tmp_path / "log"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 5
    assert not list((tmp_path / "cache" / "leases").iterdir())
    run_capture(tmp_path / "cache", tmp_path / "log")
    assert len(forwards(tmp_path / "log")) == 12


def test_a_writer_s_error_ends_the_capture_with_its_cause(tmp_path, monkeypatch):
    store = StateStore(tmp_path / "cache", key())
    write = StateStore.write

    def full(self, shard, states, layer_id=None):
        if len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3:
            raise OSError(28, "No space left on device")
        return write(self, shard, states, layer_id)

    monkeypatch.setattr(StateStore, "write", full)
    with pytest.raises(OSError, match="No space left"):
        capture(make_shards(documents(24), 2), store, lambda: RandomStates(tmp_path / "log"))
    assert len(forwards(tmp_path / "log")) <= 6 and not list((tmp_path / "cache" / "leases").iterdir())
    monkeypatch.setattr(StateStore, "write", write)
    run_capture(tmp_path / "cache", tmp_path / "log")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 12


def test_the_queue_is_bounded_and_the_forward_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    store = StateStore(tmp_path, key())
    shards = make_shards(documents(6), 2)
    may_write, handed = threading.Event(), []
    write = StateStore.write
    monkeypatch.setattr(StateStore, "write", lambda *arguments: may_write.wait(20) and write(*arguments))

    def hand_over():
        with ShardWriter(store) as writer:
            for shard in shards:
                writer.put(shard, RandomStates().states([d.input_ids for d in shard.documents]))
                handed.append(shard)

    thread = threading.Thread(target=hand_over)
    thread.start()
    thread.join(0.3)
    assert len(handed) == 1  # the first put came back while nothing could be written, the second waits
    may_write.set()
    thread.join(20)
    assert len(handed) == 3 and not any(store.missing(shard, ()) for shard in shards)


def test_capture_waits_for_a_shard_that_another_process_has(tmp_path):
    store = StateStore(tmp_path / "cache", key())
    shards = make_shards(documents(24), 2)
    leases = Leases(store.directory)
    assert leases.acquire(lease_of(shards[0]))

    def finish():
        while len(forwards(tmp_path / "log")) < 11:
            time.sleep(0.005)
        store.write(shards[0], RandomStates().states([d.input_ids for d in shards[0].documents])[None])
        leases.close()

    thread = threading.Thread(target=finish)
    thread.start()
    run_capture(tmp_path / "cache", tmp_path / "log")
    thread.join(20)
    assert len(forwards(tmp_path / "log")) == 11
