"""Waiting for the first step: a program that logs one, and one that ends before."""

import json
import sys

import pytest

from benchmarks import start_up

WRITES = """
import os, pathlib, time
run = pathlib.Path(os.environ["HYPERDFLASH_RUNS"], "train", "r")
run.mkdir(parents=True)
(run / "metrics.csv").write_text("step,epoch\\n")
time.sleep(0.2)
(run / "metrics.csv").write_text("step,epoch\\n0,0\\n")
time.sleep(600)
"""


def test_the_wait_ends_with_the_first_row_and_the_run_with_it(tmp_path):
    assert start_up.first_step_s([sys.executable, "-c", WRITES], tmp_path / "0") >= 0.2
    with pytest.raises(SystemExit, match="ended before its first step"):
        start_up.first_step_s([sys.executable, "-c", ""], tmp_path / "1")


def test_a_missed_threshold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(start_up, "finish", lambda *_: None)
    monkeypatch.setattr(start_up, "help_s", lambda: 3.5)
    monkeypatch.setattr(start_up, "first_step_s", lambda *_: 7.0)
    start_up.main(["--out", str(tmp_path), "--rounds", "2"])
    text = (tmp_path / "start_up.md").read_text()
    assert "| --help | 3.5 | 3.5 to 3.5 | 3 | **not met** |" in text and "| first step | 7.0 | 7.0 to 7.0 | 15 | met |" in text
    assert json.loads((tmp_path / "start_up.json").read_text())["seconds"] == {"--help": [3.5, 3.5], "first step": [7.0, 7.0]}
