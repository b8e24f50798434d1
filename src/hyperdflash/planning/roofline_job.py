"""Writes the roofline of DeepSeek-V4-Flash: roofline.md and roofline.json (conf/roofline.yaml has examples)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hyperdflash.files import read_json
from hyperdflash.identity import class_name, reads_conditioning, runs_dir
from hyperdflash.options import instantiate
from hyperdflash.planning.roofline import GPU, Method, Setting, total_seconds, verification
from hyperdflash.planning.v4_sizes import active_parameters, checkpoint_bytes, total_parameters
from hyperdflash.report.bootstrap import MEAN
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
    path = folder / "metrics.json"
    if not path.exists():
        raise ValueError(f"from={folder} has no metrics.json: run `python -m src.evaluate out={folder}` first")
    record = read_json(path, "run `python -m src.evaluate` again", "runs", "rows")
    methods = []
    for name, run in record["runs"].items():
        rows = [r for r in record["rows"] if (r["method"], r["temperature"], r["group"]) == (name, 0, MEAN)]
        tau = next((row["value"] for row in rows if row["metric"] == "tau"), None)
        if tau is None:
            continue
        method = Method(name=name, drafter="mtp", slots=sum(row["metric"] == "survival" for row in rows), tau=tau)
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


def roofline_blocks(setting: Setting, record: dict) -> list[Block]:
    """Returns two tables, cost of n tokens and predicted speedups, and what they assume."""
    first = setting.batches[0]
    return [
        f"### Roofline: {setting}",
        f"{record['total_parameters'] / 1e9:.1f}B parameters, {record['active_parameters'] / 1e9:.1f}B active per token, "
        f"{record['checkpoint_bytes'] / 1e9:.1f} GB on disk with the MTP block.",
        f"Verifying n tokens per row; first columns at batch size {first}, then the time relative to n = 1:",
        _counts(setting, record["verification"]),
        "Speedup that τ · T_ar / (T_draft + T_verify) predicts:",
        _methods(setting, record["rounds"]),
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


def _methods(setting: Setting, rounds: Sequence[dict]) -> Table:
    header = ["Method", "τ", "published speedup", "batch", "T_draft, ms", "T_verify, ms", "T_ar, ms", "drafter's share"]
    rows, methods = [], {method.name: method for method in setting.methods}

    def published(method: Method) -> str:
        return "" if method.speedup is None else f"{number_text(method.speedup)}×"

    for own, same in zip(rounds[::2], rounds[1::2], strict=True):
        method = methods.pop(own["method"], None)  # named in the first of its rows
        shown = [method.name, number_text(method.tau), published(method)] if method else ["", "", ""]
        times = (number_text(1e3 * own[part], 3) for part in ("draft_s", "verify_s", "ar_s"))
        speedups = (f"{number_text(row['speedup'])}×" for row in (own, same))
        rows.append([*shown, str(own["batch"]), *times, f"{own['drafter_share']:.0%}", *speedups])
    return Table([*header, "predicted", "predicted, same experts"], rows)


def write_roofline(config: DictConfig) -> None:
    """Writes roofline.md and roofline.json in ``config.out`` and prints the former; with ``from`` the speedups alone."""
    setting = setting_of(config)
    record = roofline_record(setting)
    blocks = roofline_blocks(setting, record)
    text = markdown([blocks[0], *blocks[-3:]] if config["from"] else blocks)
    written = write_report(config.out, {"roofline.md": text, "roofline.json": record})
    print(f"{text}\nwrote {', '.join(map(str, written))}")
