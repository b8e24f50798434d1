"""Prompts of the paper's seven benchmarks, from the hub or from local files.

``python -m src.fetch_benchmarks FOLDER`` writes ``FOLDER/<name>.jsonl`` with a ``turns`` field, for machines without a network.

A prompt is a conversation of user turns only: the target writes the answers between them
(hyperdflash.answers.responses). Its ``domain`` is the benchmark's name, its ``id`` <name>/<hash of its turns>.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.benchmark_rows import BENCHMARKS, load_turns
from hyperdflash.data.prompts import Prompts
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.stable_hash import content_hash, unit_interval

log = logging.getLogger(__name__)


def benchmark_prompts(name: str, path: str | Path | None = None) -> list[Conversation]:
    """Returns all prompts of one benchmark in file order; the second prompt of equal text gets the id ``...-2``."""
    rows = load_turns(name, path)
    if len(rows) != BENCHMARKS[name].rows:
        log.warning("%s has %d prompts here, %d were published", BENCHMARKS[name].title, len(rows), BENCHMARKS[name].rows)
    seen: Counter[str] = Counter()
    found = []
    for turns in rows:
        digest = content_hash("\x00".join(turns))
        seen[digest] += 1
        again = f"-{seen[digest]}" if seen[digest] > 1 else ""
        found.append(Conversation(f"{name}/{digest}{again}", name, tuple(Turn("user", turn) for turn in turns)))
    return found


@dataclass(frozen=True, kw_only=True)
class PaperBenchmarks(Prompts):
    """Prompts of the benchmarks ``names``, in the paper's order.

    ``per_benchmark`` limits the prompts of each (None: all); ``seed`` chooses them so that a larger limit only adds prompts.
    ``path`` is a folder of <name>.jsonl, None for the hub.
    """

    names: Sequence[str]
    per_benchmark: int | None
    seed: int
    path: str | Path | None

    def __post_init__(self):
        super().__post_init__()
        known = ", ".join(BENCHMARKS)
        if unknown := [name for name in self.names if name not in BENCHMARKS]:
            raise ValueError(f"benchmarks.names has {unknown[0]!r}; wanted some of {known}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"benchmarks.names must name at least one benchmark, each once, of {known}; got {[*self.names]}")
        if self.per_benchmark is not None:
            positive_int("benchmarks.per_benchmark", self.per_benchmark)
        natural_int("benchmarks.seed", self.seed)
        if self.path is not None and not Path(self.path).is_dir():
            raise ValueError(
                f"benchmarks.path={self.path} is not a folder: make it with `python -m src.fetch_benchmarks {self.path}`, "
                "or set benchmarks.path=null for the hub"
            )

    @cached_property
    def _all(self) -> dict[str, list[Conversation]]:
        return {name: benchmark_prompts(name, self.path) for name in BENCHMARKS if name in self.names}

    def conversations(self) -> list[Conversation]:
        """Returns the chosen prompts, benchmark by benchmark, each in file order."""
        return [prompt for prompts in self._all.values() for prompt in self._choose(prompts)]

    def _choose(self, prompts: list[Conversation]) -> list[Conversation]:
        drawn = sorted(prompts, key=lambda prompt: unit_interval(prompt.id, salt=f"benchmark {self.seed}"))
        chosen = {prompt.id for prompt in drawn[: self.per_benchmark]}
        return [prompt for prompt in prompts if prompt.id in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m src.fetch_benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the files <name>.jsonl")
    parser.add_argument("--names", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in tqdm(options.names, unit="benchmark"):
        rows = load_turns(name)
        text = "".join(json.dumps({"turns": turns}, ensure_ascii=False) + "\n" for turns in rows)
        (options.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        tqdm.write(f"{name}: {len(rows)} prompts")
