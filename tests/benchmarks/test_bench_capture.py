"""The capture's benches: kills leave what an undisturbed capture does, and slow-downs and first batches are measured."""

from __future__ import annotations

from argparse import Namespace

from benchmarks.capture import make_documents, measure, table
from benchmarks.capture_kills import run_kills
from hyperdflash.states.store import CacheKey
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess


def test_killed_captures_leave_what_an_undisturbed_one_does(tmp_path, mini_target):
    """A few of the hundred kills of `python -m benchmarks.capture_kills`."""
    target = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    wanted = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    found = run_kills(5, wanted, lambda: InProcess(target), make_documents(16, 40, 320), tmp_path)
    assert found.kills == 5 and found.different_files == 0
    assert found.needed <= found.forwards <= found.allowed


def test_the_bench_tells_slow_downs_and_first_batches(tmp_path, mini_target):
    options = Namespace(
        rounds=1,
        threads=1,
        records=32,
        tokens=16,
        paths=4,
        hidden=32,
        target=str(mini_target),
        scratch=tmp_path,
        device_rate=1e5,
    )
    record = measure(options)
    assert {row["producer"].split()[0] for row in record["writing"]} == {str(mini_target), "a"}
    for row in record["writing"]:
        assert row["bytes"] > row["tokens"] * 4 * 32 * 2 and set(row["slower"]) == {"written beside", "written between"}
    lines = table(record)
    assert [line.split(" | ")[0] for line in lines[-4:]] == ["| disk, filled", "| offline", "| off", "| stream, empty"]
    assert not list(tmp_path.iterdir())
