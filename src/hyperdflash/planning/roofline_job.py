"""Writes the roofline of DeepSeek-V4-Flash: roofline.md, .csv, .json and .png.

python -m src.roofline
python -m src.roofline gpu=b200 context=65536 batch=[1,8,64]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import entry_point
from hyperdflash.planning.roofline import GPU, Method, Setting, Work, total_seconds
from hyperdflash.planning.v4_sizes import active_parameters, checkpoint_bytes, total_parameters
from hyperdflash.report.results import csv_text, write_report
from hyperdflash.report.tables import Block, Table, markdown, number_text
from hyperdflash.settings import one_of


def setting_of(config: DictConfig) -> Setting:
    """Checks conf/roofline.yaml; ValueError in one sentence."""
    if not OmegaConf.is_list(config.batch):
        raise ValueError(f"batch must be a list such as [1,8], got {config.batch!r}")
    drafter = instantiate(config.drafter)
    if not drafter.reads_conditioning:
        raise ValueError("drafter must be a block drafter's sizes (drafter=paper); the MTP block's are the model's own")
    one_of("gpu", config.gpu, tuple(config.gpus))
    return Setting(
        model=config.model_name,
        sizes=instantiate(config.model, _convert_="all"),
        drafter=drafter,
        gpu=GPU(name=config.gpu, count=config.num_gpus, **config.gpus[config.gpu]),
        methods=tuple(Method(**method) for method in config.methods),
        source=config.source,
        batches=tuple(config.batch),
        context=config.context,
        max_tokens=config.max_tokens,
    )


def write_roofline(setting: Setting, out: Path | str) -> list[Path]:
    """Writes roofline.md, roofline.csv, roofline.json and roofline.png into ``out``."""
    from hyperdflash.planning.roofline_figure import roofline_figure  # needs matplotlib

    record = roofline_record(setting)
    rows = record["verification"]
    contents = {
        "roofline.md": markdown(roofline_blocks(setting)),
        "roofline.csv": csv_text(rows[0], (row.values() for row in rows)),
        "roofline.json": record,
    }
    return [*write_report(out, contents), roofline_figure(setting, Path(out) / "roofline.png")]


def roofline_record(setting: Setting) -> dict:
    """Returns JSON values: bytes, FLOPs and least time of every verification, and a round of every published method."""
    sizes = setting.sizes
    verification = []
    for batch in setting.batches:
        for n in setting.counts:
            works = setting.works(n, batch)
            row = {"batch": batch, "n": n, "experts": sizes.distinct_experts(n * batch)}
            row |= {"gigabytes": _gigabytes(works), "gigaflops": _gigaflops(works), "ms": 1e3 * setting.verify_s(n, batch)}
            row |= {"over_one": setting.ratio(n, batch), "over_one_same_experts": setting.ratio(n, batch, True)}
            verification.append(row)
    terms = ("draft_s", "verify_s", "ar_s", "drafter_share", "speedup")
    rounds = [
        {"method": method.name, "batch": batch, "same_experts": same} | {name: getattr(found, name) for name in terms}
        for method in setting.methods
        for batch in setting.batches
        for same in (False, True)
        for found in [setting.round(method, batch, same)]
    ]
    return {
        "setting": asdict(setting),
        "total_parameters": total_parameters(sizes),
        "active_parameters": active_parameters(sizes),
        "checkpoint_bytes": checkpoint_bytes(sizes),
        "verification": verification,
        "rounds": rounds,
    }


def roofline_blocks(setting: Setting) -> list[Block]:
    """Returns three tables, parts of a forward, cost of n tokens and predicted speedups, and what they assume."""
    sizes, first = setting.sizes, setting.batches[0]
    return [
        f"### Roofline: {setting}",
        f"{total_parameters(sizes) / 1e9:.1f}B parameters, {active_parameters(sizes) / 1e9:.1f}B active per token, "
        f"{checkpoint_bytes(sizes) / 1e9:.1f} GB on disk with the MTP block.",
        f"What one forward reads and how long it takes at least, batch size {first}:",
        _parts(setting),
        f"Verifying n tokens per row; first columns at batch size {first}, then the time relative to n = 1:",
        _counts(setting),
        "Speedup that τ · T_ar / (T_draft + T_verify) predicts for published τ:",
        _methods(setting),
        "Time of a part: max(bytes / bandwidth, FLOPs / dense peak); parts one after the other, divided evenly over the GPUs. "
        "Weights in the checkpoint's formats (FP4 experts, FP8, BF16 and FP32 exceptions), read once per forward; routed "
        "experts: the expected distinct ones when every token draws its own uniformly; same experts: the tokens of a row "
        "share one draw. Real routing lies between. Left out: activations, sampling, traffic between GPUs, kernel launches, "
        "scheduling. So every time is a lower bound, and a speedup a ratio of lower bounds, not the forecast of an engine. MTP "
        "chains its steps, each reading block and LM head anew; a block drafter has "
        f"{setting.drafter.num_layers} layers in BF16 (its real shape is not published). Published: {setting.source}.",
    ]


def _parts(setting: Setting) -> Table:
    counts = (1, setting.methods[-1].slots + 1)
    found = [setting.works(n, setting.batches[0]) for n in counts]

    def cells(works: Sequence[Work], bound: str) -> list[str]:
        time = _ms(total_seconds(works, setting.gpu))
        return [number_text(_gigabytes(works)), number_text(_gigaflops(works), 1), time, bound]

    def bound(work: Work) -> str:
        return "memory" if work.memory_s(setting.gpu) >= work.compute_s(setting.gpu) else "compute"

    rows = [[own[0].part, *(text for work in own for text in cells([work], bound(work)))] for own in zip(*found, strict=True)]
    rows.append(["all", *(text for works in found for text in cells(works, ""))])
    return Table(["Part", *(text for n in counts for text in (f"GB, n = {n}", "GFLOP", "ms", "bound by"))], rows)


def _counts(setting: Setting) -> Table:
    first = setting.batches[0]
    header = ["n", "experts per layer", "GB", "GFLOP", "ms", *(f"b = {batch}" for batch in setting.batches)]
    rows = []
    for n in setting.counts:
        works = setting.works(n, first)
        row = [str(n), number_text(setting.sizes.distinct_experts(n * first), 1)]
        row += [number_text(_gigabytes(works), 1), number_text(_gigaflops(works), 1), _ms(setting.verify_s(n, first))]
        row += [number_text(setting.ratio(n, batch)) for batch in setting.batches]
        rows.append([*row, number_text(setting.ratio(n, first, True))])
    return Table([*header, f"b = {first}, same experts"], rows)


def _methods(setting: Setting) -> Table:
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
    return Table([*header, "predicted", "predicted, same experts"], rows)


def _gigabytes(works: Sequence[Work]) -> float:
    return sum(work.bytes for work in works) / 1e9


def _gigaflops(works: Sequence[Work]) -> float:
    return sum(work.fp8_flops + work.bf16_flops for work in works) / 1e9


def _ms(seconds: float) -> str:
    return number_text(1e3 * seconds, 3)


@entry_point("roofline")
def main(config: DictConfig) -> None:
    setting, out = setting_of(config), Path(config.out)
    written = write_roofline(setting, out)
    print((out / "roofline.md").read_text())
    print(f"wrote {', '.join(map(str, written))}")
