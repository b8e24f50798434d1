"""What each command of docs/deepseek_v4_flash.md takes, one row a command: a count, and the count times the plan's rates.

    server, check_engine       a copy of the target as an engine holds it; prompts read by it
    regenerate, capture        planning/plan.py, a stage at a time
    train                      steps at the slower of computing and reading, or at both where reading does not overlap
    parity, evaluate           answer tokens / tokens a round, a forward of the target in this process each; or an engine's rate

Memory is that of one of the GPUs it uses, and of the host where an engine's answers are taken in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hyperdflash.planning.plan import Plan, bytes_text, hours_text
from hyperdflash.planning.plan_inputs import GIB
from hyperdflash.report.tables import markdown_table

HEADER = ["Command", "counted", "time", "disk", "memory"]


@dataclass(frozen=True)
class Command:
    """``hours`` None for what runs as long as others need it; ``disk`` bytes it leaves; ``gpu`` bytes on each of its GPUs and
    ``host`` bytes of all its processes together, 0 where a server or the other one decides."""

    name: str
    counted: str
    hours: float | None
    disk: float = 0.0
    gpu: float = 0.0
    host: float = 0.0
    note: str = ""


def commands(plan: Plan) -> Iterator[Command]:
    """In the order of the document."""
    target, machine, rates, measuring = plan.target, plan.machine, plan.rates, plan.measuring
    source = target.engine or "in process"
    served, cached = target.served_gpus(machine), plan.training.codec
    yield Command(f"server on {served} GPUs", "1 copy", None, target.disk_bytes, target.weights_bytes / served)
    if not target.in_process:
        tokens = 2 * measuring.check_tokens  # once for the states, once for the engine's next token
        yield Command(
            "check_engine reference=heads", f"{tokens:,} tokens", tokens / plan.process_rate / 3600, host=target.client_bytes
        )
    for stage in plan.stages:
        answers = stage.examples * stage.answer_tokens
        answer_bytes = stage.tokens * target.json_bytes
        yield Command(f"regenerate, {stage.name}", f"{answers:,.0f} answer tokens", plan.answer_hours(stage), answer_bytes)
    spread = target.loaded_bytes / machine.gpus  # device_map=even
    own = spread if target.in_process else 0.0
    asking = target.client_bytes * plan.rates.processes
    for stage in plan.stages:
        size, counted = stage.tokens * target.state_bytes(cached), f"{stage.tokens:,.0f} tokens"
        yield Command(f"capture ({source}), {stage.name}", counted, plan.capture_hours(stage), size, own, asking)
    memory, checkpoints = plan.training.memory.total, plan.training.checkpoint_bytes
    for stage in plan.stages:
        slow = f" ({hours_text(plan.training_hours(stage, overlap=False))} without overlap)"
        steps = f"{plan.steps(stage):,} steps"
        yield Command(f"train, {stage.name}", steps, plan.training_hours(stage), checkpoints, memory, note=slow)
    if best := plan.best_share():
        for stage, hours in zip(plan.stages, best.stage_hours, strict=True):
            steps = f"{plan.steps(stage, best.train):,} steps"
            disk = checkpoints + 1e9 * (plan.training.stream_gb or 0)
            name = f"train cache=stream ({source}) on {best.train} GPUs, {stage.name}"
            yield Command(name, steps, hours, disk, memory, asking)
    for name, tokens in (("parity", measuring.parity_tokens), ("evaluate", measuring.tokens)):
        drafted = measuring.methods / rates.tokens_a_round + (name == "evaluate")  # parity decodes with drafters only
        yield Command(name, f"{tokens:,.0f} tokens a method", tokens * drafted * rates.forward_s / 3600, 0.0, spread)
    served_s = measuring.tokens * (1 + 1 / rates.tokens_a_round) / rates.served_tokens_per_s
    yield Command("evaluate engine=sglang", f"{measuring.tokens:,.0f} tokens a method", served_s / 3600)


def commands_markdown(plan: Plan) -> str:
    rows = [
        [
            command.name,
            command.counted,
            "-" if command.hours is None else hours_text(command.hours) + command.note,
            bytes_text(command.disk) if command.disk else "-",
            ", ".join(f"{size / GIB:.1f} GiB {of}" for size, of in ((command.gpu, "a GPU"), (command.host, "host")) if size)
            or "-",
        ]
        for command in commands(plan)
    ]
    return "\n".join(markdown_table(HEADER, rows))
