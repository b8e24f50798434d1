"""Writes the roofline of DeepSeek-V4-Flash: roofline.md, roofline.json and roofline.png (conf/roofline.yaml has examples)."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hyperdflash.files import read_json
from hyperdflash.identity import class_name, reads_conditioning, runs_dir
from hyperdflash.options import instantiate
from hyperdflash.planning.roofline import GPU, Method, Setting, total_seconds, verification
from hyperdflash.planning.v4_sizes import active_parameters, checkpoint_bytes, total_parameters
from hyperdflash.report.bootstrap import MEAN, Estimate
from hyperdflash.report.figures import passes_figure
from hyperdflash.report.results import AS_SHIPPED, write_report
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
        methods=measured_methods(Path(config["from"])) if config["from"] else tuple(Method(**m) for m in config.methods),
        source=f"measured, {config['from']}, temperature 0" if config["from"] else config.source,
        batches=tuple(config.batch),
        context=config.context,
        max_tokens=config.max_tokens,
    )


def measured_methods(folder: Path) -> tuple[Method, ...]:
    """Returns the methods of the evaluation in ``folder``, with tau as measured at temperature 0 and parts as their runs have
    them; ValueError where there is no such evaluation or run."""
    by_decoding = (folder / "evaluation.json").exists()
    path = folder / ("evaluation.json" if by_decoding else "metrics.json")
    if not path.exists():
        raise ValueError(f"from={folder} has no metrics.json: run `python -m src.evaluate out={folder}` first")
    record = read_json(path, "run `python -m src.evaluate` again", "runs")
    rows = _greedy_means(folder / ("paper.csv" if by_decoding else "acceptance.csv"))
    methods = []
    for name, run in record["runs"].items():
        own = [row for row in rows if row["method"] == name]
        tau = next((float(row["value"]) for row in own if row["metric"] == "tau"), None)
        if tau is None:
            continue
        slots = sum(row["metric"] == "survival" for row in own)
        counts = {int(count): rounds for count, rounds in record.get("drafted", {}).get(name, {}).items()}
        drafted = {count: rounds / sum(counts.values()) for count, rounds in counts.items()}
        method = Method(name=name, drafter="mtp", slots=slots, tau=tau, drafted=drafted)
        methods.append(method if run == AS_SHIPPED else _with_parts(method, runs_dir() / "train" / run / "config.yaml"))
    if not methods:
        raise ValueError(f"from={folder} has no method at temperature 0: run `python -m src.evaluate temperature=[0]`")
    return tuple(methods)


def _with_parts(method: Method, path: Path) -> Method:
    """Adds the draft head, the lead and the reducer of the run whose configuration is ``path``. Any reducer but fc counts as
    the paper's gate."""
    if not path.exists():
        raise ValueError(f"{method.name} was measured from a run that is gone, {path.parent}: evaluate again")
    config = OmegaConf.load(path)
    head = class_name(config.head)
    sizes = {name: config.head[name] for name in ("rank", "expansion", "state") if name in config.head}
    if not reads_conditioning(config.drafter):
        return replace(method, head=head, **sizes)
    lead = config.lead.steps if config.get("lead") else 0
    reducer = "fc" if class_name(config.reducer) == "fc" else "hc_gate"
    return replace(method, drafter="block", reducer=reducer, lead=lead, head=head, **sizes)


def measured_speedups(folder: Path) -> dict[str, Estimate]:
    """Returns method -> mean speedup at temperature 0 of the evaluation by decoding in ``folder``; ValueError without one."""
    if not (folder / "paper.csv").exists():
        decoding = f"python -m src.evaluate by=decoding temperature=[0] out={folder}"
        raise ValueError(f"measured={folder} has no paper.csv: run `{decoding}`")
    rows = [row for row in _greedy_means(folder / "paper.csv") if row["metric"] == "speedup"]
    return {row["method"]: Estimate(*(float(row[name] or "nan") for name in ("value", "low", "high"))) for row in rows}


def _greedy_means(path: Path) -> list[dict[str, str]]:
    """Returns the lines of an evaluation's record at temperature 0 that are means over domains."""
    with path.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if (row["group"], float(row["temperature"])) == (MEAN, 0)]


def roofline_record(setting: Setting) -> dict:
    """Returns JSON values: bytes, FLOPs and least time of every verification, and a round of every published method."""
    sizes, counts, rounds = setting.sizes, [], []
    for batch in setting.batches:
        for n in range(1, setting.max_tokens + 1):
            works = verification(sizes, n, batch, setting.context)
            row = {"batch": batch, "n": n, "experts": sizes.distinct_experts(n * batch)}
            row |= {"gigabytes": sum(w.bytes for w in works) / 1e9, "ms": 1e3 * total_seconds(works, setting.gpu)}
            row |= {"gigaflops": sum(w.fp8_flops + w.bf16_flops for w in works) / 1e9}
            row |= {"over_one": setting.ratio(n, batch), "over_one_same_experts": setting.ratio(n, batch, True)}
            counts.append(row)
    for method in setting.methods:
        for batch in setting.batches:
            for same in (False, True):
                row = {"method": method.name, "batch": batch, "same_experts": same}
                rounds.append({**row, **setting.round(method, batch, same)})
    totals = {f.__name__: f(sizes) for f in (total_parameters, active_parameters, checkpoint_bytes)}
    return {"setting": asdict(setting), **totals, "verification": counts, "rounds": rounds}


def roofline_blocks(setting: Setting, record: dict, measured: Mapping[str, Estimate]) -> list[Block]:
    """Returns two tables, cost of n tokens and predicted speedups (beside ``measured`` ones), and what they assume."""
    first = setting.batches[0]
    return [
        f"### Roofline: {setting}",
        f"{record['total_parameters'] / 1e9:.1f}B parameters, {record['active_parameters'] / 1e9:.1f}B active per token, "
        f"{record['checkpoint_bytes'] / 1e9:.1f} GB on disk with the MTP block.",
        f"Verifying n tokens per row; first columns at batch size {first}, then the time relative to n = 1:",
        _counts(setting, record["verification"]),
        "Speedup that τ · T_ar / (T_draft + T_verify) predicts:",
        _methods(setting, record["rounds"], measured),
        "Time of a part: max(bytes / bandwidth, FLOPs / dense peak); parts one after the other, divided evenly over the GPUs. "
        "Weights in the checkpoint's formats (FP4 experts, FP8, BF16 and FP32 exceptions), read once per forward; routed "
        "experts: the expected distinct ones when every token draws its own uniformly; same experts: the tokens of a row "
        "share one draw. Real routing lies between. Left out: activations, sampling, traffic between GPUs, kernel launches, "
        "scheduling. So every time is a lower bound, and a speedup a ratio of lower bounds, not the forecast of an engine. MTP "
        "chains its steps, each reading block and LM head anew; a block drafter has "
        f"{setting.drafter.num_layers} layers in BF16 (its real shape is not published). τ: {setting.source}.",
    ]


def _counts(setting: Setting, verification: Sequence[dict]) -> Table:
    first, at = setting.batches[0], {(row["batch"], row["n"]): row for row in verification}
    rows = []
    for own in (row for row in verification if row["batch"] == first):
        cells = [str(own["n"]), *(number_text(own[name], 1) for name in ("experts", "gigabytes", "gigaflops"))]
        cells += [number_text(own["ms"], 3), *(number_text(at[batch, own["n"]]["over_one"]) for batch in setting.batches)]
        rows.append([*cells, number_text(own["over_one_same_experts"])])
    header = ["n", "experts per layer", "GB", "GFLOP", "ms", *(f"b = {batch}" for batch in setting.batches)]
    return Table([*header, f"b = {first}, same experts"], rows)


def _methods(setting: Setting, rounds: Sequence[dict], measured: Mapping[str, Estimate]) -> Table:
    header = ["Method", "τ", "measured here" if measured else "published speedup", "batch", "T_draft, ms", "T_verify, ms"]
    header += ["T_ar, ms", "drafter's share", "predicted", "predicted, same experts"]
    rows, methods = [], {method.name: method for method in setting.methods}

    def speedup(method: Method) -> str:
        known = measured[method.name].value if method.name in measured else method.speedup
        return "" if known is None else f"{number_text(known)}×"

    for own, same in zip(rounds[::2], rounds[1::2], strict=True):
        method = methods.pop(own["method"], None)  # named in the first of its rows
        shown = [method.name, number_text(method.tau), speedup(method)] if method else ["", "", ""]
        times = (number_text(1e3 * own[part], 3) for part in ("draft_s", "verify_s", "ar_s"))
        speedups = (f"{number_text(row['speedup'])}×" for row in (own, same))
        rows.append([*shown, str(own["batch"]), *times, f"{own['drafter_share']:.0%}", *speedups])
    return Table(header, rows)


def roofline_figure(setting: Setting, rounds: Sequence[dict], measured: Mapping[str, Estimate], path: Path) -> Path:
    """Draws tau, ``measured`` and predicted speed against sequential passes."""
    speedups: dict[str, dict[str, Estimate]] = {"Measured here, batch 1": dict(measured)} if measured else {}
    for own, same in zip(rounds[::2], rounds[1::2], strict=True):
        panel = speedups.setdefault(f"Predicted, batch {own['batch']}", {})
        panel[own["method"]] = Estimate(own["speedup"], own["speedup"], same["speedup"])
    points = "predicted: every token draws its own experts; bars end where the tokens of a row share one draw"
    taus = {method.name: (method.passes, method.tau) for method in setting.methods}
    title = f"Drafting passes, tau and predicted speed, {setting.model}"
    return passes_figure(taus, speedups, path, title, [f"{setting}; tau: {setting.source}", points])


def write_roofline(config: DictConfig) -> None:
    """Writes roofline.md, .json and .png in ``config.out`` and prints the first; with ``from`` the speedups alone."""
    setting = setting_of(config)
    measured = measured_speedups(Path(config.measured)) if config.measured else {}
    record = roofline_record(setting) | {"measured": {name: own.value for name, own in measured.items()}}
    blocks = roofline_blocks(setting, record, measured)
    text = markdown([blocks[0], *blocks[-3:]] if config["from"] else blocks)
    written = write_report(config.out, {"roofline.md": text, "roofline.json": record})
    written.append(roofline_figure(setting, record["rounds"], measured, Path(config.out) / "roofline.png"))
    print(f"{text}\nwrote {', '.join(map(str, written))}")
