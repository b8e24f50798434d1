"""A training that was prepared once: its answers and states are copied, so that a test trains and does nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import SMALL_TRAINING


@pytest.fixture(scope="session")
def prepared_overrides(mini_target, rows_file) -> list[str]:
    """23 documents in shards of 8, batches of 4: 6 steps an epoch, 3 epochs, a log every step, a checkpoint every 4."""
    return [
        f"target.path={mini_target}",
        f"corpus.stage1=[{{source: {rows_file}, domain: code, count: 23}}]",
        "cache.documents_per_shard=8",
        "trainer.max_epochs=3",
        "trainer.log_every_n_steps=1",
        "trainer.checkpoint_every_steps=4",
        "logger.curves=false",
        *SMALL_TRAINING,
    ]


@pytest.fixture(scope="session")
def prepared_runs(prepared_overrides, tmp_path_factory) -> Path:
    """A folder of runs with the answers and states of these options and no training."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from hyperdflash.identity import CONF
    from hyperdflash.preparing.dataset import capture_states

    runs = tmp_path_factory.mktemp("prepared")
    before = os.environ.get("HYPERDFLASH_RUNS")
    os.environ["HYPERDFLASH_RUNS"] = str(runs)
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(CONF, version_base="1.3"):
            capture_states(compose("train", overrides=prepared_overrides))
    finally:
        os.environ.pop("HYPERDFLASH_RUNS")
        if before is not None:
            os.environ["HYPERDFLASH_RUNS"] = before
    return runs


@pytest.fixture
def runs_here(prepared_runs, monkeypatch):
    """runs_here(path) copies the prepared folder to ``path`` and makes it the place of all runs."""

    def copy(path: Path) -> Path:
        shutil.copytree(prepared_runs, path)
        monkeypatch.setenv("HYPERDFLASH_RUNS", str(path))
        return path

    return copy
