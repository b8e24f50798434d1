"""Every option of every group composes, and instantiates beside a partner it fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException
from transformers import DeepseekV4Config

from hyperdflash.identity import CONF
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.training.components import make_parts
from hyperdflash.training.loggers import make_loggers
from tiny_target.build import tiny_config

OTHER_ENTRY_POINTS = {  # group -> its only user
    "benchmarks": "evaluate",
    "engine": "evaluate",
    "recipe": "pretrain",
}
ALL = sorted((path.parent.name, path.stem) for path in Path(CONF).glob("*/*.yaml"))
OPTIONS = [(group, option) for group, option in ALL if group not in OTHER_ENTRY_POINTS]
# An option that needs another beside it.
PARTNERS = {
    ("conditioning", "layers"): ["reducer=fc"],
    ("conditioning", "taps_and_tokens"): ["reducer=fc"],
    ("conditioning", "post_hc_head"): ["reducer=mean"],
    ("conditioning", "residual_and_layers"): ["reducer=hc_gates"],
    ("reducer", "hc_gates"): ["conditioning=residual_and_layers"],
    ("drafter", "paper"): ["drafter.hidden_size=null"],
    ("head", "markov_confidence"): ["objective=confidence"],
    ("objective", "confidence"): ["head=markov_confidence"],
    ("objective", "dspark"): ["head=markov_confidence"],
    ("objective", "domino"): ["head=domino"],
    ("objective", "dflash2"): ["head=selector"],
    ("objective", "xpress"): ["head=xpress"],
}


def test_the_groups_are_all_here():
    groups = {group for group, _ in OPTIONS}
    assert groups == set(
        [
            "target",
            "corpus",
            "conditioning",
            "cache",
            "blocks",
            "reducer",
            "inputs",
            "lead",
            "drafter",
            "head",
            "kl",
            "loss",
            "objective",
            "optim",
            "trainer",
            "logger",
            "experiment",
            "method",
            "sweep",
        ]
    )


@pytest.mark.parametrize(("group", "option"), [o for o in ALL if o not in OPTIONS], ids=lambda value: str(value))
def test_the_options_of_other_entry_points_compose(group, option, compose_config, tmp_path):
    config = compose_config(OTHER_ENTRY_POINTS[group], [f"{group}={option}"])
    if group == "benchmarks":
        instantiate(config.benchmarks, **({"path": str(tmp_path)} if option == "paper" else {}))
    elif group == "engine":
        assert config.engine.name == (None if option == "none" else option)
    else:
        build = tiny_config(vocab_size=config.recipe.vocab_size, **instantiate(config.recipe.model, _convert_="all"))
        assert config.recipe.name == option and build.num_hidden_layers >= 4
        target = "tiny" if option == "engine" else option  # make engine alone reads that recipe's target
        path = compose_config("train", [f"target={target}"]).target.path
        assert (path == config.out) == (option not in ("tiny", "engine"))  # nothing writes over the shipped target untold


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: str(value))
def test_every_option_composes_and_instantiates(group, option, compose_config, mini_target, tmp_path, monkeypatch):
    from hyperdflash.training.components import make_parts

    overrides = [f"{group}={option}", *PARTNERS.get((group, option), [])]
    config = compose_config("train", overrides)
    if group == "trainer":
        from hyperdflash.options import check_training
        from hyperdflash.training.job import make_trainer

        assert config.trainer.devices == {"ddp8": 8, "ddp_cpu": 2}.get(option, 1)
        assert config.optim.batch_size == (4 if option == "ddp8" else 8)
        check_training(config)
        config.trainer.update(accelerator="cpu", devices=1, precision="32-true")  # what is here
        make_trainer(config.trainer, tmp_path, False, [], 10, 10)
        return
    if group == "logger":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert make_loggers(config.logger, tmp_path, "x")
        return
    if "layer_ids" in config.get("conditioning", {}):
        config.conditioning.layer_ids = [0, 2]
    mask_token_id = config.target.mask_token_id
    config.target.path = str(mini_target)
    if mask_token_id is not None:
        config.target.mask_token_id = 7  # the mini vocabulary ends long before
    if group == "target":
        config.target.experts = "dense" if config.target.experts == "grouped_mm" else config.target.experts
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.target.dtype]
        assert instantiate(config.target).model.lm_head.weight.dtype == wanted
    parts = make_parts(config)
    heads = TargetHeads(DeepseekV4Config(hidden_size=32, vocab_size=320, num_hidden_layers=4)).to_empty(device="cpu")
    drafter = parts.build(heads.apply(_fill), config.target, seed=0)
    assert sum(p.numel() for p in drafter.parameters()) > 0 and drafter.num_slots == 6


def _fill(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.normal_()


def test_every_experiment_is_the_command_line_of_the_readme(compose_config):
    config = compose_config("train", ["experiment=stage2", "reducer=hc_gate", "kl.alpha=0.15"])
    assert (config.stage, config.kl.alpha) == (2, 0.15)
    for stage, lr in ((1, 8e-4), (2, 1e-4)):
        paper = compose_config("train", [f"experiment=stage{stage}", "optim=adamw"])
        assert (paper.stage, paper.optim.lr) == (stage, lr)
    assert compose_config("train", ["reducer.num_streams=4"]).reducer.num_streams == 4


def test_vanilla_taps_layers_spread_over_the_target_at_hand(compose_config, mini_target, monkeypatch, tmp_path):
    monkeypatch.delenv("DEEPSEEK_V4_FLASH", raising=False)

    def taps(*words: str) -> list[int] | None:
        return compose_config("train", ["conditioning=layers", *words]).conditioning.layer_ids

    assert taps() == [1, 5]
    assert taps("target=deepseek_v4_flash", "drafter=paper") == [1, 11, 20, 30, 40]  # of the released config.json
    assert taps(f"target.path={mini_target}", "drafter.num_layers=1") == [2]
    assert taps("conditioning.layer_ids=[3]", "drafter=mtp") == [3]
    with pytest.raises(OmegaConfBaseException, match=r"1\.\.5 for a target of 8 layers .* got 6: give conditioning\.layer_ids"):
        taps("drafter.num_layers=6")
    absent = ["conditioning=layers", "reducer=fc", f"target.path={tmp_path}"]
    with pytest.raises(ValueError, match=r"has no config\.json: run `python -m src\.pretrain`"):
        make_parts(compose_config("train", absent))


def test_a_run_is_named_by_what_decides_it(compose_config):
    from hyperdflash.identity import run_name

    plain = run_name(compose_config("train"))
    assert plain == run_name(compose_config("train", ["logger=csv", "trainer.threads=1", "cache.directory=/x"]))
    assert run_name(compose_config("train", ["kl=off"])) == run_name(compose_config("train", ["kl.alpha=0"]))
    names = {plain}
    for other in (
        "kl.alpha=0.1",
        "reducer=fc",
        "seed=1",
        "optim.lr=0.1",
        "blocks.num_anchors=3",
        "corpus.validation=1",
    ):
        names.add(run_name(compose_config("train", [other])))
    assert len(names) == 7


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["kl.alpha=1.5"], r"kl\.alpha must be in \[0, 1\], got 1\.5"),
        (["kl.positions=7"], r"kl\.positions must be in 0\.\.6"),
        (["reducer.num_streams=3"], r"reducer\.num_streams must be 4"),
        (["conditioning=post_hc_head"], r"reducer=fc"),
        (["drafter.num_heads=0"], r"drafter\.num_heads must be a positive integer"),
        (["optim.lr='3e-4'"], r"optim\.lr must be a number above 0"),
        (["corpus.responses=mine"], r"corpus\.responses must be target or original"),
        (["conditioning=layers", "reducer=fc", "conditioning.layer_ids=[0,9]"], r"layers 0\.\.3"),
        (["target.path=/nowhere"], r"no config\.json"),
        (["corpus=embedded", "corpus.stage1={chat: 0, code: 0, math: 0}"], r"asks for no conversation"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_weight_is_read(overrides, sentence, compose_config, mini_overrides, monkeypatch):
    from hydra.errors import InstantiationException

    from hyperdflash.cli import cause_of
    from hyperdflash.training import job as runs

    monkeypatch.setattr(runs, "load_heads", lambda *_: pytest.fail("weights were read before the error"))
    embedded = "corpus=embedded" in overrides
    others = [o for o in mini_overrides if not (embedded and o.startswith("corpus"))]
    with pytest.raises((ValueError, InstantiationException)) as caught:
        runs.train(compose_config("train", [*others, *overrides]))
    message = cause_of(caught.value)
    assert re.search(sentence, message), message
    assert "\n" not in message
