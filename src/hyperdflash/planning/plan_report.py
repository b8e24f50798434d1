"""Renders a Plan as Markdown, with the cost of each command of docs/deepseek_v4_flash.md.

    server, check_engine       a copy of the target in an engine, and the prompts that it reads
    regenerate, capture        per stage, as in planning/plan.py
    train                      steps at the slower of computing and reading, or at their sum
    parity, evaluate           answer tokens / tokens per round, each a forward of the target in this process, or by an engine

Memory is that of one of the command's GPUs, and of the host where it receives an engine's answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

from hyperdflash.planning.plan import GIB, Plan
from hyperdflash.report.tables import GAP, Block, Table, markdown

CODECS = ("bf16", "fp8")


class Command(NamedTuple):
    """``hours``, None for a server; bytes that stay on ``disk``, bytes on each ``gpu``, and ``host`` bytes of all processes
    together, 0 where another number decides."""

    name: str
    counted: str
    hours: float | None
    disk: float = 0.0
    gpu: float = 0.0
    host: float = 0.0
    note: str = ""


def commands(plan: Plan) -> Iterator[Command]:
    """Yields the commands in the order of the document."""
    rates, measuring = plan.rates, plan.measuring
    source, served = plan.engine or "in process", plan.served_gpus
    yield Command(f"server on {served} GPUs", "1 copy", None, plan.disk_bytes, plan.weights_bytes / served)
    if plan.engine:
        tokens = 2 * measuring["check_tokens"]  # once for the states, once for the engine's next token
        hours = tokens / plan.capture_rate(1, processes=1) / 3600
        yield Command("check_engine reference=heads", f"{tokens:,} tokens", hours, host=plan.client_bytes)
    json_bytes = len(str(plan.vocab_size - 1)) + 1 + 2 * 2  # per token at most: digits of the id and mask, comma and blank each
    for stage in plan.stages:
        answers, size = stage.examples * stage.answer_tokens, stage.tokens * json_bytes
        yield Command(f"regenerate, {stage.name}", f"{answers:,.0f} answer tokens", plan.answer_hours(stage), size)
    spread = plan.loaded_bytes / plan.machine.gpus  # device_map=even
    own, asking = 0.0 if plan.engine else spread, plan.client_bytes * plan.processes
    for stage in plan.stages:
        size, counted = stage.tokens * plan.state_bytes(plan.codec), f"{stage.tokens:,.0f} tokens"
        yield Command(f"capture ({source}), {stage.name}", counted, plan.capture_hours(stage), size, own, asking)
    memory, disk = sum(plan.memory.values()), plan.checkpoint_bytes
    for stage in plan.stages:
        slow = f" ({hours_text(plan.training_hours(stage, overlap=False))} without overlap)"
        steps, hours = f"{plan.steps(stage):,} steps", plan.training_hours(stage)
        yield Command(f"train, {stage.name}", steps, hours, disk, memory, note=slow)
    if best := plan.best_share():
        disk += 1e9 * (plan.stream_gb or 0)
        for stage, hours in zip(plan.stages, best.stage_hours, strict=True):
            name = f"train cache=stream ({source}) on {best.train} GPUs, {stage.name}"
            yield Command(name, f"{plan.steps(stage, best.train):,} steps", hours, disk, memory, asking)
    for name, tokens in (("parity", measuring["parity_tokens"]), ("evaluate", measuring["tokens"])):
        drafted = measuring["methods"] / rates.tokens_a_round + (name == "evaluate")  # parity decodes with drafters only
        yield Command(name, f"{tokens:,.0f} tokens per method", tokens * drafted * rates.forward_s / 3600, 0.0, spread)
    served_s = measuring["tokens"] * (1 + 1 / rates.tokens_a_round) / rates.served_tokens_per_s
    yield Command("evaluate engine=sglang", f"{measuring['tokens']:,.0f} tokens per method", served_s / 3600)


def plan_record(plan: Plan) -> dict:
    """Returns the plan's assumptions and counts, and each command's cost."""
    found = vars(plan) | {"machine": vars(plan.machine), "rates": vars(plan.rates), "stages": list(map(asdict, plan.stages))}
    found["cache_bytes"] = {codec: plan.cache_bytes(codec) for codec in CODECS}
    return found | {"commands": [command._asdict() for command in commands(plan)], "problems": plan.problems()}


def plan_markdown(plan: Plan) -> str:
    """Returns what does not fit, one row to compare with other plans, each command's cost, and what is assumed."""
    problems, best = plan.problems(), plan.best_share()
    blocks: list[Block] = ["**Does not fit:**", "\n".join(f"- {p}" for p in problems)] if problems else ["Everything fits."]
    parts = {**plan.memory, f"**of {plan.machine.gpu_gib:g}**": sum(plan.memory.values())}
    memory = Table(["Part", "GiB"], [[name, f"{size / GIB:.2f}"] for name, size in parts.items()])
    share = f"None: one copy of the target takes {plan.serving_gpus} of {plan.machine.gpus} GPUs, none is left to train on."
    if best:
        rates = f"{best.captured_per_s:,.0f} tokens/s captured, {best.trained_per_s:,.0f} trained"
        share = f"Best: {best.serve} serve, {best.train} train; {rates}."
    assumed = {"machine": vars(plan.machine), "rates": vars(plan.rates)}
    given = ", ".join(f"{group}.{name} {value}" for group, own in assumed.items() for name, value in own.items())
    budget = f" With cache=stream never more than {plan.stream_gb:g} GB on disk." if plan.stream_gb else ""
    blocks += [
        "### In short",
        _short(plan),
        f"A step reads {bytes_text(plan.step_read_bytes(plan.stages[0]))} of states for all ranks.{budget}",
        "### Each command of docs/deepseek_v4_flash.md",
        _commands(plan),
        "### GPU memory of a training rank",
        memory,
        "### GPUs that serve and GPUs that train, at once (cache=stream)",
        share,
        f"Assumed: {given}. At its share of the GPUs' peak the drafter's step takes {1e3 * plan.step_s:.0f} ms; a capture "
        "without a given rate takes 2 FLOPs per active parameter and token, in this process on one GPU at a time; states are "
        "read while the step before computes (hours without that stand beside). Counted, not assumed: tokens, bytes, steps, "
        "FLOPs, memory (planning/step_memory.py).",
    ]
    return markdown(blocks).rstrip("\n")


def _commands(plan: Plan) -> Table:
    rows = []
    for command in commands(plan):
        time = GAP if command.hours is None else hours_text(command.hours) + command.note
        memory = [f"{size / GIB:.1f} GiB {of}" for size, of in ((command.gpu, "per GPU"), (command.host, "host")) if size]
        disk = bytes_text(command.disk) if command.disk else GAP
        rows.append([command.name, command.counted, time, disk, ", ".join(memory) or GAP])
    return Table(["Command", "counted", "time", "disk", "memory"], rows)


def _short(plan: Plan) -> Table:
    """Returns one row, to compare with those of other plans."""
    header = ["states by", "mean tokens", "tokens", *(f"cache, {codec}" for codec in CODECS)]
    row = [plan.engine or "this process", f"{plan.tokens / sum(stage.examples for stage in plan.stages):,.0f}"]
    row += [f"{plan.tokens:,.0f}", *(bytes_text(plan.cache_bytes(codec)) for codec in CODECS)]
    row += [f"{max(map(plan.read_gb_s, plan.stages)):.1f} GB/s", hours_text(plan.capture_hours())]
    row += [hours_text(sum(plan.training_hours(stage, overlap) for stage in plan.stages)) for overlap in (True, False)]
    return Table([*header, "reading", "states", "training", "without overlap"], [row])


def hours_text(hours: float) -> str:
    """Minutes, hours or days."""
    if hours < 1 / 60:
        return "under 1 min"
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def bytes_text(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
