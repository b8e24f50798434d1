"""Renders a run of the step's benchmark as Markdown and JSON: median times, decimal megabytes, ratios of this run alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.duel import Measured, Terms
from benchmarks.flops import FORMULA, step_flops
from benchmarks.shapes import GROWTH_BASE, Case
from benchmarks.verdict import (
    FIT_TOLERANCE,
    Growth,
    Threshold,
    added_bytes,
    growths,
    middle_half,
    over_peak,
    ratio,
    seconds_at_own_rates,
    slots_per_second,
    step_seconds,
    thresholds,
)
from hyperdflash.report.tables import markdown_table

OWN, PEER = "this project", "speculators"

WHAT_IS_MEASURED = """\
A step is forward, loss and backward, no optimizer. Both sides: one document, the same token ids, states and dtype (bf16:
weights and activations), a Qwen3-shaped drafter of the same sizes, 4 streams of states through one dense projection, frozen
embedding and LM head, position weights exp(-(k - 1) / 4), random weights. Each draws its anchors as it always does and is
then given the same ones, others every step; each counts anchors and supervised slots in its own loss, and where they differ
from A and 6 A the side counts as failed. The sides step in turn, a process each, the other one waiting. Memory is the
process's largest resident size over its size after the imports, weights and inputs included, in a process that ran this case
alone.

`own`: here cross-entropy with the document's tokens and KL on the first two slots (alpha 0.15); there cross-entropy (`ce`).
`kl`: KL on all slots on both sides; here cross-entropy is computed beside it.

In the peer's favour: its cross-entropy in bf16 stays in bf16, ours is computed in fp32; it computes no KL in `own` and no
cross-entropy in `kl`.

In ours: the library's labels are its target's most likely tokens, so the target's LM head runs over every slot there, in `ce`
too, where ours reads the document's tokens; its LM head reads the anchor's slot as well (7 of 7), ours the six supervised
ones; it keeps a second copy of the LM head, and in fp32 all tables of the vocabulary in fp32, where ours stay in bf16 as
checkpoints have them and are widened slice by slice. Its fp32 products go through torch's default library (MKL), ours through
oneDNN, and our process keeps freed memory for the next step, both as this project's training does. Its default attention
(FlexAttention) and loss (Triton) have no backward pass on a CPU or need a GPU: here it runs sdpa and its eager loss."""


@dataclass
class Run:
    """Every measurement. ``cases`` has per case the results by side; ``growth`` has them per shape along ``growth_axes``."""

    terms: Terms
    machine: dict
    cases: list[dict[str, Measured]] = field(default_factory=list)
    growth_axes: dict = field(default_factory=dict)
    growth: dict = field(default_factory=dict)

    def thresholds(self) -> list[Threshold]:
        """Returns the thresholds of the cases with this project's own loss."""
        compared = [results for results in self.cases if results[OWN].case.objective == "own"]
        return [found for results in compared for found in thresholds(results[OWN], results.get(PEER))]

    def growths(self) -> list[Growth]:
        return growths(self.growth, self.growth_axes)


def markdown(run: Run) -> list[str]:
    parts = [
        "# The training step's speed and memory",
        _machine(run),
        "## What is measured\n\n" + WHAT_IS_MEASURED,
        "## Speed and memory\n\n" + _comparison(run),
        "## Thresholds\n\n" + threshold_table(run.thresholds()) + "\n\n![Ratios beside their thresholds](step.png)",
        "## Matrix products\n\n```\n" + FORMULA + "\n```\n\n" + _products(run),
    ]
    if run.growth:
        parts.append("## Growth\n\n" + _growth(run.growths()) + "\n\n![Growth on logarithmic axes](step_growth.png)")
    parts.append("## This project's step by stage, medians\n\n" + _stages(run))
    return "\n\n".join(parts).splitlines()


def record(run: Run) -> dict:
    """Returns every step of every case as a record for JSON."""

    def plain(results: dict[str, Measured]) -> dict:
        return {side: {**asdict(measured), "step_s": step_seconds(measured)} for side, measured in results.items()}

    return {
        "machine": run.machine,
        "terms": asdict(run.terms),
        "cases": [plain(results) for results in run.cases],
        "thresholds": [{**asdict(found), "met": found.met} for found in run.thresholds()],
        "growth": [plain(results) for results in run.growth.values()],
        "exponents": [{**asdict(g), "within": g.within} for g in run.growths()],
    }


def threshold_table(found: Sequence[Threshold]) -> str:
    rows = []
    for one in sorted(found, key=lambda one: one.name):
        bound = f"{'at least' if one.at_least else 'at most'} {one.bound:.2f}"
        verdict = {True: "met", False: "**not met**", None: "cannot be said"}[one.met] + (f" ({one.note})" if one.note else "")
        rows.append([one.name, one.case.shape.name, one.case.dtype, _number(one.value, "{:.2f}"), bound, verdict])
    return _table(["threshold", "shape", "dtype", "measured", "bound", ""], rows)


def _machine(run: Run) -> str:
    versions = {side: m.versions for results in run.cases for side, m in results.items() if m.versions}
    lines = [f"- {run.machine['cpu']}, {run.machine['cores']} cores, {run.terms.threads} threads per process"]
    lines += [f"- {side}: {', '.join(f'{name} {v}' for name, v in packages.items())}" for side, packages in versions.items()]
    more = (
        f", more where they take less than {run.terms.least_s:g} s together (in growth half of both)"
        if run.terms.least_s
        else ""
    )
    lines.append(
        f"- {run.terms.rounds} measured steps per side and case after {run.terms.warm_up} others{more}; a process may allocate "
        f"{run.terms.memory_bytes / 2**30:g} GiB"
    )
    busy = run.machine["load_before"], run.machine.get("load_after")
    lines.append(f"- load average over the minute before the run {busy[0]:.2f}, at its end {_number(busy[1], '{:.2f}')}")
    return "\n".join(lines)


def _comparison(run: Run) -> str:
    sides = ("ours", "speculators")
    header = ["shape", "dtype", "loss", "steps", *(f"{side}, ms" for side in sides)]
    header += [*(f"{side}, slots/s" for side in sides), "speed ratio", *(f"{side}, MB" for side in sides), "memory ratio"]
    rows, failures = [], []
    for results in run.cases:
        own, peer = results[OWN], results.get(PEER)
        speeds = slots_per_second(own), peer and slots_per_second(peer)
        memory = added_bytes(own), peer and added_bytes(peer)
        cells = [own.case.shape.name, own.case.dtype, own.case.objective, f"{len(own.seconds)}", _time(own), _time(peer)]
        cells += [*(_number(s, "{:,.0f}") for s in speeds), _number(ratio(*speeds), "{:.2f}")]
        rows.append([*cells, *(_number(m and m / 1e6, "{:,.0f}") for m in memory), _number(ratio(*memory), "{:.2f}")])
        failures += [f"- {side}, {_title(own.case)}: {m.error}" for side, m in results.items() if m.error]
        if own.extras_error:
            failures.append(f"- rates, {_title(own.case)}: {own.extras_error}")
    imports = {side: m.imports_bytes for results in run.cases for side, m in results.items() if m.imports_bytes}
    text = _table(header, rows) + "\n\nTimes are medians, with the middle half of the steps in brackets.\nImports alone: "
    text += ", ".join(f"{side} {value / 1e6:,.0f} MB" for side, value in imports.items()) + "."
    return text + ("\n\nDid not run:\n\n" + "\n".join(failures) if failures else "")


def _products(run: Run) -> str:
    header = ["shape", "dtype", "loss", "GFLOP", "peak, GFLOP/s", "at", "FLOPs at peak, ms", "each at its own rate, ms"]
    rows = []
    for own in (results[OWN] for results in run.cases if results[OWN].beside_peak):
        best, flops = max(own.rates, key=lambda rate: rate["flops_per_s"]), step_flops(own.case)
        step_s, peak = (statistics.median(values) for values in zip(*own.beside_peak, strict=True))
        batch, height, inner, columns = best["sizes"]
        size = (f"{batch} x " if batch > 1 else "") + f"[{height}, {inner}] [{inner}, {columns}]"
        times = [flops / peak, seconds_at_own_rates(own), step_s]
        cells = [own.case.shape.name, own.case.dtype, own.case.objective, f"{flops / 1e9:.2f}", f"{peak / 1e9:,.0f}"]
        cells += [f"{best['name']}, {best['part']}: {size}", *(f"{1e3 * s:.1f}" for s in times)]
        rows.append([*cells, f"{over_peak(own):.2f}"])
    return (
        "Every product is measured at its own size and layout, the best of several repetitions, in fp32 with the faster of MKL "
        "and oneDNN; products with the vocabulary on as many rows as give 64 million outputs. The peak is the fastest of them, "
        "measured anew after each of as many further steps as the comparison took; peak and step are medians, and the last "
        "column, which has the threshold, is the median of the steps' own ratios.\n\n"
    ) + _table([*header, "step, ms", "step / at peak"], rows)


def _growth(found: Sequence[Growth]) -> str:
    base, rows = GROWTH_BASE, []
    for g in found:
        cells = [g.symbol, g.side, ", ".join(f"{s:,}" for s in g.sizes), ", ".join(f"{1e3 * s:,.0f}" for s in g.seconds)]
        cells += [", ".join(f"{m / 1e6:,.0f}" for m in g.added)]
        cells += [f"{e:.2f}" for e in (g.time_exponent, g.memory_exponent, g.flops_exponent)]
        rows.append([*cells, str(g.degree), "within" if g.within else "**above**"])
    header = ["size", "side", "values", "step, ms", "memory, MB", "time exponent", "memory exponent", "FLOPs", "degree", ""]
    return (
        f"One size at a time from T {base.num_tokens:,}, A {base.num_anchors}, V {base.vocab_size:,}, D {base.hidden_size}, "
        f"{base.num_layers} layers, fp32, loss `own`; MLP 4 D wide. Exponents are slopes of least-squares lines through the "
        "logarithms; `FLOPs` is the exponent of the formula above over the same sizes; the degree is this size's highest power "
        f"in the arithmetic, which neither exponent may exceed (by more than {FIT_TOLERANCE:g}).\n\n"
    ) + _table(header, rows)


def _stages(run: Run) -> str:
    names, rows = ("anchors", "draft", "loss", "backward"), []
    for own in (results[OWN] for results in run.cases if results[OWN].stages):
        times = [f"{1e3 * statistics.median(own.stages[name]):.1f}" for name in names]
        rows.append([own.case.shape.name, own.case.dtype, own.case.objective, *times])
    return _table(["shape", "dtype", "loss", *(f"{name}, ms" for name in names)], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(header, rows))


def _title(case: Case) -> str:
    return f"{case.shape.name}, {case.dtype}, {case.objective}"


def _time(measured: Measured | None) -> str:
    if measured is None or step_seconds(measured) is None:
        return "-" if measured is None else "did not run"
    low, high = middle_half(measured)
    return f"{1e3 * step_seconds(measured):.1f} [{1e3 * low:.1f}, {1e3 * high:.1f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
