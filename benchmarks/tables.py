"""What a bench run found, as Markdown, CSV and JSON. Median times, decimal megabytes, ratios of this run alone."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.duel import Measured, Terms
from benchmarks.flops import FORMULA, step_flops
from benchmarks.shapes import GROWTH_BASE, Case
from benchmarks.verdict import (
    FIT_TOLERANCE,
    Bar,
    Growth,
    added_bytes,
    bars,
    growths,
    middle_half,
    over_peak,
    ratio,
    seconds_at_own_rates,
    slots_per_second,
    step_seconds,
)

OWN, PEER = "this project", "speculators"

WHAT_IS_MEASURED = """\
A step is forward, loss and backward, no optimiser. Both sides: one document, the same token ids, states and dtype (bf16:
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
    """Everything a bench run measured. ``cases`` a side's name -> result each; ``growth`` shapes of each axis, and results."""

    terms: Terms
    environment: dict
    machine: dict
    cases: list[dict[str, Measured]] = field(default_factory=list)
    growth_axes: dict = field(default_factory=dict)
    growth: dict = field(default_factory=dict)

    def bars(self) -> list[Bar]:
        """Of the cases with this project's own loss."""
        compared = [results for results in self.cases if results[OWN].case.objective == "own"]
        return [bar for results in compared for bar in bars(results[OWN], results.get(PEER))]

    def growths(self) -> list[Growth]:
        return growths(self.growth, self.growth_axes)


def markdown(run: Run) -> str:
    parts = [
        "# The training step's speed and memory\n",
        f"`{run.environment['command']}`\n",
        _machine(run),
        "## What is measured\n\n" + WHAT_IS_MEASURED + "\n",
        "## Speed and memory\n\n" + _comparison(run),
        "## Bars\n\n" + bar_table(run.bars()) + "\n![Ratios beside their bars](bars.png)\n",
        "## Matrix products\n\n```\n" + FORMULA + "\n```\n\n" + _matmuls(run),
    ]
    if run.growth:
        parts.append("## Growth\n\n" + _growth(run.growths()) + "\n![Growth on logarithmic axes](growth.png)\n")
    parts.append("## Where the time goes\n\n" + _stages(run) + _operators(run))
    return "\n".join(parts)


def rows(run: Run) -> list[dict]:
    """One flat record a case and side, growth's too; what the CSV holds."""
    found = []
    for study, results in [("shapes", r) for r in run.cases] + [("growth", r) for r in run.growth.values()]:
        for side, measured in results.items():
            case = measured.case
            found.append(
                {
                    "study": study,
                    "side": side,
                    "dtype": case.dtype,
                    "loss": case.objective,
                    **asdict(case.shape),
                    "step_s": step_seconds(measured),
                    "slots_per_s": slots_per_second(measured),
                    "added_bytes": added_bytes(measured),
                    "imports_bytes": measured.imports_bytes,
                    "built_bytes": measured.built_bytes,
                    "peak_bytes": measured.peak_bytes,
                    "step_flops": step_flops(case),
                    "matmul_s_at_own_rates": seconds_at_own_rates(measured),
                    "step_over_matmul_at_peak": over_peak(measured),
                    "error": measured.error,
                }
            )
    return found


def csv_text(run: Run) -> str:
    records, text = rows(run), io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def record(run: Run) -> dict:
    """Every step of every case, for json."""

    def plain(results: dict[str, Measured]) -> dict:
        return {side: {**asdict(measured), "step_s": step_seconds(measured)} for side, measured in results.items()}

    return {
        "environment": run.environment,
        "machine": run.machine,
        "terms": asdict(run.terms),
        "cases": [plain(results) for results in run.cases],
        "bars": [{**asdict(bar), "met": bar.met} for bar in run.bars()],
        "growth": [plain(results) for results in run.growth.values()],
        "exponents": [{**asdict(g), "within": g.within} for g in run.growths()],
    }


def bar_table(found: Sequence[Bar]) -> str:
    lines = ["| bar | shape | dtype | measured | bound | |", "| --- | --- | --- | ---: | ---: | --- |"]
    for bar in sorted(found, key=lambda bar: bar.name):
        sign = "at least" if bar.at_least else "at most"
        verdict = {True: "met", False: "**not met**", None: "cannot be said"}[bar.met]
        note = f" ({bar.note})" if bar.note else ""
        lines.append(
            f"| {bar.name} | {bar.case.shape.name} | {bar.case.dtype} | {_number(bar.value, '{:.2f}')} | "
            f"{sign} {bar.bound:.2f} | {verdict}{note} |"
        )
    return "\n".join(lines) + "\n"


def _machine(run: Run) -> str:
    versions = {side: m.versions for results in run.cases for side, m in results.items() if m.versions}
    lines = [f"- {run.machine['cpu']}, {run.machine['cores']} cores, {run.terms.threads} threads a process"]
    lines += [f"- {side}: {', '.join(f'{name} {v}' for name, v in packages.items())}" for side, packages in versions.items()]
    more = (
        f", more where they take less than {run.terms.least_s:g} s together (in growth half of both)"
        if run.terms.least_s
        else ""
    )
    lines.append(
        f"- {run.terms.rounds} measured steps a side and case after {run.terms.warm_up} others{more}; a process may allocate "
        f"{run.terms.memory_bytes / 2**30:g} GiB"
    )
    busy = run.machine["load_before"], run.machine.get("load_after")
    lines.append(f"- load average over the minute before the run {busy[0]:.2f}, at its end {_number(busy[1], '{:.2f}')}")
    return "\n".join(lines) + "\n"


def _comparison(run: Run) -> str:
    lines = [
        "| shape | dtype | loss | steps | ours, ms | speculators, ms | ours, slots/s | speculators, slots/s | speed ratio | "
        "ours, MB | speculators, MB | memory ratio |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    failures = []
    for results in run.cases:
        own, peer = results[OWN], results.get(PEER)
        case = own.case
        cells = [case.shape.name, case.dtype, case.objective, f"{len(own.seconds)}"]
        cells += [_time(own), _time(peer)]
        speeds = slots_per_second(own), peer and slots_per_second(peer)
        memory = added_bytes(own), peer and added_bytes(peer)
        cells += [_number(s, "{:,.0f}") for s in speeds] + [_number(ratio(*speeds), "{:.2f}")]
        cells += [_number(m and m / 1e6, "{:,.0f}") for m in memory] + [_number(ratio(*memory), "{:.2f}")]
        lines.append("| " + " | ".join(cells) + " |")
        failures += [f"- {side}, {_title(case)}: {m.error}" for side, m in results.items() if m.error]
        if own.extras_error:
            failures.append(f"- rates or profile, {_title(case)}: {own.extras_error}")
    text = "\n".join(lines) + "\n\nTimes are medians, with the middle half of the steps in brackets.\n"
    imports = {side: m.imports_bytes for results in run.cases for side, m in results.items() if m.imports_bytes}
    text += "Imports alone: " + ", ".join(f"{side} {value / 1e6:,.0f} MB" for side, value in imports.items()) + ".\n"
    return text + ("\nDid not run:\n\n" + "\n".join(failures) + "\n" if failures else "")


def _matmuls(run: Run) -> str:
    lines = [
        "| shape | dtype | loss | GFLOP | peak, GFLOP/s | at | FLOPs at peak, ms | each at its own rate, ms | step, ms | "
        "step / at peak |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for own in (results[OWN] for results in run.cases if results[OWN].beside_peak):
        best = max(own.rates, key=lambda rate: rate["flops_per_s"])
        step_s, peak = (statistics.median(values) for values in zip(*own.beside_peak, strict=True))
        batch, rows_, inner, columns = best["sizes"]
        size = (f"{batch} x " if batch > 1 else "") + f"[{rows_}, {inner}] [{inner}, {columns}]"
        lines.append(
            f"| {own.case.shape.name} | {own.case.dtype} | {own.case.objective} | {step_flops(own.case) / 1e9:.2f} | "
            f"{peak / 1e9:,.0f} | {best['name']}, {best['part']}: {size} | {1e3 * step_flops(own.case) / peak:.1f} | "
            f"{1e3 * seconds_at_own_rates(own):.1f} | {1e3 * step_s:.1f} | {over_peak(own):.2f} |"
        )
    text = (
        "Every product is measured at its own size and layout, the best of several repetitions, in fp32 with the faster of MKL "
        "and oneDNN; products with the vocabulary on as many rows as give 64 million outputs. The peak is the fastest of them, "
        "measured anew after each of as many further steps as the comparison took; peak and step are medians, and the last "
        "column, which has the bar, is the median of the steps' own ratios.\n\n"
    )
    return text + "\n".join(lines) + "\n"


def _growth(found: Sequence[Growth]) -> str:
    base = GROWTH_BASE
    lines = [
        f"One size at a time from T {base.num_tokens:,}, A {base.num_anchors}, V {base.vocab_size:,}, D {base.hidden_size}, "
        f"{base.num_layers} layers, fp32, loss `own`; MLP 4 D wide. Exponents are slopes of least-squares lines through the "
        "logarithms; `FLOPs` is the exponent of the formula above over the same sizes; the degree is this size's highest power "
        f"in the arithmetic, which neither exponent may exceed (by more than {FIT_TOLERANCE:g}).\n",
        "| size | side | values | step, ms | memory, MB | time exponent | memory exponent | FLOPs | degree | |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for g in found:
        lines.append(
            f"| {g.symbol} | {g.side} | {', '.join(f'{s:,}' for s in g.sizes)} | "
            f"{', '.join(f'{1e3 * s:,.0f}' for s in g.seconds)} | {', '.join(f'{m / 1e6:,.0f}' for m in g.added)} | "
            f"{g.time_exponent:.2f} | {g.memory_exponent:.2f} | {g.flops_exponent:.2f} | {g.degree} | "
            f"{'within' if g.within else '**above**'} |"
        )
    return "\n".join(lines) + "\n"


def _stages(run: Run) -> str:
    lines = ["| shape | dtype | loss | anchors, ms | draft, ms | loss, ms | backward, ms |", "|" + " --- |" * 3 + " ---: |" * 4]
    for own in (results[OWN] for results in run.cases if results[OWN].stages):
        times = [statistics.median(own.stages[name]) for name in ("anchors", "draft", "loss", "backward")]
        cells = [own.case.shape.name, own.case.dtype, own.case.objective, *(f"{1e3 * t:.1f}" for t in times)]
        lines.append("| " + " | ".join(cells) + " |")
    return "This project's step by stage, medians:\n\n" + "\n".join(lines) + "\n"


def _operators(run: Run, most: int = 12) -> str:
    text = ""
    for own in (results[OWN] for results in run.cases if results[OWN].operators):
        total = sum(row["seconds"] for row in own.operators)
        text += f"\nOperators of {_title(own.case)}, their own time a step (under the profiler, {1e3 * total:.0f} ms):\n\n"
        text += "| operator | ms | share | calls |\n| --- | ---: | ---: | ---: |\n"
        for row in own.operators[:most]:
            share = row["seconds"] / total
            text += f"| {row['operator']} | {1e3 * row['seconds']:.1f} | {share:.0%} | {row['calls']:.0f} |\n"
    return text


def _title(case: Case) -> str:
    return f"{case.shape.name}, {case.dtype}, {case.objective}"


def _time(measured: Measured | None) -> str:
    if measured is None or step_seconds(measured) is None:
        return "-" if measured is None else "did not run"
    low, high = middle_half(measured)
    return f"{1e3 * step_seconds(measured):.1f} [{1e3 * low:.1f}, {1e3 * high:.1f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
