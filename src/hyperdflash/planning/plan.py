"""What a training needs, by arithmetic: tokens, cache, memory, steps, rates, hours, and how to share the GPUs.

    1. tokens      examples x mean tokens, per stage                      -> cache bytes per codec
    2. a step      documents x mean tokens x bytes per token              -> what every rank must read per second
    3. memory      planning/step_memory.py at the longest document        -> whether a rank fits
    4. hours       capture, then each stage; or both at once (cache=stream), the target re-read every epoch

The caller gives the rates, which are assumptions that the report prints; everything else is counted. ``problems`` has one line
per thing that does not fit, with the override that fixes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from hyperdflash.planning.step_memory import StepMemory
from hyperdflash.settings import number_between, positive_int, positive_number

GIB = 2**30
HEADROOM = 1.1  # for the target's cache and activations, over its weights
IDS_BYTES = 9  # a token's id (int64) and its loss mask


@dataclass(frozen=True, kw_only=True)
class Machine:
    """``gpus`` of ``gpu_gib`` usable memory and ``gpu_tflops`` dense bf16 peak; free ``disk_tb``; ``read_gb_s`` that all ranks
    together read of the cache, from a disk or a network."""

    gpus: int
    gpu_gib: float
    gpu_tflops: float
    disk_tb: float
    read_gb_s: float

    def __post_init__(self):
        for f in fields(self):
            (positive_int if f.name == "gpus" else positive_number)(f"machine.{f.name}", getattr(self, f.name))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Assumptions; None where nothing limits, or where the rate follows from others.

    ``drafter_utilization``, ``target_utilization``: shares of ``gpu_tflops`` that a drafter's step and a capture reach.
    ``least_step_s``: launches and all-reduce. ``capture_tokens_per_s``, ``answer_tokens_per_s``: prefill and generation of one
    copy of the target. ``transport_tokens_per_s``: states from servers to one of ``processes``. ``forward_s``: the target in
    this process, one sequence. ``tokens_a_round``: tau. ``served_tokens_per_s``: one sequence in an engine without drafts.
    """

    drafter_utilization: float
    least_step_s: float
    target_utilization: float
    capture_tokens_per_s: float | None
    transport_tokens_per_s: float | None
    answer_tokens_per_s: float
    forward_s: float
    tokens_a_round: float
    served_tokens_per_s: float
    processes: int = 1

    def __post_init__(self):
        for f in fields(self):
            name, value = f"rates.{f.name}", getattr(self, f.name)
            if name.endswith("utilization"):
                number_between(name, value, 0.001, 1.0)
            elif value is not None or f.name not in ("capture_tokens_per_s", "transport_tokens_per_s"):
                positive_number(name, value)


@dataclass(frozen=True, kw_only=True)
class TargetSize:
    """Bytes of the target's weights in an engine, in this project, and on disk; ``active`` parameters per token.

    Per token the cache holds ``num_paths`` streams of ``width``, and as many more per layer tap. ``engine`` makes the states;
    None: this project does, with the layers spread over all GPUs that they need, of which one works at a time.
    ``client_bytes``: host memory of one process that asks an engine for states.
    """

    weights_bytes: float
    loaded_bytes: float
    disk_bytes: float
    active: float
    num_paths: int
    width: int
    vocab_size: int
    taps: int = 0
    engine: str | None = None
    client_bytes: float = 0.0

    @property
    def in_process(self) -> bool:
        return self.engine is None

    def state_bytes(self, codec: str) -> float:
        """Bytes of one token's states: every path of every tap; fp8 has an fp32 scale per token and path."""
        each = {"fp32": 4 * self.width, "bf16": 2 * self.width, "fp8": self.width + 4}[codec]
        return self.num_paths * (1 + self.taps) * each + IDS_BYTES

    @property
    def json_bytes(self) -> int:
        """Bytes of one answer token on disk, at most: its digits and its mask's, each with a comma and a blank."""
        return len(str(self.vocab_size - 1)) + 1 + 2 * 2

    def served_gpus(self, machine: Machine) -> int:
        """GPUs of one copy in an engine: a power of two, for tensor parallelism."""
        need, count = HEADROOM * self.weights_bytes / (machine.gpu_gib * GIB), 1
        while count < need:
            count *= 2
        return count

    def serving_gpus(self, machine: Machine) -> int:
        """GPUs of one copy where states are made."""
        if not self.in_process:
            return self.served_gpus(machine)
        return math.ceil(HEADROOM * self.loaded_bytes / (machine.gpu_gib * GIB))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``epochs`` of ``examples`` with ``mean_tokens`` each, of which the target writes ``answer_tokens`` beforehand."""

    name: str
    examples: int
    mean_tokens: float
    answer_tokens: float
    epochs: int

    @property
    def tokens(self) -> float:
        return self.examples * self.mean_tokens


@dataclass(frozen=True, kw_only=True)
class Training:
    """One rank's step of ``documents`` (gradient accumulation included) and ``step_flops``; ``cache`` the mode.

    ``smaller``: overrides that save memory, cheapest first, with the bytes that a rank then needs. ``checkpoint_bytes``: all
    checkpoints that a run keeps.
    """

    ranks: int
    documents: int
    step_flops: float
    memory: StepMemory
    codec: str
    cache: str = "disk"
    stream_gb: float | None = None
    smaller: tuple[tuple[str, float], ...] = ()
    checkpoint_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Tokens of check_engine's prompts; ``methods`` with a drafter; tokens that each of them writes in parity and in evaluate,
    over all prompts, modes and temperatures."""

    check_tokens: int = 0
    methods: int = 1
    parity_tokens: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Share:
    """``serve`` GPUs run the target while ``train`` GPUs run the drafter: tokens per second of each, hours per stage at the
    slower one's pace."""

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
        """Tokens per second that ``copies`` of the target bring to the cache."""
        return min(copies * self.capture_per_copy, self.rates.processes * (self.rates.transport_tokens_per_s or math.inf))

    @property
    def process_rate(self) -> float:
        """Tokens per second of one process that asks one copy for states."""
        return min(self.capture_per_copy, self.rates.transport_tokens_per_s or math.inf)

    def answer_hours(self, *stages: Stage) -> float:
        """Hours in which servers write the answers of ``stages`` (none given: all), on every copy the machine holds."""
        tokens = sum(stage.examples * stage.answer_tokens for stage in stages or self.stages)
        copies = self.machine.gpus // self.target.served_gpus(self.machine)
        return tokens / (self.rates.answer_tokens_per_s * max(1, copies)) / 3600

    def capture_hours(self, *stages: Stage) -> float:
        """Hours in which the states of ``stages`` (none given: all) are captured once, on every copy the machine holds."""
        tokens = sum(stage.tokens for stage in stages or self.stages)
        return tokens / self.capture_rate(max(1, self.copies)) / 3600

    def training_hours(self, stage: Stage, overlap: bool = True) -> float:
        """Hours of all steps, each at the slower of computing and reading; without ``overlap`` at their sum."""
        reading = self.step_read_bytes(stage) / (self.machine.read_gb_s * 1e9)
        return self.steps(stage) * (max(self.step_s, reading) if overlap else self.step_s + reading) / 3600

    def shares(self) -> list[Share]:
        """Every split of the GPUs into whole copies of the target and training ranks, both at work at once (cache=stream).

        Nothing stays on disk, so every epoch captures again.
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
        """Returns one line per thing that does not fit, with the override that fixes it."""
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
