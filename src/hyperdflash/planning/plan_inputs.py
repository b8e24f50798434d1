"""What a plan is made from: the machine, the rates that are assumed, the target's sizes, the stages and a rank's step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperdflash.planning.step_memory import StepMemory
from hyperdflash.settings import number_between, positive_int, positive_number

GIB = 2**30
HEADROOM = 1.1  # of the target's weights, for its cache and activations
IDS_BYTES = 9  # a token's id (int64) and its loss mask


@dataclass(frozen=True, kw_only=True)
class Machine:
    """``gpus`` of ``gpu_gib`` usable memory and ``gpu_tflops`` dense bf16 peak; free ``disk_tb``; ``read_gb_s`` what all ranks
    together can read of the cache (disk, or network where the cache is elsewhere)."""

    gpus: int
    gpu_gib: float
    gpu_tflops: float
    disk_tb: float
    read_gb_s: float

    def __post_init__(self):
        positive_int("machine.gpus", self.gpus)
        for name in ("gpu_gib", "gpu_tflops", "disk_tb", "read_gb_s"):
            positive_number(f"machine.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Assumptions. ``drafter_utilization``: share of ``gpu_tflops`` that the drafter's step reaches, ``least_step_s`` what no
    step is faster than (launches, all-reduce); ``capture_tokens_per_s`` of one copy of the target (its ``serving_gpus``
    together) in prefill, None for ``target_utilization`` of its peak; ``answer_tokens_per_s`` that one copy generates;
    ``transport_tokens_per_s`` what one capture process takes in from servers, None where nothing limits it, and ``processes``
    how many there are; ``forward_s`` of the target in this process, one sequence, ``tokens_a_round`` of a drafter (tau),
    ``served_tokens_per_s`` of one sequence in an engine without drafts."""

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
        for name in ("drafter_utilization", "target_utilization"):
            number_between(f"rates.{name}", getattr(self, name), 0.001, 1.0)
        for name in ("capture_tokens_per_s", "transport_tokens_per_s"):
            if getattr(self, name) is not None:
                positive_number(f"rates.{name}", getattr(self, name))
        for name in ("answer_tokens_per_s", "least_step_s", "forward_s", "tokens_a_round", "served_tokens_per_s"):
            positive_number(f"rates.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TargetSize:
    """``weights_bytes`` as an engine holds them, ``loaded_bytes`` as this project does, ``disk_bytes`` of the checkpoint;
    ``client_bytes`` of host memory in one process that asks an engine for states.
    ``engine`` makes the states; None: this project, the layers one after the other on all GPUs that they need, so one GPU works
    at a time. ``active`` parameters per token, stored streams of ``width`` per token: M, and M more per layer tap."""

    name: str
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
        paths = self.num_paths * (1 + self.taps)
        each = {"fp32": 4 * self.width, "bf16": 2 * self.width, "fp8": self.width + 4}[codec]
        return paths * each + IDS_BYTES

    @property
    def json_bytes(self) -> int:
        """Bytes of one answer token on disk, at most: its digits and its mask's, each with a comma and a blank."""
        return len(str(self.vocab_size - 1)) + 1 + 2 * 2

    def served_gpus(self, machine: Machine) -> int:
        """GPUs that one copy takes in an engine: a power of two (tensor parallel)."""
        need, count = HEADROOM * self.weights_bytes / (machine.gpu_gib * GIB), 1
        while count < need:
            count *= 2
        return count

    def serving_gpus(self, machine: Machine) -> int:
        """GPUs that one copy takes where states are made."""
        if not self.in_process:
            return self.served_gpus(machine)
        return math.ceil(HEADROOM * self.loaded_bytes / (machine.gpu_gib * GIB))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``examples`` of ``mean_tokens``, ``epochs`` of them, ``answer_tokens`` of each written by the target beforehand."""

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
    """``documents`` per rank and step (gradient accumulation included), ``step_flops`` of one rank's step; ``cache`` the mode;
    ``smaller``: overrides that save memory, cheapest first, with the bytes that a rank then needs; ``checkpoint_bytes`` of all
    that a run keeps.
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
    """``check_tokens`` of check_engine's prompts; ``methods`` with a drafter; tokens that each writes in ``parity`` and in
    ``evaluate``, all prompts, modes and temperatures together."""

    check_tokens: int = 0
    methods: int = 1
    parity_tokens: float = 0.0
    tokens: float = 0.0
