"""The first losses of every method, committed: a change of the mathematics shows in the diff.

WRITE_GOLDEN=1 python -m pytest tests/training/test_golden.py      writes tests/golden/losses.json again
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from hyperdflash.identity import train_run_dir
from hyperdflash.training.job import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
METHODS = ("hyperdflash", "dflash", "mtp_finetuned", "domino", "dflash2", "jetspec", "xpress")
COLUMNS = ("train/loss", "train/ce", "train/grad_norm", "train/accuracy", "val/tau")


@pytest.mark.parametrize("method", METHODS)
def test_the_first_steps_of_a_method_are_those_committed(method, runs_here, prepared_overrides, compose_config, tmp_path):
    """6 steps in fp32 on the random target; the tolerance is what the order of sums on another CPU may move."""
    runs_here(tmp_path / "runs")
    sizes = [word for word in prepared_overrides if method != "mtp_finetuned" or not word.startswith("drafter.")]
    config = compose_config("train", [*sizes, f"method={method}", "trainer.max_epochs=1"])
    train(config)
    rows = list(csv.DictReader((train_run_dir(config) / "metrics.csv").open()))
    found = {name: [float(row[name]) for row in rows if row.get(name)] for name in COLUMNS}
    assert len(found["train/loss"]) == 6
    if os.environ.get("WRITE_GOLDEN"):
        kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(kept | {method: found}, indent=1, sort_keys=True) + "\n")
    golden = json.loads(GOLDEN.read_text())[method]
    assert golden.keys() == found.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name
