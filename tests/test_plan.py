"""`python -m src.plan` over the training's own configuration."""

from __future__ import annotations

import re

import pytest
from hydra.utils import instantiate

from hyperdflash.identity import FLASH
from hyperdflash.planning.plan import GIB
from hyperdflash.planning.plan_job import make_plan, num_examples
from hyperdflash.planning.v4_sizes import checkpoint_bytes, read_sizes

PAPER = ["target=deepseek_v4_flash", "corpus=paper", "drafter=paper", "blocks=paper", "optim=adamw"]


def test_plan_and_roofline_read_the_same_sizes(compose_config):
    sizes = read_sizes(FLASH)
    assert sizes == instantiate(compose_config("roofline", []).model, _convert_="all")
    assert checkpoint_bytes(sizes) / 1e9 == pytest.approx(159.6, abs=0.1)


def test_the_paper_s_training_is_planned_without_a_checkpoint(compose_config):
    plan = make_plan(compose_config("plan", [*PAPER, "trainer=ddp8", "target.engine=vllm"]))
    assert plan.stages == {"stage 1": 300_000, "stage 2": 150_000}
    assert plan.ranks == 8 and plan.state_bytes("bf16") == 32 * 1024 + 9
    assert plan.steps(300_000) == 46_875
    assert 20 < sum(plan.memory.values()) / GIB < 75
    assert (plan.serving_gpus, plan.copies) == (4, 2)


@pytest.mark.parametrize(
    ("gib", "advice"),
    [(40, "^trainer.batch"), (32, "^drafter.gradient_checkpointing=true$"), (28, "checkpointing=true trainer")],
)
def test_an_advised_override_suffices(gib, advice, compose_config):
    small = [*PAPER, "trainer=ddp8", f"machine.gpu_gib={gib}"]
    (problem,) = [p for p in make_plan(compose_config("plan", small)).problems() if "a rank needs" in p]
    override = problem.split(": ", 1)[1].split(" needs ")[0].split()
    assert re.search(advice, " ".join(override))
    fixed = make_plan(compose_config("plan", [*small, *override]))
    assert not [p for p in fixed.problems() if "a rank needs" in p]


def test_the_tiny_target_is_planned_from_its_own_configuration(compose_config):
    plan = make_plan(compose_config("plan", []))
    assert plan.width == 128 and plan.serving_gpus == 1
    assert plan.problems() == []


def test_layer_taps_are_counted(compose_config):
    overrides = [*PAPER, "trainer=ddp8", "conditioning=layers", "conditioning.layer_ids=[1,20,40]", "reducer=fc", "kl=off"]
    assert make_plan(compose_config("plan", overrides)).state_bytes("bf16") == 4 * 32 * 1024 + 9


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["mean_tokens=0"], "mean_tokens must be a number above 0"),
        (["answer_tokens=-1"], "answer_tokens must be an integer of at least 0"),
        (["drafter=mtp"], "plans for a block drafter"),
    ],
)
def test_bad_options_are_one_sentence(compose_config, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(compose_config("plan", overrides))


def test_examples_of_a_mixture():
    assert num_examples({"chat": 3, "code": 4}) == 7
    assert num_examples([{"source": "a", "count": 110}, {"source": "b", "count": 40}]) == 150


def test_a_missing_target_is_refused(compose_config):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        make_plan(compose_config("plan", ["target=deep", "target.path=nowhere"]))


def test_ranks_of_all_machines_and_json_from_servers(compose_config):
    served = [*PAPER, "trainer=ddp8", "trainer.num_nodes=2", "target.engine=sglang", "machine.capture_processes=2"]
    plan = make_plan(compose_config("plan", served))
    assert plan.ranks == 16
    assert plan.capture_rate(2) == 2 * 280
    streamed = make_plan(compose_config("plan", [*served, "cache=stream", "cache.captures=5"]))
    assert streamed.capture_rate(2) == 5 * 280


def test_the_target_in_this_process_is_planned_as_it_is_loaded(compose_config):
    plan = make_plan(compose_config("plan", [*PAPER, "trainer=ddp8"]))
    assert plan.loaded_bytes / GIB == pytest.approx(529.6, abs=0.1)
    assert plan.copies == 1
