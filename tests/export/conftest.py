"""A finished run of every method that an export treats differently, with random weights in place of the trained ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from hyperdflash.targets.load import Target, load_target

METHODS = {
    "hyperdflash": [],
    "dflash": ["method=dflash", "conditioning.layer_ids=[0,2]"],
    "dspark": ["method=dspark", "conditioning.layer_ids=[0,2]", "head.rank=8"],
    "best": ["method=best"],
    "dflash2": ["method=dflash2", "conditioning.layer_ids=[0,2]", "head.rank=8", "head.top_k=6"],
    "fc": ["reducer=fc"],
    "frozen": ["lead=mtp", "lead.trainable=false", "head=markov", "head.rank=4", "head.kind=rnn"],
    "gate_markov": ["head=markov", "head.rank=4", "head.kind=gated"],
    "causal": ["reducer=fc", "blocks.layout=causal"],
}


@pytest.fixture(scope="session")
def target(mini_target) -> Target:
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.fixture(scope="session")
def run_of(mini_target, rows_file, tmp_path_factory):
    """run_of(method) trains two steps, once, changes every weight at random and returns the run's directory."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from hyperdflash.identity import CONF, train_run_dir
    from hyperdflash.training.job import train
    from hyperdflash.training.run_index import finished_run

    runs, made = tmp_path_factory.mktemp("runs"), {}
    small = [
        f"target.path={mini_target}",
        "corpus=paper",
        f"corpus.stage1=[{{source: {rows_file}, domain: code, count: 8}}]",
        "corpus.responses=original",
        "corpus.decontaminate=false",
        "corpus.heldout=0.5",
        "corpus.validation=4",
        "corpus.max_new_tokens=4",
        "corpus.max_length=64",
        "blocks.num_anchors=2",
        "drafter.num_heads=4",
        "drafter.num_kv_heads=2",
        "drafter.head_dim=16",
        "drafter.intermediate_size=48",
        "drafter.block_size=5",
        "optim.batch_size=4",
        "trainer.max_epochs=1",
        "trainer.threads=1",
        "logger=csv",
    ]

    def run(method: str) -> Path:
        if method in made:
            return made[method]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "HYPERDFLASH_RUNS", str(runs))
            patch.setattr(GlobalHydra.instance(), "hydra", None)
            with initialize_config_dir(CONF, version_base="1.3"):
                config = compose("train", overrides=[*small, *METHODS[method]])
            train(config)
            made[method] = train_run_dir(config).resolve()
        path = finished_run(made[method]).best_checkpoint
        checkpoint, draw = torch.load(path, weights_only=True), torch.Generator().manual_seed(3)
        for tensor in checkpoint["state_dict"].values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=draw))
        torch.save(checkpoint, path)
        return made[method]

    return run


@pytest.fixture
def exported(run_of, tmp_path):
    """exported(method, to) -> the new folder tmp_path/method-to; words are further options."""
    from hyperdflash.export.job import export
    from hyperdflash.identity import CONF

    def make(method: str, to: str, *words: str) -> Path:
        out = tmp_path / f"{method}-{to}"
        given = OmegaConf.from_dotlist([f"run={run_of(method)}", f"to={to}", f"out={out}", *words])
        return export(OmegaConf.merge(OmegaConf.load(Path(CONF) / "export.yaml"), given))

    return make
