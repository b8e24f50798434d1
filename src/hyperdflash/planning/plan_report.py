"""Renders a Plan as Markdown and as plain data, with the cost of each command of docs/deepseek_v4_flash.md.

    server, check_engine       a copy of the target in an engine, and the prompts that it reads
    regenerate, capture        per stage, as in planning/plan.py
    train                      steps at the slower of computing and reading, or at their sum
    parity, evaluate           answer tokens / tokens per round, each a forward of the target in this process, or by an engine

Memory is that of one of the command's GPUs, and of the host where it receives an engine's answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from hyperdflash.planning.plan import GIB, Plan, bytes_text, hours_text
from hyperdflash.report.tables import GAP, Block, Table, markdown

CODECS = ("bf16", "fp8")


@dataclass(frozen=True)
class Command:
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
    target, rates, measuring = plan.target, plan.rates, plan.measuring
    source = target.engine or "in process"
    served, cached = target.served_gpus(plan.machine), plan.training.codec
    yield Command(f"server on {served} GPUs", "1 copy", None, target.disk_bytes, target.weights_bytes / served)
    if not target.in_process:
        tokens = 2 * measuring.check_tokens  # once for the states, once for the engine's next token
        hours = tokens / plan.process_rate / 3600
        yield Command("check_engine reference=heads", f"{tokens:,} tokens", hours, host=target.client_bytes)
    for stage in plan.stages:
        answers, size = stage.examples * stage.answer_tokens, stage.tokens * target.json_bytes
        yield Command(f"regenerate, {stage.name}", f"{answers:,.0f} answer tokens", plan.answer_hours(stage), size)
    spread = target.loaded_bytes / plan.machine.gpus  # device_map=even
    own, asking = spread if target.in_process else 0.0, target.client_bytes * rates.processes
    for stage in plan.stages:
        size, counted = stage.tokens * target.state_bytes(cached), f"{stage.tokens:,.0f} tokens"
        yield Command(f"capture ({source}), {stage.name}", counted, plan.capture_hours(stage), size, own, asking)
    memory, disk = plan.training.memory.total, plan.training.checkpoint_bytes
    for stage in plan.stages:
        slow = f" ({hours_text(plan.training_hours(stage, overlap=False))} without overlap)"
        yield Command(
            f"train, {stage.name}", f"{plan.steps(stage):,} steps", plan.training_hours(stage), disk, memory, note=slow
        )
    if best := plan.best_share():
        disk += 1e9 * (plan.training.stream_gb or 0)
        for stage, hours in zip(plan.stages, best.stage_hours, strict=True):
            name = f"train cache=stream ({source}) on {best.train} GPUs, {stage.name}"
            yield Command(name, f"{plan.steps(stage, best.train):,} steps", hours, disk, memory, asking)
    for name, tokens in (("parity", measuring.parity_tokens), ("evaluate", measuring.tokens)):
        drafted = measuring.methods / rates.tokens_a_round + (name == "evaluate")  # parity decodes with drafters only
        yield Command(name, f"{tokens:,.0f} tokens per method", tokens * drafted * rates.forward_s / 3600, 0.0, spread)
    served_s = measuring.tokens * (1 + 1 / rates.tokens_a_round) / rates.served_tokens_per_s
    yield Command("evaluate engine=sglang", f"{measuring.tokens:,.0f} tokens per method", served_s / 3600)


def plan_record(plan: Plan) -> dict:
    """Returns every number that the tables print."""
    stages = [
        {
            "name": stage.name,
            "examples": stage.examples,
            "tokens": stage.tokens,
            "steps": plan.steps(stage),
            "read_bytes_a_step": plan.step_read_bytes(stage),
            "read_gb_s": plan.read_gb_s(stage),
            "hours": plan.training_hours(stage),
            "hours_without_overlap": plan.training_hours(stage, overlap=False),
        }
        for stage in plan.stages
    ]
    return {
        "tokens": plan.tokens,
        "cache_bytes": {codec: plan.cache_bytes(codec) for codec in CODECS},
        "bytes_a_token": {codec: plan.target.state_bytes(codec) for codec in CODECS},
        "memory_bytes": {**asdict(plan.training.memory), "total": plan.training.memory.total},
        "step_s": plan.step_s,
        "stages": stages,
        "answer_hours": plan.answer_hours(),
        "capture_hours": plan.capture_hours(),
        "shares": [{**asdict(share), "hours": share.hours} for share in plan.shares()],
        "commands": [asdict(command) for command in commands(plan)],
        "problems": plan.problems(),
        "machine": asdict(plan.machine),
        "rates": asdict(plan.rates),
    }


def plan_markdown(plan: Plan) -> str:
    """Returns what does not fit, then a section per step in the order in which money is spent."""
    problems = plan.problems()
    blocks: list[Block] = ["**Does not fit:**", "\n".join(f"- {p}" for p in problems)] if problems else ["Everything fits."]
    blocks += ["### Tokens and cache", _tokens(plan)]
    if plan.training.stream_gb:
        blocks.append(f"With cache=stream never more than cache.budget_gb = {plan.training.stream_gb:g} GB on disk.")
    blocks += ["### GPU memory of a training rank", _memory(plan), "### Steps, reading and hours", _stages(plan), _before(plan)]
    blocks += ["### GPUs that serve and GPUs that train, at once (cache=stream)", *_shares(plan)]
    blocks += ["### Each command of docs/deepseek_v4_flash.md", _commands(plan), "### In short", _short(plan)]
    return markdown([*blocks, _assumptions(plan)]).rstrip("\n")


def _tokens(plan: Plan) -> Table:
    def sizes(tokens: float) -> list[str]:
        return [bytes_text(tokens * plan.target.state_bytes(codec)) for codec in CODECS]

    rows = [
        [stage.name, f"{stage.examples:,}", f"{stage.mean_tokens:,.0f}", f"{stage.tokens:,.0f}", *sizes(stage.tokens)]
        for stage in plan.stages
    ]
    rows.append(["all", "", "", f"{plan.tokens:,.0f}", *sizes(plan.tokens)])
    rows.append(["", "", "", "bytes a token", *(f"{plan.target.state_bytes(codec):,.0f}" for codec in CODECS)])
    return Table(["Stage", "examples", "mean tokens", "tokens", *(f"cache, {codec}" for codec in CODECS)], rows)


def _memory(plan: Plan) -> Table:
    memory = plan.training.memory
    parts = [[name, f"{size / GIB:.2f}"] for name, size in asdict(memory).items()]
    return Table(["Part", "GiB"], [*parts, [f"**of {plan.machine.gpu_gib:g}**", f"**{memory.total / GIB:.2f}**"]])


def _stages(plan: Plan) -> Table:
    rows = [
        [
            stage.name,
            f"{stage.epochs}",
            f"{plan.steps(stage):,}",
            bytes_text(plan.step_read_bytes(stage)),
            f"{plan.read_gb_s(stage):.2f} GB/s",
            *(hours_text(plan.training_hours(stage, overlap)) for overlap in (True, False)),
        ]
        for stage in plan.stages
    ]
    return Table(["Stage", "epochs", "optimizer steps", "states a step", "reading", "training", "without overlap"], rows)


def _before(plan: Plan) -> str:
    where = "in this process" if plan.target.in_process else "through an engine"
    return (
        f"Before training: answers by a server {hours_text(plan.answer_hours())}, states {where} "
        f"{hours_text(plan.capture_hours())}, on {plan.copies} cop{'y' if plan.copies == 1 else 'ies'} of the target."
    )


def _shares(plan: Plan) -> list[Block]:
    best = plan.best_share()
    if best is None:
        each = plan.target.serving_gpus(plan.machine)
        return [f"None: one copy of the target takes {each} of {plan.machine.gpus} GPUs, which leaves none to train on."]
    rows = [
        [f"{s.serve}", f"{s.train}", f"{s.captured_per_s:,.0f}", f"{s.trained_per_s:,.0f}", hours_text(s.hours)]
        for s in plan.shares()
    ]
    header = ["serve", "train", "captured tokens/s", "trained tokens/s", "all epochs"]
    return [Table(header, rows), f"Best: {best.serve} serve, {best.train} train."]


def _commands(plan: Plan) -> Table:
    rows = []
    for command in commands(plan):
        time = GAP if command.hours is None else hours_text(command.hours) + command.note
        memory = [f"{size / GIB:.1f} GiB {of}" for size, of in ((command.gpu, "a GPU"), (command.host, "host")) if size]
        disk = bytes_text(command.disk) if command.disk else GAP
        rows.append([command.name, command.counted, time, disk, ", ".join(memory) or GAP])
    return Table(["Command", "counted", "time", "disk", "memory"], rows)


def _short(plan: Plan) -> Table:
    """Returns one row, to compare with those of other plans."""
    header = ["states by", "mean tokens", "tokens", *(f"cache, {codec}" for codec in CODECS)]
    header += ["reading", "states", "training", "without overlap"]
    row = [
        plan.target.engine or "this process",
        f"{plan.tokens / sum(stage.examples for stage in plan.stages):,.0f}",
        f"{plan.tokens:,.0f}",
        *(bytes_text(plan.cache_bytes(codec)) for codec in CODECS),
        f"{max(map(plan.read_gb_s, plan.stages)):.1f} GB/s",
        hours_text(plan.capture_hours()),
        *(hours_text(sum(plan.training_hours(stage, overlap) for stage in plan.stages)) for overlap in (True, False)),
    ]
    return Table(header, [row])


def _assumptions(plan: Plan) -> str:
    rates, machine = plan.rates, plan.machine
    capture = (
        f"{rates.capture_tokens_per_s:,.0f} tokens/s a copy, as given"
        if rates.capture_tokens_per_s
        else f"{rates.target_utilization:.0%} of the peak for 2 FLOPs an active parameter and token"
        + (", one GPU at work at a time" if plan.target.in_process else "")
    )
    if rates.transport_tokens_per_s:
        capture += f", and no more than {rates.processes} x {rates.transport_tokens_per_s:g} tokens/s of JSON"
    return (
        f"Assumed: {machine.gpus} GPUs of {machine.gpu_gib:g} GiB and {machine.gpu_tflops:g} bf16 TFLOP/s; the drafter's step "
        f"at {rates.drafter_utilization:.0%} of it ({plan.step_s * 1e3:.0f} ms); capture at {capture}; answers at "
        f"{rates.answer_tokens_per_s:,.0f} tokens/s a copy; {machine.read_gb_s:g} GB/s of states, read while the step before "
        f"computes (hours without that stand beside); measuring at {rates.forward_s:g} s a forward of the target in this "
        f"process and {rates.tokens_a_round:g} tokens a drafted round, or {rates.served_tokens_per_s:g} tokens/s of one "
        "sequence in an engine. Counted, not assumed: tokens, bytes, steps, FLOPs, memory (planning/step_memory.py)."
    )
