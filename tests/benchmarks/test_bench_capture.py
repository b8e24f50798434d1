"""Killed captures leave the files of an undisturbed one; the capture benchmark measures slow-downs and first batches."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace

from benchmarks.capture import make_documents, measure, table
from benchmarks.kills import PARTS, kill_captures, main
from benchmarks.kills import table as kills_table
from benchmarks.result import RESULTS
from hyperdflash.states.manifest import CacheKey
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess


def test_killed_captures_leave_the_files_of_an_undisturbed_one(tmp_path, mini_target):
    """A few of the hundred kills of `python -m benchmarks.kills`."""
    target = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    wanted = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    found = kill_captures(5, wanted, lambda: InProcess(target), make_documents(16, 40, 320), tmp_path)
    assert found.kills == 5 and found.different_files == 0
    assert found.needed <= found.forwards <= found.allowed


def test_the_benchmark_measures_slow_downs_and_first_batches(tmp_path, mini_target):
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


def test_the_recorded_kills_leave_no_difference():
    record = json.loads((RESULTS / "kills.json").read_text())
    lines = kills_table(record)
    assert set(record) == set(PARTS) and len(lines) == 2 + len(PARTS)
    assert "| capture, 32 shards | 100 | 42 captures | 0 files, byte for byte | 99 forwards | 200 |" in lines


def test_the_recorded_kills_are_rendered_from_their_record(tmp_path):
    shutil.copy(RESULTS / "kills.json", tmp_path)
    main(["--render", "--out", str(tmp_path)])
    assert (tmp_path / "kills.md").read_text() == (RESULTS / "kills.md").read_text()
    assert json.loads((tmp_path / "kills.json").read_text()) == json.loads((RESULTS / "kills.json").read_text())
