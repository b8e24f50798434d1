"""Computes what a training needs: tokens, cache, memory, steps, rates and hours.

    1. tokens      examples x mean tokens, per stage                      -> cache bytes per codec
    2. a step      documents x mean tokens x bytes per token              -> what every rank must read per second
    3. memory      planning/step_memory.py at the longest document        -> whether a rank fits
    4. hours       answers, capture, then each stage

The caller gives the rates, which are assumptions that the report prints; everything else is counted. ``problems`` has one line
per thing that does not fit, with the override that fixes it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from hyperdflash.settings import number_between, positive_int, positive_number

GIB = 2**30
HEADROOM = 1.1  # for the target's cache and activations, over its weights
IDS_BYTES = 9  # a token's id (int64) and its loss mask


def assumptions(group: str, values: Mapping[str, float | None]) -> SimpleNamespace:
    """Checks ``machine`` or ``rates`` of conf/plan.yaml, which explains each value; ValueError names a wrong one."""
    for name, value in values.items():
        if name.endswith("utilization"):
            number_between(f"{group}.{name}", value, 0.001, 1.0)
        elif name in ("gpus", "capture_processes"):
            positive_int(f"{group}.{name}", value)
        elif value is not None or name not in ("capture_tokens_per_s", "json_tokens_per_s"):
            positive_number(f"{group}.{name}", value)
    return SimpleNamespace(**values)


class Command(NamedTuple):
    """A command's cost: ``hours``, None for a server; bytes that stay on ``disk``, bytes on each ``gpu``, and ``host`` bytes of
    all processes together, 0 where another number decides."""

    name: str
    counted: str
    hours: float | None
    disk: float = 0.0
    gpu: float = 0.0
    host: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Assumptions (``machine``, ``rates``), counts, and what follows from them.

    ``stages`` name -> examples, of ``mean_tokens`` each, of which the target writes ``answer_tokens`` beforehand; each stage
    trains ``epochs``, at most ``max_steps``.

    Target: bytes of its weights in an engine (``weights_bytes``), in this project and on disk; ``active`` parameters per token.
    Per token the cache holds ``num_paths`` streams of ``width``, and as many more per layer tap. ``engine`` makes the states
    for ``processes`` of ``client_bytes`` host memory each; None: this project does, with the layers spread over all GPUs that
    they need, of which one works at a time.

    Training: one rank's step of ``documents`` (gradient accumulation included) with ``step_flops`` and ``memory`` bytes by
    part; ``smaller``: overrides that save memory, cheapest first, with the bytes that a rank then needs; ``cache`` is the mode.
    """

    machine: SimpleNamespace
    rates: SimpleNamespace
    stages: dict[str, int]
    mean_tokens: float
    answer_tokens: float
    epochs: int
    max_steps: int | None = None
    engine: str | None
    processes: int
    client_bytes: float
    weights_bytes: float
    loaded_bytes: float
    disk_bytes: float
    active: float
    num_paths: int
    width: int
    vocab_size: int
    taps: int
    ranks: int
    documents: int
    step_flops: float
    memory: dict[str, float]
    smaller: tuple[tuple[str, float], ...]
    codec: str
    cache: str
    stream_gb: float | None
    checkpoint_bytes: float

    def state_bytes(self, codec: str) -> float:
        """Bytes of one token's states: every path of every tap; fp8 has an fp32 scale per token and path."""
        each = {"fp32": 4 * self.width, "bf16": 2 * self.width, "fp8": self.width + 4}[codec]
        return self.num_paths * (1 + self.taps) * each + IDS_BYTES

    def num_gpus(self, weights_bytes: float) -> float:
        """GPUs that one copy of the target fills, unrounded."""
        return HEADROOM * weights_bytes / (self.machine.gpu_gib * GIB)

    @property
    def served_gpus(self) -> int:
        """GPUs of one copy in an engine: a power of two, for tensor parallelism."""
        return 2 ** max(0, math.ceil(math.log2(self.num_gpus(self.weights_bytes))))

    @property
    def serving_gpus(self) -> int:
        """GPUs of one copy where states are made."""
        return self.served_gpus if self.engine else math.ceil(self.num_gpus(self.loaded_bytes))

    @property
    def examples(self) -> int:
        return sum(self.stages.values())

    @property
    def tokens(self) -> float:
        """Tokens to capture, once."""
        return self.examples * self.mean_tokens

    def cache_bytes(self, codec: str) -> float:
        return self.tokens * self.state_bytes(codec)

    def steps(self, examples: int) -> int:
        steps = -(-examples // (self.ranks * self.documents)) * self.epochs
        return min(steps, self.max_steps or steps)

    @property
    def step_s(self) -> float:
        peak = self.machine.gpu_tflops * 1e12 * self.rates.drafter_utilization
        return max(self.rates.least_step_s, self.step_flops / peak)

    @property
    def step_read_bytes(self) -> float:
        """Bytes of states that all ranks read per step."""
        return self.ranks * self.documents * self.mean_tokens * self.state_bytes(self.codec)

    @property
    def read_gb_s(self) -> float:
        return self.step_read_bytes / self.step_s / 1e9

    @property
    def copies(self) -> int:
        """Copies of the target that the machine holds; 0 where it does not fit."""
        return self.machine.gpus // self.serving_gpus

    @property
    def capture_per_copy(self) -> float:
        """Tokens per second of one copy in prefill: as given, or 2 FLOPs per active parameter and token."""
        if self.rates.capture_tokens_per_s:
            return self.rates.capture_tokens_per_s
        peak = self.machine.gpu_tflops * 1e12 * (self.serving_gpus if self.engine else 1)
        return peak * self.rates.target_utilization / (2 * self.active)

    def capture_rate(self, copies: int) -> float:
        """Tokens per second that ``copies`` of the target bring to the cache through all processes."""
        return min(copies * self.capture_per_copy, self.processes * (self.rates.json_tokens_per_s or math.inf))

    def answer_hours(self, examples: int) -> float:
        """Hours in which servers write the answers of ``examples``, on every copy the machine holds."""
        copies = max(1, self.machine.gpus // self.served_gpus)
        return examples * self.answer_tokens / (self.rates.answer_tokens_per_s * copies) / 3600

    def capture_hours(self, examples: int) -> float:
        """Hours in which the states of ``examples`` are captured once, on every copy the machine holds."""
        return examples * self.mean_tokens / self.capture_rate(max(1, self.copies)) / 3600

    def training_hours(self, examples: int, overlap: bool = True) -> float:
        """Hours of a stage's steps, each at the slower of computing and reading; without ``overlap`` at their sum."""
        reading = self.step_read_bytes / (self.machine.read_gb_s * 1e9)
        return self.steps(examples) * (max(self.step_s, reading) if overlap else self.step_s + reading) / 3600

    def problems(self) -> list[str]:
        """Returns one line per thing that does not fit, with the override that fixes it."""
        found, machine, codec = [], self.machine, self.codec
        need, have = sum(self.memory.values()) / GIB, machine.gpu_gib
        if need > have:
            fits = (f"{override} needs {size / GIB:.0f}" for override, size in self.smaller if size / GIB <= have)
            fix = next(fits, "a smaller drafter, for instance drafter.num_layers=2")
            found.append(f"a rank needs {need:.0f} GiB and a GPU has {have:g}: {fix}")
        if not self.copies:
            found.append(
                f"one copy of the target takes {self.serving_gpus} GPUs and the machine has {machine.gpus}: "
                "capture elsewhere (target.engine=sglang target.servers=[...]) or give machine.gpus"
            )
        possible, carried = max(1, self.copies) * self.capture_per_copy, self.capture_rate(max(1, self.copies))
        if carried < possible:
            more = "cache.captures" if self.cache == "stream" else "machine.capture_processes"
            found.append(
                f"servers' answers reach the cache at {carried:,.0f} tokens/s where the target could give {possible:,.0f}: "
                f"{more}=... for more processes, or capture in process (target.engine=null)"
            )
        if self.cache == "off":
            return found
        on_disk = (self.stream_gb or self.cache_bytes(codec) / 1e9) / 1e3
        if on_disk > machine.disk_tb:
            smaller = " or cache.dtype=fp8" if codec != "fp8" and self.cache_bytes("fp8") / 1e12 <= machine.disk_tb else ""
            found.append(
                f"the {codec} cache takes {on_disk:.1f} TB and the disk has {machine.disk_tb:g}: "
                f"cache=stream cache.budget_gb={int(800 * machine.disk_tb)}{smaller}"
            )
        fix = "cache.dtype=fp8 halves it" if codec != "fp8" else "blocks.num_anchors=1024 trains more on what is read"
        if (rate := self.read_gb_s) > machine.read_gb_s:
            found.append(
                f"training would read {rate:.1f} GB/s of states and gets {machine.read_gb_s:g}: it waits for the disk "
                f"{1 - machine.read_gb_s / rate:.0%} of the time; {fix}"
            )
        return found

    def commands(self) -> Iterator[Command]:
        """Yields the cost of each command of docs/deepseek_v4_flash.md that makes data or trains, in its order."""
        source, served = self.engine or "in process", self.served_gpus
        yield Command(f"server on {served} GPUs", "1 copy", None, self.disk_bytes, self.weights_bytes / served)
        json_bytes = len(str(self.vocab_size - 1)) + 1 + 2 * 2  # per token at most: digits, mask, comma and blank each
        for stage, n in self.stages.items():
            answers, size = n * self.answer_tokens, n * self.mean_tokens * json_bytes
            yield Command(f"regenerate, {stage}", f"{answers:,.0f} answer tokens", self.answer_hours(n), size)
        own = 0.0 if self.engine else self.loaded_bytes / self.machine.gpus  # device_map=even
        asking = self.client_bytes * self.processes
        for stage, n in self.stages.items():
            tokens = n * self.mean_tokens
            size, counted = tokens * self.state_bytes(self.codec), f"{tokens:,.0f} tokens"
            yield Command(f"capture ({source}), {stage}", counted, self.capture_hours(n), size, own, asking)
        memory = sum(self.memory.values())
        for stage, n in self.stages.items():
            note = f" ({hours_text(self.training_hours(n, overlap=False))} without overlap)"
            steps, hours = f"{self.steps(n):,} steps", self.training_hours(n)
            yield Command(f"train, {stage}", steps, hours, self.checkpoint_bytes, memory, note=note)


def hours_text(hours: float) -> str:
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
