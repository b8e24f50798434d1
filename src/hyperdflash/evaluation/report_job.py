"""Reports a sweep's finished runs in tables, figures and one page.

python -m src.report sweep=kl                                   the words of the training command: runs are found by their name
python -m src.report sweep=conditioning target=tiny,deep html=runs/conditioning.html
python -m src.report sweep=kl runs=runs/old/train               runs elsewhere; those that are none of the sweep's are refused
python -m src.report                                            everything in runs/train, whatever differs is an axis

Own words: runs=FOLDER,... (of runs' directories)  out=FOLDER  html=FILE  baseline=AXIS=VALUE,...  num_resamples=N
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hyperdflash.cli import not_installed
from hyperdflash.identity import runs_dir
from hyperdflash.launch.sweep_plan import Job, SweepPlan, plan_sweep
from hyperdflash.report.html import write_page
from hyperdflash.report.results import write_report
from hyperdflash.report.sweep import SweepReport, label_of, summarize_sweep, verdict_lines
from hyperdflash.report.sweep_runs import Member, TrainedRun, flat, members_by_difference, read_run, refusal
from hyperdflash.report.sweep_tables import sweep_blocks
from hyperdflash.report.tables import markdown

OWN = {"runs": "", "out": "", "html": "", "baseline": "", "num_resamples": "2000"}


def make_report(words: Sequence[str]) -> tuple[SweepReport, Path]:
    """Writes sweep.md, the record as sweep.csv, figures and dashboard.html; returns the report and their folder."""
    from hyperdflash.report.sweep_figures import sweep_figures

    own, rest = dict(OWN), []
    for word in words:
        key, _, value = word.partition("=")
        if key in OWN:
            own[key] = value
        else:
            rest.append(word)
    if not own["num_resamples"].isdigit() or int(own["num_resamples"]) < 1:
        raise ValueError(f"num_resamples must be a positive integer, got {own['num_resamples']!r}")
    baseline = dict(part.partition("=")[::2] for part in own["baseline"].split(",") if part)
    folders = [Path(folder) for folder in own["runs"].split(",") if folder] or [runs_dir() / "train"]
    plan = plan_sweep(rest) if rest else None
    runs, left_out = _read(folders, plan)
    if plan:
        members, refused, missing = _members_of(plan, runs)
        left_out = {**left_out, **(refused if own["runs"] else {})}
        name, axes, base = plan.name, plan.axes, baseline or plan.baseline
    else:
        members, missing = members_by_difference(runs), []
        name, base = "all_runs", baseline
        choices = [member.choices for member in members]
        axes = {axis: tuple(dict.fromkeys(own[axis] for own in choices)) for axis in (choices[0] if choices else ())}
    if not members and not plan:
        why = "".join(f"; {reason}" for reason in list(left_out.values())[:3])
        raise ValueError(f"no finished run to report in {', '.join(map(str, folders))}: run `python -m src.train` first{why}")
    report = summarize_sweep(
        name, axes, members, base, num_resamples=int(own["num_resamples"]), left_out=left_out, missing=missing
    )
    out = Path(own["out"]) if own["out"] else runs_dir() / "report" / name
    blocks = sweep_blocks(report)
    write_report(out, {"sweep.md": markdown(blocks), "sweep.csv": report.results.csv_text()})
    figures = sweep_figures(report, out)
    page = write_page(f"Sweep {name}", blocks, figures, Path(own["html"]) if own["html"] else out / "dashboard.html")
    print("\n".join(verdict_lines(report)) or "one choice only: nothing to compare")
    for kind, count in (("left out", len(report.left_out)), ("not finished, or not found", len(report.missing))):
        if count:
            print(f"{count} runs {kind}: see {out / 'sweep.md'}")
    print(f"wrote {out}/sweep.md, sweep.csv, {', '.join(figure.name for figure in figures)} and {page}")
    return report, out


def _read(folders: Sequence[Path], plan: SweepPlan | None) -> tuple[list[TrainedRun], dict[str, str]]:
    """Reads finished runs in ``folders``, the first of each name; with a plan and its own folder, only the plan's runs. Also
    returns the runs left out, with the reason."""
    wanted = {job.directory.name for job in plan.jobs} if plan and list(folders) == [runs_dir() / "train"] else None
    runs: dict[str, TrainedRun] = {}
    left_out: dict[str, str] = {}
    for folder in folders:
        for result in sorted(folder.glob("*/result.json")):
            name = result.parent.name
            if wanted is not None and name not in wanted:
                continue
            try:
                run = read_run(result.parent)
            except ValueError as error:
                left_out[str(result.parent) if name in left_out else name] = str(error)
                continue
            if runs.setdefault(name, run) is not run:
                left_out[str(result.parent)] = f"has the name of {runs[name].directory}, which is reported"
    return list(runs.values()), left_out


def _members_of(plan: SweepPlan, runs: Sequence[TrainedRun]) -> tuple[list[Member], dict[str, str], list[str]]:
    """Returns runs with a job, runs without one and the reason, and labels of jobs without a run, with the reason where it
    is known."""
    by_name = {run.directory.name: run for run in runs}
    members, missing = [], []
    for job in plan.jobs:
        choices = {axis: value for axis, value in job.choices.items() if axis not in ("seed", "target")}
        if job.directory.name in by_name:
            members.append(Member(by_name[job.directory.name], choices))
        else:
            missing.append(label_of(job.choices) + _unnamed(job))
    jobs = [flat(job.decided) for job in plan.jobs]
    names = {job.directory.name for job in plan.jobs}
    refused = {run.directory.name: refusal(run, jobs) for run in runs if run.directory.name not in names}
    return members, refused, missing


def _unnamed(job: Job) -> str:
    """Explains why a job has no run name: vanilla's taps are part of it, and follow the target's depth; else empty."""
    conditioning = job.decided["conditioning"] or {}
    if conditioning.get("layer_ids", ()) is not None:
        return ""
    return f" ({job.decided['target']['path']} has no config.json, which its layers and so its name depend on)"


def main() -> int:
    from hydra.errors import HydraException

    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        make_report([word for word in sys.argv[1:] if word not in ("-m", "--multirun")])
    except (ValueError, HydraException) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error)}", file=sys.stderr)
        return 1
    return 0
