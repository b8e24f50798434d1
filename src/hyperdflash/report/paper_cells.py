"""What is recorded of a decoding run for the paper's tables, and the tables' columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.settings import one_of

MODES = {"non_think": (2, "Non-thinking"), "think_high": (3, "Think-high")}  # table number and name in the paper


@dataclass(frozen=True)
class Column:
    """``name`` a cell's benchmark, ``title`` and ``group`` as printed."""

    name: str
    title: str
    group: str


PAPER_COLUMNS = tuple(
    Column(name, "LCB" if name == "livecodebench" else rows.title, rows.group) for name, rows in BENCHMARKS.items()
)


@dataclass(frozen=True, eq=False)
class PaperCell:
    """One method on one benchmark, measured by decoding; a row a prompt.

    ``counts`` its rounds (S = 0 for plain decoding: every round emits one token), ``looped`` [N] bool, the answer ends in a
    loop, ``seconds`` [N] float64 of all rounds of the prompt, the prefill left out. ``seed`` is the run's (of draws and of
    the drafter's training); a cell is compared with the AR cell of its own seed, ``run_id`` names what made it.
    """

    method: str
    benchmark: str
    mode: str
    temperature: float
    seed: int
    prompt_ids: tuple[str, ...]
    counts: PromptCounts
    looped: np.ndarray
    seconds: np.ndarray
    run_id: str = ""

    def __post_init__(self):
        prompts = len(self.prompt_ids)
        one_of("mode", self.mode, tuple(MODES))
        if not prompts:
            raise ValueError(f"{self} has no prompts: leave the cell out, it is then shown as missing")
        if not len(self.looped) == len(self.seconds) == len(self.counts.rounds) == prompts:
            raise ValueError(
                f"{self}: {prompts} prompt ids beside {len(self.looped)} loop flags, {len(self.seconds)} times "
                f"and {len(self.counts.rounds)} rows of counts; each needs one entry a prompt"
            )

    def __str__(self) -> str:
        return f"{self.method} on {self.benchmark} ({self.mode}, T = {self.temperature:g}, seed {self.seed})"

    @property
    def is_plain(self) -> bool:
        """Decodes without a drafter."""
        return self.counts.num_slots == 0
