"""A roofline as Markdown, CSV and JSON, and all of it written to a folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hyperdflash.planning.roofline import Setting, Work, total_seconds
from hyperdflash.planning.roofline_figure import roofline_figure
from hyperdflash.planning.v4_sizes import active_parameters, checkpoint_bytes, total_parameters
from hyperdflash.report.tables import jsonable, markdown_table, number_text


def write_roofline(setting: Setting, out: Path | str) -> list[Path]:
    """Writes roofline.md, roofline.csv, roofline.json and roofline.png into ``out``."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "roofline.md": roofline_markdown(setting),
        "roofline.csv": roofline_csv(setting),
        "roofline.json": json.dumps(roofline_dict(setting), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text)
    return [*(out / name for name in texts), roofline_figure(setting, out / "roofline.png")]


def roofline_markdown(setting: Setting) -> str:
    """Three tables: parts of a forward, cost of n tokens, predicted speedups; and what they assume."""
    sizes = setting.sizes
    totals = (
        f"{total_parameters(sizes) / 1e9:.1f}B parameters, {active_parameters(sizes) / 1e9:.1f}B active a token, "
        f"{checkpoint_bytes(sizes) / 1e9:.1f} GB on disk with the MTP block."
    )
    return "\n".join(
        [
            f"### Roofline: {setting}",
            "",
            totals,
            "",
            f"What one forward reads and how long it takes at least, batch size {setting.batches[0]}:",
            "",
            *_part_rows(setting),
            "",
            f"Verifying n tokens a row; first columns at batch size {setting.batches[0]}, then the time relative to n = 1:",
            "",
            *_count_rows(setting),
            "",
            "Speedup that τ · T_ar / (T_draft + T_verify) predicts for published τ:",
            "",
            *_method_rows(setting),
            "",
            _notes(setting),
            "",
        ]
    )


def roofline_csv(setting: Setting) -> str:
    """A row a batch size and n: what verification reads, computes and takes at least."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["batch", "n", "experts", "gigabytes", "gigaflops", "ms", "over_one", "over_one_same_experts"])
    for batch in setting.batches:
        for n in setting.counts:
            works = setting.works(n, batch)
            row = (setting.sizes.distinct_experts(n * batch), _gigabytes(works), _gigaflops(works))
            times = (1e3 * total_seconds(works, setting.gpu), setting.ratio(n, batch), setting.ratio(n, batch, True))
            writer.writerow([batch, n, *(f"{value:.6f}" for value in (*row, *times))])
    return out.getvalue()


def roofline_dict(setting: Setting) -> dict:
    """Plain JSON values."""
    rounds = [
        {
            "method": method.name,
            "batch": batch,
            "same_experts": same,
            "draft_s": found.draft_s,
            "verify_s": found.verify_s,
            "ar_s": found.ar_s,
            "drafter_share": found.drafter_share,
            "speedup": found.speedup,
        }
        for method in setting.methods
        for batch in setting.batches
        for same in (False, True)
        for found in [setting.round(method, batch, same)]
    ]
    return jsonable(
        {
            "setting": asdict(setting),
            "total_parameters": total_parameters(setting.sizes),
            "active_parameters": active_parameters(setting.sizes),
            "checkpoint_bytes": checkpoint_bytes(setting.sizes),
            "verification": [
                {"batch": batch, "n": n, "parts": [asdict(work) for work in setting.works(n, batch)]}
                for batch in setting.batches
                for n in setting.counts
            ],
            "rounds": rounds,
        }
    )


def _part_rows(setting: Setting) -> list[str]:
    counts = (1, setting.methods[-1].slots + 1)
    found = [setting.works(n, setting.batches[0]) for n in counts]
    header = ["Part", *(text for n in counts for text in (f"GB, n = {n}", "GFLOP", "ms", "bound by"))]

    def cells(work: Work) -> list[str]:
        bound = "memory" if work.memory_s(setting.gpu) >= work.compute_s(setting.gpu) else "compute"
        return [number_text(_gigabytes([work])), number_text(_gigaflops([work]), 1), _ms(work.seconds(setting.gpu)), bound]

    rows = [[works[0].part, *(text for work in works for text in cells(work))] for works in zip(*found, strict=True)]
    sums = [
        text
        for works in found
        for text in (
            number_text(_gigabytes(works)),
            number_text(_gigaflops(works), 1),
            _ms(total_seconds(works, setting.gpu)),
            "",
        )
    ]
    return markdown_table(header, [*rows, ["all", *sums]])


def _count_rows(setting: Setting) -> list[str]:
    first = setting.batches[0]
    header = ["n", "experts a layer", "GB", "GFLOP", "ms", *(f"b = {batch}" for batch in setting.batches)]
    rows = []
    for n in setting.counts:
        works = setting.works(n, first)
        row = [str(n), number_text(setting.sizes.distinct_experts(n * first), 1)]
        row += [number_text(_gigabytes(works), 1), number_text(_gigaflops(works), 1), _ms(total_seconds(works, setting.gpu))]
        row += [number_text(setting.ratio(n, batch)) for batch in setting.batches]
        rows.append([*row, number_text(setting.ratio(n, first, True))])
    return markdown_table([*header, f"b = {first}, same experts"], rows)


def _method_rows(setting: Setting) -> list[str]:
    header = ["Method", "τ", "published speedup", "batch", "T_draft, ms", "T_verify, ms", "T_ar, ms", "drafter's share"]
    rows = []
    for method in setting.methods:
        shown = [method.name, number_text(method.tau), f"{number_text(method.speedup)}×"]
        for batch in setting.batches:
            found, same = setting.round(method, batch), setting.round(method, batch, True)
            times = map(_ms, (found.draft_s, found.verify_s, found.ar_s))
            speedups = (f"{number_text(value)}×" for value in (found.speedup, same.speedup))
            rows.append([*shown, str(batch), *times, f"{found.drafter_share:.0%}", *speedups])
            shown = ["", "", ""]
    return markdown_table([*header, "predicted", "predicted, same experts"], rows)


def _notes(setting: Setting) -> str:
    return (
        "Time of a part: max(bytes / bandwidth, FLOPs / dense peak); parts one after the other, divided evenly over the GPUs. "
        "Weights in the checkpoint's formats (FP4 experts, FP8, BF16 and FP32 exceptions), read once a forward; routed "
        "experts: the expected distinct ones when every token draws its own uniformly; same experts: the tokens of a row "
        "share one draw. Real routing lies between. Left out: activations, sampling, traffic between GPUs, kernel launches, "
        "scheduling. So every time is a lower bound, and a speedup a ratio of lower bounds, not the forecast of an engine. MTP "
        "chains its steps, each reading block and LM head anew; a block drafter has "
        f"{setting.drafter.num_layers} layers in BF16 (its real shape is not published). Published: {setting.source}."
    )


def _gigabytes(works: Sequence[Work]) -> float:
    return sum(work.bytes for work in works) / 1e9


def _gigaflops(works: Sequence[Work]) -> float:
    return sum(work.fp8_flops + work.bf16_flops for work in works) / 1e9


def _ms(seconds: float) -> str:
    return number_text(1e3 * seconds, 3)
