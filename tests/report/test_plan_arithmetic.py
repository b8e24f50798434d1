"""The planner: its counts equal the reference, and it names what does not fit with an override that fixes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.planning.plan import GIB, Plan, assumptions, bytes_text, hours_text
from hyperdflash.planning.plan_job import plan_markdown, plan_record
from hyperdflash.planning.step_memory import StepSizes, step_memory

DRAFTER = DrafterConfig(
    num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32, block_size=7, hidden_size=16
)
SIZES = StepSizes(
    documents=2, tokens=100, anchors=10, vocab_size=1000, target_width=16, num_paths=4, tapped=4, trainable=5000, num_taught=2
)
MACHINE = dict(gpus=8, gpu_gib=75, gpu_tflops=1000, disk_tb=20, read_gb_s=6)
RATES = dict(
    drafter_utilization=0.5,
    least_step_s=0.1,
    target_utilization=0.25,
    capture_tokens_per_s=None,
    json_tokens_per_s=None,
    answer_tokens_per_s=1000,
)


def machine(**changes):
    return assumptions("machine", MACHINE | changes)


def rates(**changes):
    return assumptions("rates", RATES | changes)


def plan(**changes) -> Plan:
    text = dict(stages={"stage 1": 300_000, "stage 2": 150_000}, mean_tokens=1024, answer_tokens=500, epochs=5)
    flash = dict(
        weights_bytes=160e9, loaded_bytes=570e9, disk_bytes=160e9, active=13e9, num_paths=4, width=4096, vocab_size=129280
    )
    flash |= dict(taps=0, engine="sglang", processes=1, client_bytes=0.0)
    training = dict(ranks=8, documents=4, step_flops=1e14, memory=step_memory(DRAFTER, SIZES), smaller=(("a=1", GIB),))
    training |= dict(codec="bf16", cache="disk", stream_gb=None, checkpoint_bytes=0.0)
    base = Plan(machine=machine(), rates=rates(), **text, **flash, **training)
    return replace(base, **changes)


def test_bytes_per_token_equal_the_reference():
    ids = 9
    assert plan().state_bytes("bf16") == 32 * 1024 + ids
    assert plan().state_bytes("fp8") == 16 * 1024 + 16 + ids
    assert plan(taps=5).state_bytes("bf16") == 6 * 32 * 1024 + ids


@pytest.mark.parametrize(("mean_tokens", "terabytes"), [(512, 7.5), (1024, 15.1), (2048, 30.2)])
def test_cache_sizes_of_the_paper_equal_the_reference(mean_tokens, terabytes):
    assert plan(mean_tokens=mean_tokens).cache_bytes("bf16") / 1e12 == pytest.approx(terabytes, abs=0.06)


def test_steps_rates_and_hours_by_hand():
    p = plan()
    first = p.stages["stage 1"]
    assert p.steps(first) == 300_000 // 32 * 5  # 9,375 steps per epoch
    assert replace(p, max_steps=100).steps(first) == 100
    assert p.step_s == pytest.approx(1e14 / (1000e12 * 0.5))  # 0.2 s
    assert replace(p, step_flops=1e12).step_s == 0.1
    assert p.step_read_bytes == 8 * 4 * 1024 * (32 * 1024 + 9)
    assert p.read_gb_s == pytest.approx(32 * 1024 * 32777 / 0.2 / 1e9)
    assert p.training_hours(first) == pytest.approx(46_875 * 0.2 / 3600)
    slow = replace(p, machine=machine(read_gb_s=1))
    assert slow.training_hours(first) == pytest.approx(46_875 * 32 * 1024 * 32777 / 1e9 / 3600)  # the disk sets the pace
    both = 46_875 * (32 * 1024 * 32777 / 1e9 + 0.2) / 3600
    assert slow.training_hours(first, overlap=False) == pytest.approx(both)
    assert p.answer_hours(p.examples) == pytest.approx(450_000 * 500 / (1000 * 2) / 3600)  # two copies on eight GPUs


def test_a_copy_takes_a_power_of_two_of_gpus():
    assert plan().serving_gpus == 4  # 160 GB and a tenth on GPUs of 75 GiB
    assert plan(machine=machine(gpu_gib=140)).serving_gpus == 2
    assert plan(weights_bytes=60e9).serving_gpus == 1 and plan(weights_bytes=60e9).copies == 8


def test_what_does_not_fit_is_named_with_an_override_that_fixes_it():
    assert plan().problems() == []
    (disk,) = plan(machine=machine(disk_tb=8)).problems()
    assert "15.1 TB" in disk and "cache=stream cache.budget_gb=6400" in disk and "cache.dtype=fp8" in disk
    tiny_disk = plan(machine=machine(disk_tb=1)).problems()
    assert len(tiny_disk) == 1 and "fp8" not in tiny_disk[0]  # fp8 would not fit either
    streamed = plan(machine=machine(disk_tb=1))
    streamed = replace(streamed, stream_gb=800)
    assert streamed.problems() == []
    waits = plan(machine=machine(read_gb_s=2)).problems()
    assert len(waits) == 1 and "training would read" in waits[0] and "gets 2" in waits[0]
    big = plan()
    big = replace(big, memory=big.memory | {"layers": 200 * GIB})
    assert big.problems() == ["a rank needs 201 GiB and a GPU has 75: a=1 needs 1"]
    (small,) = plan(machine=machine(gpus=2)).problems()
    assert "4 GPUs" in small and "target.engine=sglang" in small


def test_transport_from_servers_limits_the_capture_rate():
    free = plan()
    bound = replace(free, rates=rates(json_tokens_per_s=250), processes=4)
    assert free.capture_rate(2) == 2 * free.capture_rate(1) > 1000
    assert bound.capture_hours(bound.examples) == pytest.approx(bound.tokens / 1000 / 3600)
    (problem,) = bound.problems()
    assert "1,000 tokens/s" in problem and "capture_processes" in problem


def test_the_target_in_this_process_takes_all_gpus_and_uses_one_at_a_time():
    here = plan(engine=None)
    assert here.serving_gpus == 8 and here.copies == 1
    assert here.capture_per_copy == pytest.approx(plan().capture_per_copy / 4)
    assert here.answer_hours(9) == plan().answer_hours(9)  # servers write them


def test_every_command_is_a_count_times_a_rate():
    p = plan(rates=rates(json_tokens_per_s=250), processes=4)
    found = {command.name: command for command in p.commands()}
    assert found["regenerate, stage 1"].hours == pytest.approx(300_000 * 500 / 2000 / 3600)
    assert found["regenerate, stage 1"].disk == 300_000 * 1024 * len("129279, 1, ")
    assert found["capture (sglang), stage 2"].hours == pytest.approx(150_000 * 1024 / 1000 / 3600)
    assert found["server on 4 GPUs"].gpu == 40e9
    assert next(c for c in plan(engine=None).commands() if c.name == "capture (in process), stage 1").gpu == 570e9 / 8
    assert sum(c.hours for name, c in found.items() if name.startswith("train, ")) == pytest.approx(
        sum(map(p.training_hours, p.stages.values()))
    )


def test_an_unused_disk_causes_no_problem():
    full = plan(machine=machine(disk_tb=1, read_gb_s=0.1))
    assert len(full.problems()) == 2
    assert replace(full, cache="off").problems() == []


def test_each_part_of_memory_grows_with_its_sizes():
    base = step_memory(DRAFTER, SIZES)
    assert base["optimizer"] == 5000 * 8 and base["gradients"] == 5000 * 4 and base["weights"] == 5000 * 6
    assert base["heads"] == 2 * 1000 * 16 * 2
    assert base["states"] == 2 * 200 * (4 * 16 * 2 + 9)
    twice = step_memory(DRAFTER, replace(SIZES, anchors=20))
    deeper = step_memory(replace(DRAFTER, num_layers=4), SIZES)
    assert deeper["layers"] == 2 * base["layers"] and deeper["context"] == base["context"]
    assert base["layers"] < twice["layers"] < 2 * base["layers"]  # the context's part does not depend on anchors
    saving = step_memory(replace(DRAFTER, num_layers=8, gradient_checkpointing=True), SIZES)
    assert saving["layers"] < step_memory(replace(DRAFTER, num_layers=8), SIZES)["layers"]
    plain = step_memory(DRAFTER, replace(SIZES, compute_bytes=4))
    assert plain["weights"] == 5000 * 4


def test_bytes_and_hours_as_text():
    assert bytes_text(32777) == "32.8 KB" and bytes_text(15.1e12) == "15.1 TB"
    assert (
        hours_text(0.001) == "under 1 min"
        and hours_text(0.5) == "30 min"
        and hours_text(5.06) == "5.1 h"
        and hours_text(72) == "3.0 days"
    )
    text = plan_markdown(plan(machine=machine(disk_tb=8)))
    assert "Does not fit" in text and "train, stage 2" in text
    assert plan_record(plan())["cache_bytes"]["bf16"] == plan().cache_bytes("bf16")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"gpus": 0}, "machine.gpus must be a positive integer"), ({"disk_tb": -1}, "machine.disk_tb must be a number above 0")],
)
def test_bad_machines_are_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        machine(**change)
