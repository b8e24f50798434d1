"""Writes a run's metrics to one CSV file that holds every step once, also after a resume."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from hyperdflash.files import whole_file


class MetricsCSV(Logger):
    """Writes one row of ``run``/metrics.csv per call, before the call returns; a new metric rewrites the file with its column.

    Columns are ``step`` (the number of steps before, so the first is 0), ``epoch``, then metrics by first appearance.
    """

    def __init__(self, run: Path):
        super().__init__()
        self.path = Path(run) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsCSV:
        return self

    def log_hyperparams(self, params: dict | Namespace, *args, **kwargs) -> None:
        """Does nothing: the run's configuration has its own file."""

    @rank_zero_only
    def restart_at(self, step: int) -> None:
        """Drops incomplete rows, and those that a run that continues from ``step`` writes again."""
        columns, rows = self._read()
        self._rewrite(columns, [row for row in rows if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{name: float(value) for name, value in metrics.items() if name != "epoch"}}
        if "epoch" in metrics:
            row["epoch"] = int(metrics["epoch"])
        if self._columns is None:
            self._columns = self._read()[0]
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite([*self._columns, *new], self._read()[1])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Returns the columns and the complete rows on disk."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            return ["step", "epoch"], []
        reader = csv.DictReader(lines)
        return list(reader.fieldnames), list(reader)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(self.path, sync=True) as file:
            file.write(text.getvalue().encode())
        self._columns = columns
