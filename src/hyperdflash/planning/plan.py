"""What a training will need, by arithmetic: tokens, cache, memory, steps, rates, hours, and how to share the GPUs.

    1. tokens      examples x mean tokens, per stage                      -> cache bytes for each codec
    2. a step      documents x mean tokens x bytes per token              -> what every rank must read per second
    3. memory      planning/step_memory.py at the longest document      -> does a rank fit
    4. hours       capture, then each stage; or both at once (cache=stream), the target re-read every epoch

Rates are assumptions that the caller gives (share of a GPU's peak, or measured tokens per second) and that the report prints;
what is counted needs none. ``problems`` has one line for each thing that does not fit, with the override that would fix it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hyperdflash.planning.plan_inputs import GIB, Machine, Measuring, Rates, Stage, TargetSize, Training


@dataclass(frozen=True)
class Share:
    """``serve`` GPUs run the target, ``train`` the drafter, at once: tokens per second that each side can do, and hours of
    each stage, whose pace the slower side sets."""

    serve: int
    train: int
    captured_per_s: float
    trained_per_s: float
    stage_hours: tuple[float, ...]

    @property
    def hours(self) -> float:
        return sum(self.stage_hours)


@dataclass(frozen=True)
class Plan:
    machine: Machine
    rates: Rates
    target: TargetSize
    stages: tuple[Stage, ...]
    training: Training
    measuring: Measuring = field(default_factory=Measuring)

    @property
    def tokens(self) -> float:
        """Tokens to capture, once."""
        return sum(stage.tokens for stage in self.stages)

    def cache_bytes(self, codec: str) -> float:
        return self.tokens * self.target.state_bytes(codec)

    def steps(self, stage: Stage, ranks: int | None = None) -> int:
        per_step = (ranks or self.training.ranks) * self.training.documents
        return -(-stage.examples // per_step) * stage.epochs

    @property
    def step_s(self) -> float:
        """Seconds of computing in one step."""
        peak = self.machine.gpu_tflops * 1e12 * self.rates.drafter_utilization
        return max(self.rates.least_step_s, self.training.step_flops / peak)

    def step_read_bytes(self, stage: Stage) -> float:
        """Bytes of states that all ranks read per step."""
        per_token = self.target.state_bytes(self.training.codec)
        return self.training.ranks * self.training.documents * stage.mean_tokens * per_token

    def read_gb_s(self, stage: Stage) -> float:
        """Reading rate that keeps the GPUs from waiting for states."""
        return self.step_read_bytes(stage) / self.step_s / 1e9

    @property
    def copies(self) -> int:
        """Copies of the target that the machine holds; 0 where it does not fit."""
        return self.machine.gpus // self.target.serving_gpus(self.machine)

    @property
    def capture_per_copy(self) -> float:
        """Tokens per second of one copy in prefill: as given, or 2 FLOPs per active parameter and token."""
        if self.rates.capture_tokens_per_s:
            return self.rates.capture_tokens_per_s
        peak = self.machine.gpu_tflops * 1e12 * (1 if self.target.in_process else self.target.serving_gpus(self.machine))
        return peak * self.rates.target_utilization / (2 * self.target.active)

    def capture_rate(self, copies: int) -> float:
        """Tokens per second of ``copies`` of the target, as far as the way from them to the cache carries that."""
        return min(copies * self.capture_per_copy, self.rates.processes * (self.rates.transport_tokens_per_s or math.inf))

    @property
    def process_rate(self) -> float:
        """Tokens per second of one process that asks one copy for states."""
        return min(self.capture_per_copy, self.rates.transport_tokens_per_s or math.inf)

    def answer_hours(self, *stages: Stage) -> float:
        """Answers of ``stages`` (none given: all) by servers, on every copy the machine holds."""
        tokens = sum(stage.examples * stage.answer_tokens for stage in stages or self.stages)
        copies = self.machine.gpus // self.target.served_gpus(self.machine)
        return tokens / (self.rates.answer_tokens_per_s * max(1, copies)) / 3600

    def capture_hours(self, *stages: Stage) -> float:
        """States of ``stages`` (none given: all) once, on every copy the machine holds."""
        tokens = sum(stage.tokens for stage in stages or self.stages)
        return tokens / self.capture_rate(max(1, self.copies)) / 3600

    def training_hours(self, stage: Stage, overlap: bool = True) -> float:
        """Steps at the slower of computing and reading, which a thread does beside it (training/datamodule.py); or at both."""
        reading = self.step_read_bytes(stage) / (self.machine.read_gb_s * 1e9)
        return self.steps(stage) * (max(self.step_s, reading) if overlap else self.step_s + reading) / 3600

    def shares(self) -> list[Share]:
        """Every split of the GPUs into whole copies of the target and training ranks, both at work at once (cache=stream).

        States are used as they come, so every epoch captures again.
        """
        each = self.target.serving_gpus(self.machine)
        mean = self.tokens / sum(stage.examples for stage in self.stages)
        found = []
        for serve in range(each, self.machine.gpus, each):
            train = self.machine.gpus - serve
            captured = self.capture_rate(serve // each)
            tokens = train * self.training.documents * mean
            reading = tokens * self.target.state_bytes(self.training.codec) / (self.machine.read_gb_s * 1e9)
            trained = tokens / max(self.step_s, reading)
            hours = tuple(stage.tokens * stage.epochs / min(captured, trained) / 3600 for stage in self.stages)
            found.append(Share(serve, train, captured, trained, hours))
        return found

    def best_share(self) -> Share | None:
        return min(self.shares(), key=lambda share: share.hours, default=None)

    def problems(self) -> list[str]:
        """One line each, with what would fix it."""
        found = []
        machine, codec = self.machine, self.training.codec
        need, have = self.training.memory.total / GIB, machine.gpu_gib
        if need > have:
            fits = [f"{override} needs {size / GIB:.0f}" for override, size in self.training.smaller if size / GIB <= have]
            fix = fits[0] if fits else "a smaller drafter, for instance drafter.num_layers=2"
            found.append(f"a rank needs {need:.0f} GiB and a GPU has {have:g}: {fix}")
        if not self.copies:
            found.append(
                f"one copy of the target takes {self.target.serving_gpus(machine)} GPUs and the machine has {machine.gpus}: "
                "capture elsewhere (target.engine=sglang target.servers=[...]) or give machine.gpus"
            )
        possible, carried = max(1, self.copies) * self.capture_per_copy, self.capture_rate(max(1, self.copies))
        if carried < possible:
            more = "cache.captures" if self.training.cache == "stream" else "machine.capture_processes"
            found.append(
                f"servers' answers reach the cache at {carried:,.0f} tokens/s where the target could give {possible:,.0f}: "
                f"{more}=... for more processes, or capture in process (target.engine=null)"
            )
        if self.training.cache == "off":
            return found
        on_disk = (self.training.stream_gb or self.cache_bytes(codec) / 1e9) / 1e3
        if on_disk > machine.disk_tb:
            smaller = " or cache.dtype=fp8" if codec != "fp8" and self.cache_bytes("fp8") / 1e12 <= machine.disk_tb else ""
            found.append(
                f"the {codec} cache takes {on_disk:.1f} TB and the disk has {machine.disk_tb:g}: "
                f"cache=stream cache.budget_gb={int(800 * machine.disk_tb)}{smaller}"
            )
        for stage in self.stages:
            if self.read_gb_s(stage) > machine.read_gb_s:
                found.append(
                    f"{stage.name} would read {self.read_gb_s(stage):.1f} GB/s of states and gets {machine.read_gb_s:g}: "
                    f"training waits for the disk {1 - machine.read_gb_s / self.read_gb_s(stage):.0%} of the time; "
                    + ("cache.dtype=fp8 halves it" if codec != "fp8" else "blocks.num_anchors=1024 trains more on what is read")
                )
        return found


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
