"""Renders the demo's tables: a replay of several methods on the same texts.

tau comes first, as in the paper: a column per domain, then their plain mean. The best of a column and temperature is bold, and
every compared number has an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperdflash.report.bootstrap import LEVEL, MEAN
from hyperdflash.report.measure import Sample, measure
from hyperdflash.report.results import MINUS_BASELINE, Results
from hyperdflash.report.tables import Block, Table, bold_best, estimate_text, number_text


@dataclass(frozen=True)
class Acceptance:
    """``results`` of all methods, with differences to ``baseline``."""

    results: Results
    baseline: str
    num_resamples: int
    seed: int

    def to_json(self) -> dict:
        """Returns the content of ``metrics.json``: the record, its baseline and its intervals."""
        return {
            "baseline": self.baseline,
            "domains": list(self.results.groups[:-1]),
            "interval": {"level": LEVEL, "resamples": self.num_resamples, "seed": self.seed, "unit": "prompt"},
            "rows": self.results.to_json(),
        }


def replay_results(samples: Sequence[Sample], baseline: str, num_resamples: int = 2000, seed: int = 0) -> Acceptance:
    """Compares every method with ``baseline`` at its own temperature; ValueError where their texts differ."""
    if not samples:
        raise ValueError("no results to report; run python -m src.evaluate first")
    groups = None
    for temperature in dict.fromkeys(s.temperature for s in samples):
        batch, at = [s for s in samples if s.temperature == temperature], f"at temperature {temperature:g}"
        names, first = [s.method for s in batch], batch[0]
        if baseline not in names:
            raise ValueError(f"the baseline {baseline!r} has no result {at}; got {names}")
        for own in batch[1:]:
            if (own.prompt_ids, own.groups) == (first.prompt_ids, first.groups) and (own.looped != first.looped).any():
                raise ValueError(f"{own.method} and {first.method} {at} disagree on which answers loop: texts differ")
        here = tuple(dict.fromkeys(first.groups))
        if groups not in (None, here):
            raise ValueError(f"temperatures cover different domains: got {groups} and {here}")
        groups = here
    details = {("", s.method): {"run": s.run} for s in samples}
    return Acceptance(Results(measure(samples, baseline, (), num_resamples, seed), details), baseline, num_resamples, seed)


def acceptance_blocks(found: Acceptance) -> list[Block]:
    """Returns tables of tau, differences and positions per temperature, then their definitions."""
    blocks: list[Block] = []
    for temperature in found.results.distinct("temperature"):
        here = found.results.at(temperature=temperature)
        blocks += [f"### Temperature {temperature:g}", _taus(here)]
        blocks += [f"Difference in tau to {found.baseline}, paired by prompt:", _differences(here, found.baseline)]
        blocks += ["Acceptance per drafted position, plain mean over domains, %:", positions(here, here.distinct("method"))]
    return [*blocks, _notes(found)]


def main_table(found: Acceptance) -> Table:
    """Returns the terminal's table, a section per temperature; six methods take about 110 columns."""
    groups = found.results.groups
    header = ["Method", *groups[:-1], f"mean [{LEVEL:.0%}]", f"minus {found.baseline} [{LEVEL:.0%}]", "accepted", "loops"]
    rows: list[list[str]] = []
    for temperature in found.results.distinct("temperature"):
        here = found.results.at(temperature=temperature)
        methods = here.distinct("method")
        rows.append([f"temperature {temperature:g}"])
        columns = []
        for group in groups:
            taus = [here.get(method, "tau", group) for method in methods]
            texts = [estimate_text(e) if group == MEAN else number_text(e.value) for e in taus]
            columns.append(bold_best([e.value for e in taus], texts, whole=True))
        for i, method in enumerate(methods):
            difference = estimate_text(here.get(method, MINUS_BASELINE), signed=True) if method != found.baseline else ""
            loops = f"{here.get(method, 'looping_share').value:.1%}"
            accepted, without = (number_text(here.get(method, name).value) for name in ("accepted", "tau_without_loops"))
            rows.append([method, *(column[i] for column in columns), difference, accepted, loops, without])
    first = found.results.at(temperature=found.results.distinct("temperature")[0])
    caption = f"{prompts_text(first)} prompts; mean: plain mean over domains; brackets: {LEVEL:.0%} bootstrap over prompts"
    title = "Accepted length τ (tokens per round, bonus token included)"
    return Table([*header, "τ, no loops"], rows, title=title, caption=caption)


def prompts_text(here: Results) -> str:
    """Counts prompts per domain: ``60 math, 60 code``."""
    method = here.distinct("method")[0]
    return ", ".join(f"{here.count(method, 'prompts', group)} {group}" for group in here.groups[:-1])


def positions(here: Results, methods: Sequence[str], over: str = "prompts") -> Table:
    """Returns survival and conditional acceptance in percent, a column per slot."""
    rates = {(method, metric): here.slots(method, metric, over) for method in methods for metric in ("survival", "conditional")}
    slots = max(map(len, rates.values()))
    rows = []
    for (method, metric), found in rates.items():
        values = [number_text(100 * e.value, 1) for e in found]
        rows.append([method if metric == "survival" else "", metric, *values, *[""] * (slots - len(values))])
    return Table(["Method", "", *map(str, range(1, slots + 1))], rows)


def _taus(here: Results) -> Table:
    methods, groups = here.distinct("method"), here.groups
    columns = []
    for group in groups:
        taus = [here.get(method, "tau", group) for method in methods]
        columns.append(bold_best([e.value for e in taus], list(map(estimate_text, taus))))
    columns.append([number_text(here.get(method, "accepted").value) for method in methods])
    columns.append([f"{here.get(method, 'looping_share').value:.1%}" for method in methods])
    columns.append([number_text(here.get(method, "tau_without_loops").value) for method in methods])
    columns += [[str(here.count(method, name)) for method in methods] for name in ("prompts", "rounds")]
    header = ["Method", *(f"{g} τ" for g in groups), "accepted", "loops", "τ without loops", "prompts", "rounds"]
    return Table(header, [list(row) for row in zip(methods, *columns, strict=True)])


def _differences(here: Results, baseline: str) -> Block:
    others = [method for method in here.distinct("method") if method != baseline]
    rows = [
        [method, *(estimate_text(here.get(method, MINUS_BASELINE, group), signed=True) for group in here.groups)]
        for method in others
    ]
    return Table(["Method", *here.groups], rows) if rows else "(no other method)"


def _notes(found: Acceptance) -> str:
    made_by = found.results.runs_sentence
    return (
        "τ: tokens emitted after the prefill's token / verification rounds (bonus token included, last round clipped); "
        "accepted: draft tokens kept per round. Pooled over rounds within a domain; mean: plain mean over domains. "
        "Survival: share of all rounds that accepted at least k drafts; conditional: share that accepted slot k among "
        "rounds that accepted the earlier ones and had a slot k. "
        f"Brackets: {LEVEL:.0%} percentile bootstrap over prompts, {found.num_resamples} resamples, seed "
        f"{found.seed}; they cover the choice of prompts, not the training seed nor the target.{made_by}"
    )
