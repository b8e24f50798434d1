"""Recorded decoding runs -> every number of the paper's Tables 2 and 3 and Figure 1.

Legend: N prompts, S draft slots. The paper's tables: Table 2 is Non-thinking, Table 3 Think-high; a section a
temperature, a row a method, speedup and tau in a column pair a benchmark, grouped Math, Code, Chat; Average is the plain
mean of the columns.

    1. PaperCell      one method on one benchmark in one mode at one temperature with one seed, a row a prompt
    2. pooled         seeds of a prompt are summed: the prompt stays the unit of the bootstrap
    3. Entry          tau, accepted, survival, conditional (report/summary.py); speedup against AR of the same seeds
    4. PaperTable     sections; a column without a cell has no entry, and Average has none unless all columns do

Speedup is emitted tokens a second of decoding (the prefill and its token left out) over AR's on the same prompts, both
summed over prompts before the division. Plain decoding (AR, transformers' ``generate()``) is a cell with no slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hyperdflash.report.bootstrap import MEAN, Estimate, PromptCounts, Resamples, pooled_ratio, resample_prompts
from hyperdflash.report.paper_cells import MODES, PAPER_COLUMNS, Column, PaperCell
from hyperdflash.report.records import AUTOREGRESSIVE
from hyperdflash.report.summary import GroupSummary, MethodSummary, Summary, answers_kept, group_summaries
from hyperdflash.settings import one_of


@dataclass(frozen=True)
class Entry:
    """A method in one column, or in MEAN. ``speedup`` NaN without AR of the same seeds; ``tokens_per_second`` NaN in MEAN."""

    summary: GroupSummary
    speedup: Estimate
    tokens_per_second: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """One temperature: ``entries`` method -> column name or MEAN -> Entry, only what was measured."""

    temperature: float
    entries: dict[str, dict[str, Entry]]


@dataclass(frozen=True)
class PaperTable:
    """Table 2 or 3: ``methods`` with a drafter and ``plain`` ones, in order; ``missing`` a sentence a gap."""

    mode: str
    columns: tuple[Column, ...]
    methods: tuple[str, ...]
    plain: tuple[str, ...]
    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    run_ids: dict[str, str]
    num_resamples: int
    seed: int

    @property
    def number(self) -> int:
        return MODES[self.mode][0]

    @property
    def mode_name(self) -> str:
        return MODES[self.mode][1]


@dataclass(frozen=True)
class _Pooled:
    """Seeds of one column summed by prompt; ``looped`` [N] the share of a prompt's answers."""

    prompt_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    counts: PromptCounts
    without_loops: PromptCounts
    looped: np.ndarray
    seconds: np.ndarray


def paper_table(
    cells: Sequence[PaperCell],
    mode: str,
    columns: Sequence[Column] = PAPER_COLUMNS,
    methods: Sequence[str] = (),
    num_resamples: int = 2000,
    seed: int = 0,
) -> PaperTable:
    """The table of ``mode`` from the cells of that mode; ``methods`` are rows that are wanted even where nothing was measured.

    Intervals: ``num_resamples`` bootstrap samples of the prompts, drawn with ``seed``, shared by all methods.
    """
    one_of("mode", mode, tuple(MODES))
    cells = [cell for cell in cells if cell.mode == mode]
    names = tuple(column.name for column in columns)
    if strange := [cell for cell in cells if cell.benchmark not in names]:
        raise ValueError(f"{strange[0]} fits no column; columns are {', '.join(names)}")
    drafting = tuple(dict.fromkeys([*methods, *(cell.method for cell in cells if not cell.is_plain)]))
    plain = tuple(dict.fromkeys(cell.method for cell in cells if cell.is_plain))
    if mixed := set(drafting) & set(plain):
        raise ValueError(f"{mixed.pop()!r} has cells with draft slots and cells without: give each its own name")

    @cache
    def resamples(domains: tuple[str, ...]) -> Resamples:
        return resample_prompts(domains, num_resamples, seed)

    sections, missing = [], [] if cells else [f"{mode}: nothing was measured"]
    for temperature in sorted({cell.temperature for cell in cells}):
        found: dict[str, dict[str, _Pooled]] = {}
        for method in (*plain, *drafting):
            mine = [c for c in cells if (c.method, c.temperature) == (method, temperature)]
            found[method] = {n: _pool(group) for n in names if (group := [c for c in mine if c.benchmark == n])}
        _check_same_prompts(found, temperature)
        autoregressive = [c for c in cells if (c.method, c.temperature) == (AUTOREGRESSIVE, temperature)]
        entries = {
            method: _entries(pooled, _matching(pooled, autoregressive), resamples, complete=len(pooled) == len(names))
            for method, pooled in found.items()
        }
        sections.append(Section(temperature, entries))
        missing += _missing(sections[-1], columns, drafting)
    run_ids = {m: ", ".join(dict.fromkeys(c.run_id for c in cells if c.method == m and c.run_id)) for m in (*drafting, *plain)}
    return PaperTable(mode, tuple(columns), drafting, plain, tuple(sections), tuple(missing), run_ids, num_resamples, seed)


def figure1_summary(table: PaperTable, cells: Sequence[PaperCell]) -> Summary | None:
    """What ``hyperdflash.report.figures.acceptance_figure`` draws: the mean over the columns that every method has.

    ``cells`` are those ``table`` was made from; a method that was not measured at all is left out. None where no column
    is shared by all.
    """
    measured = [found for s in table.sections for m in table.methods if (found := s.entries[m])]
    columns = [c for c in table.columns if measured and all(c.name in entries for entries in measured)]
    if not columns:
        return None
    titles = {c.name: c.title for c in columns} | {MEAN: MEAN}
    kept = [cell for cell in cells if cell.benchmark in titles and not cell.is_plain]
    common = paper_table(kept, table.mode, columns, (), table.num_resamples, table.seed)
    summaries = tuple(
        MethodSummary(
            name=method,
            temperature=section.temperature,
            num_slots=len(section.entries[method][MEAN].summary.survival),
            run_id=table.run_ids[method],
            groups={titles[name]: entry.summary for name, entry in section.entries[method].items()},
        )
        for section in common.sections
        for method in common.methods
        if section.entries[method]
    )
    return Summary(summaries, (), tuple(titles.values()), "", table.num_resamples, table.seed)


def _pool(cells: Sequence[PaperCell]) -> _Pooled:
    first = cells[0]
    seeds = tuple(sorted(cell.seed for cell in cells))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{first} was given more than once: keep one cell a seed, got seeds {list(seeds)}")
    for cell in cells[1:]:
        if cell.prompt_ids != first.prompt_ids or cell.counts.num_slots != first.counts.num_slots:
            raise ValueError(f"{cell} and {first} differ in prompts or draft slots: seeds of one method share both")
    return _Pooled(
        prompt_ids=first.prompt_ids,
        seeds=seeds,
        counts=_sum([cell.counts for cell in cells]),
        without_loops=_sum([answers_kept(cell.counts, ~np.asarray(cell.looped, bool)) for cell in cells]),
        looped=np.mean([cell.looped for cell in cells], axis=0),
        seconds=np.sum([cell.seconds for cell in cells], axis=0),
    )


def _sum(counts: Sequence[PromptCounts]) -> PromptCounts:
    names = ("emitted", "accepted", "rounds", "survived", "reached")
    return PromptCounts(*(np.sum([getattr(c, name) for c in counts], axis=0) for name in names))


def _concatenate(pooled: Sequence[PromptCounts]) -> PromptCounts:
    names = ("emitted", "accepted", "rounds", "survived", "reached")
    return PromptCounts(*(np.concatenate([getattr(c, name) for c in pooled]) for name in names))


def _matching(pooled: dict[str, _Pooled], autoregressive: Sequence[PaperCell]) -> dict[str, _Pooled]:
    """AR of the very seeds that a column pools; a column whose AR lacks one of them is left out."""
    found = {}
    for name, own in pooled.items():
        same = [cell for cell in autoregressive if cell.benchmark == name and cell.seed in own.seeds]
        if len(same) == len(own.seeds):
            found[name] = _pool(same)
    return found


def _entries(
    pooled: dict[str, _Pooled],
    autoregressive: dict[str, _Pooled],
    resamples: Callable[[tuple[str, ...]], Resamples],
    complete: bool,
) -> dict[str, Entry]:
    """A column's name -> Entry; MEAN too where ``complete``."""
    if not pooled:
        return {}
    columns = list(pooled.values())
    domains = tuple(name for name, own in pooled.items() for _ in own.prompt_ids)
    draws = resamples(domains)
    counts = _concatenate([own.counts for own in columns])
    without_loops = _concatenate([own.without_loops for own in columns])
    summaries = group_summaries(counts, without_loops, np.concatenate([own.looped for own in columns]), domains, draws)
    nothing = {name: np.zeros(len(own.prompt_ids)) for name, own in pooled.items()}  # 0 / 0: no speedup
    ar_tokens = [autoregressive[n].counts.emitted if n in autoregressive else nothing[n] for n in pooled]
    ar_seconds = [autoregressive[n].seconds if n in autoregressive else nothing[n] for n in pooled]
    speed = pooled_ratio(counts.emitted, np.concatenate([own.seconds for own in columns]), draws)
    plain_speed = pooled_ratio(np.concatenate(ar_tokens), np.concatenate(ar_seconds), draws)
    speedup = speed.over(plain_speed).estimates()
    tokens_per_second = dict(zip(pooled, map(float, speed.value), strict=False)) | {MEAN: float("nan")}
    seeds = {name: own.seeds for name, own in pooled.items()}
    seeds[MEAN] = tuple(sorted({s for own in columns for s in own.seeds}))
    return {
        name: Entry(summary, speedup[name], tokens_per_second[name], seeds[name])
        for name, summary in summaries.items()
        if complete or name != MEAN
    }


def _check_same_prompts(found: dict[str, dict[str, _Pooled]], temperature: float) -> None:
    """Speedups and rows are comparable only on the same prompts."""
    reference: dict[str, tuple[str, _Pooled]] = {}
    for method, columns in found.items():
        for name, own in columns.items():
            other, first = reference.setdefault(name, (method, own))
            if own.prompt_ids != first.prompt_ids:
                raise ValueError(
                    f"{method} and {other} were measured on different {name} prompts at T = {temperature:g} "
                    f"({len(own.prompt_ids)} and {len(first.prompt_ids)}): evaluate both in one run"
                )


def _missing(section: Section, columns: Sequence[Column], methods: Sequence[str]) -> list[str]:
    """What a section lacks, a sentence a method."""
    at, gaps = f"T = {section.temperature:g}", []
    for method in methods:
        entries = section.entries[method]
        absent = [c.title for c in columns if c.name not in entries]
        if len(absent) == len(columns):
            gaps.append(f"{at}: {method} was not measured")
        elif absent:
            gaps.append(f"{at}: {method} lacks {', '.join(absent)}, so it has no Average")
        unpaired = [c.title for c in columns if c.name in entries and np.isnan(entries[c.name].speedup.value)]
        if unpaired:
            gaps.append(f"{at}: {method} has no speedup on {', '.join(unpaired)}: no AR cell of its seeds")
    return gaps
