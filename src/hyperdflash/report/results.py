"""Holds the tidy record of every evaluation, one number per row: of replay, decoding, serving engines and sweeps.

target, method, mode, temperature    the setting; empty where an evaluation has only one
group                                a domain, a benchmark, or MEAN, the plain mean over them
metric, slot                         tau, accepted, survival, speedup, "tau minus baseline", ...; slot k from 1, else None
value, low, high                     NaN where undefined; the interval is over prompts or over seeds, as ``over`` says
n                                    prompts of the group
"""

import csv
import io
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

from hyperdflash.files import write_text
from hyperdflash.report.bootstrap import MEAN, Estimate
from hyperdflash.report.tables import jsonable

MINUS_BASELINE = "tau minus baseline"
AS_SHIPPED = "as shipped"  # in place of a run, for the target's own MTP block


class Row(NamedTuple):
    """One number with its place in the record (see the module)."""

    target: str
    method: str
    mode: str
    temperature: float
    group: str
    metric: str
    slot: int | None
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    over: str = "prompts"


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Results:
    """``rows``; ``details``: (target, method) -> further facts of a method, such as its run or its choices; ``interval``:
    level, resamples, seed and unit of the bootstrap."""

    rows: tuple[Row, ...]
    details: dict[tuple[str, str], dict[str, object]] = field(default_factory=dict)
    interval: dict[str, object] = field(default_factory=dict)

    def at(self, **keys) -> Self:
        places = [(Row._fields.index(name), value) for name, value in keys.items()]
        return Results(tuple(r for r in self.rows if all(r[i] == value for i, value in places)), self.details, self.interval)

    def distinct(self, column: str) -> tuple:
        return tuple(dict.fromkeys(getattr(row, column) for row in self.rows))

    @property
    def groups(self) -> tuple[str, ...]:
        """All groups, MEAN last."""
        return tuple(sorted(self.distinct("group"), key=lambda group: group == MEAN))

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(own["run"]) for own in self.details.values() if own.get("run")))

    @property
    def brackets(self) -> str:
        """Explains the tables' intervals and names the runs, for the note below a table."""
        runs = f" Runs: {', '.join(self.runs)}." if self.runs else ""
        return (
            f"Brackets: {self.interval['level']:.0%} percentile bootstrap over prompts, {self.interval['resamples']} "
            f"resamples, seed {self.interval['seed']}; they cover the choice of prompts, not the training seed nor the "
            f"target.{runs}"
        )

    @cached_property
    def _index(self) -> dict[tuple, Row]:
        return {(r.method, r.group, r.metric, r.slot, r.over): r for r in reversed(self.rows)}

    def get(self, method: str, metric: str, group: str = MEAN, slot: int | None = None, over: str = "prompts") -> Estimate:
        """Returns the first row's estimate; NaN where nothing was measured."""
        row = self._index.get((method, group, metric, slot, over))
        return Estimate(row.value, row.low, row.high) if row else UNDEFINED

    def count(self, method: str, metric: str, group: str = MEAN) -> int:
        """Returns a count of prompts or rounds; 0 where nothing was measured."""
        value = self.get(method, metric, group).value
        return 0 if math.isnan(value) else int(value)

    def rates(self, method: str, over: str = "prompts") -> dict[str, tuple[Estimate, ...]]:
        """Returns survival and conditional acceptance of MEAN at slots 1, 2, ..."""
        places = {metric: (method, MEAN, metric, over) for metric in ("survival", "conditional")}
        slots = sorted({k[3] for k in self._index if (*k[:3], k[4]) in places.values()})
        return {metric: tuple(self.get(method, metric, MEAN, slot, over) for slot in slots) for metric in places}

    def csv_text(self) -> str:
        """Returns a line per row with the method's details in front; undefined numbers are empty."""
        names = list(dict.fromkeys(name for own in self.details.values() for name in own))
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow([*names, *Row._fields])
        for row in self.rows:
            own = self.details.get((row.target, row.method), {})
            table.writerow([*(own.get(name, "") for name in names), *map(_plain, row)])
        return out.getvalue()

    def to_json(self) -> dict:
        """Returns the interval and a dict per row, with NaN, which `jsonable` turns into None."""
        return {"interval": self.interval, "rows": [row._asdict() for row in self.rows]}


def write_report(folder: Path | str, contents: dict[str, object]) -> list[Path]:
    """Writes a file per name: text as it is, anything else as JSON with None for NaN; returns their paths."""
    for name, content in contents.items():
        if not isinstance(content, str):
            content = json.dumps(jsonable(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_text(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]


def _plain(value: object) -> object:
    """Formats numbers to six digits, whole ones without a point; empty for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if not isinstance(value, float) else f"{value:g}" if value == int(value) else f"{value:.6f}"
