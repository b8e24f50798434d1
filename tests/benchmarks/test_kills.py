"""Killed captures leave the files of an undisturbed one."""

from __future__ import annotations

from benchmarks.kills import kill_captures, make_documents
from hyperdflash.states.manifest import CacheKey
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess


def test_killed_captures_leave_the_files_of_an_undisturbed_one(tmp_path, mini_target):
    """A few of the hundred kills of `python -m benchmarks.kills`."""
    target = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    wanted = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    found = kill_captures(5, wanted, lambda: InProcess(target), make_documents(16, 40, 320), tmp_path)
    assert found["kills"] == 5 and found["different_files"] == 0
    assert found["needed"] <= found["forwards"] <= found["allowed"]
