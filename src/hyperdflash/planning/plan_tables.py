"""A Plan as Markdown and as plain data."""

from __future__ import annotations

from dataclasses import asdict

from hyperdflash.planning.plan import Plan, bytes_text, hours_text
from hyperdflash.planning.plan_commands import commands, commands_markdown
from hyperdflash.planning.plan_inputs import GIB
from hyperdflash.report.tables import markdown_table

CODECS = ("bf16", "fp8")


def plan_markdown(plan: Plan) -> str:
    """Sections in the order in which things are paid for; what does not fit comes first."""
    return "\n\n".join(
        [
            _problems(plan),
            "### Tokens and cache\n\n" + _tokens(plan),
            "### GPU memory of a training rank\n\n" + _memory(plan),
            "### Steps, reading and hours\n\n" + _stages(plan),
            "### GPUs that serve and GPUs that train, at once (cache=stream)\n\n" + _shares(plan),
            "### Each command of docs/deepseek_v4_flash.md\n\n" + commands_markdown(plan),
            "### In short\n\n" + _short(plan),
            _assumptions(plan),
        ]
    )


def plan_record(plan: Plan) -> dict:
    """Everything that the tables print."""
    return {
        "tokens": plan.tokens,
        "cache_bytes": {codec: plan.cache_bytes(codec) for codec in CODECS},
        "bytes_a_token": {codec: plan.target.state_bytes(codec) for codec in CODECS},
        "memory_bytes": {**asdict(plan.training.memory), "total": plan.training.memory.total},
        "step_s": plan.step_s,
        "stages": [
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
        ],
        "answer_hours": plan.answer_hours(),
        "capture_hours": plan.capture_hours(),
        "shares": [{**asdict(share), "hours": share.hours} for share in plan.shares()],
        "commands": [asdict(command) for command in commands(plan)],
        "problems": plan.problems(),
        "machine": asdict(plan.machine),
        "rates": asdict(plan.rates),
    }


def _problems(plan: Plan) -> str:
    problems = plan.problems()
    if not problems:
        return "Everything fits."
    return "**Does not fit:**\n\n" + "\n".join(f"- {problem}" for problem in problems)


def _tokens(plan: Plan) -> str:
    header = ["Stage", "examples", "mean tokens", "tokens", *(f"cache, {codec}" for codec in CODECS)]
    rows = [
        [
            stage.name,
            f"{stage.examples:,}",
            f"{stage.mean_tokens:,.0f}",
            f"{stage.tokens:,.0f}",
            *(bytes_text(stage.tokens * plan.target.state_bytes(codec)) for codec in CODECS),
        ]
        for stage in plan.stages
    ]
    each = ["", "", "", "bytes a token", *(f"{plan.target.state_bytes(codec):,.0f}" for codec in CODECS)]
    total = ["all", "", "", f"{plan.tokens:,.0f}", *(bytes_text(plan.cache_bytes(codec)) for codec in CODECS)]
    text = "\n".join(markdown_table(header, [*rows, total, each]))
    if plan.training.stream_gb:
        text += f"\n\nWith cache=stream never more than cache.budget_gb = {plan.training.stream_gb:g} GB on disk."
    return text


def _memory(plan: Plan) -> str:
    memory = plan.training.memory
    parts = [[name, f"{size / GIB:.2f}"] for name, size in asdict(memory).items()]
    total = [f"**of {plan.machine.gpu_gib:g}**", f"**{memory.total / GIB:.2f}**"]
    return "\n".join(markdown_table(["Part", "GiB"], [*parts, total]))


def _stages(plan: Plan) -> str:
    header = ["Stage", "epochs", "optimizer steps", "states a step", "reading", "training", "without overlap"]
    rows = [
        [
            stage.name,
            f"{stage.epochs}",
            f"{plan.steps(stage):,}",
            bytes_text(plan.step_read_bytes(stage)),
            f"{plan.read_gb_s(stage):.2f} GB/s",
            hours_text(plan.training_hours(stage)),
            hours_text(plan.training_hours(stage, overlap=False)),
        ]
        for stage in plan.stages
    ]
    where = "in this process" if plan.target.in_process else "through an engine"
    before = (
        f"Before training: answers by a server {hours_text(plan.answer_hours())}, states {where} "
        f"{hours_text(plan.capture_hours())}, on {plan.copies} cop{'y' if plan.copies == 1 else 'ies'} of the target."
    )
    return "\n".join(markdown_table(header, rows)) + "\n\n" + before


def _shares(plan: Plan) -> str:
    shares, best = plan.shares(), plan.best_share()
    if best is None:
        each = plan.target.serving_gpus(plan.machine)
        return f"None: one copy of the target takes {each} of {plan.machine.gpus} GPUs, which leaves none to train on."
    header = ["serve", "train", "captured tokens/s", "trained tokens/s", "all epochs"]
    rows = [
        [f"{s.serve}", f"{s.train}", f"{s.captured_per_s:,.0f}", f"{s.trained_per_s:,.0f}", hours_text(s.hours)] for s in shares
    ]
    return "\n".join(markdown_table(header, rows)) + f"\n\nBest: {best.serve} serve, {best.train} train."


def _short(plan: Plan) -> str:
    """One line, to be set beside those of other plans."""
    header = ["states by", "mean tokens", "tokens", *(f"cache, {codec}" for codec in CODECS)]
    header += ["reading", "states", "training", "without overlap"]
    training = [sum(plan.training_hours(stage, overlap) for stage in plan.stages) for overlap in (True, False)]
    row = [
        plan.target.engine or "this process",
        f"{plan.tokens / sum(stage.examples for stage in plan.stages):,.0f}",
        f"{plan.tokens:,.0f}",
        *(bytes_text(plan.cache_bytes(codec)) for codec in CODECS),
        f"{max(map(plan.read_gb_s, plan.stages)):.1f} GB/s",
        hours_text(plan.capture_hours()),
        *map(hours_text, training),
    ]
    return "\n".join(markdown_table(header, [row]))


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
