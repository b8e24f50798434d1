"""Reports a sweep's finished runs in tables, figures and one page.

python -m src.report sweep=kl                                        the words of the training command, which name the runs
python -m src.report sweep=conditioning target=tiny,deep html=runs/conditioning.html

Own words: out=FOLDER  html=FILE  baseline=AXIS=VALUE,...  num_resamples=N
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hyperdflash.cli import exit_code
from hyperdflash.identity import runs_dir
from hyperdflash.launch.sweep_plan import Job, plan_sweep
from hyperdflash.report.results import write_report
from hyperdflash.report.sweep import SweepReport, label_of, summarize_sweep, verdict_lines
from hyperdflash.report.sweep_runs import TrainedRun, read_run
from hyperdflash.report.sweep_tables import sweep_blocks
from hyperdflash.report.tables import markdown, write_page
from hyperdflash.settings import MOST_RESAMPLES, positive_int

OWN = {"out": "", "html": "", "baseline": "", "num_resamples": "2000"}


def make_report(words: Sequence[str]) -> tuple[SweepReport, Path]:
    """Writes sweep.md, the record as sweep.csv, figures and dashboard.html; returns the report and their folder."""
    from hyperdflash.report.figures import sweep_figures

    own = OWN | {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN}
    given = own["num_resamples"]
    resamples = positive_int("num_resamples", int(given) if given.isdecimal() else given, MOST_RESAMPLES)
    plan = plan_sweep([word for word in words if word.partition("=")[0] not in OWN])
    members, left_out, missing = _read(plan.jobs)
    baseline = dict(part.partition("=")[::2] for part in own["baseline"].split(",") if part) or plan.baseline
    lists = {"left_out": left_out, "missing": missing}
    report = summarize_sweep(plan.name, plan.axes, members, baseline, num_resamples=resamples, **lists)
    out = Path(own["out"]) if own["out"] else runs_dir() / "report" / plan.name
    text = markdown(sweep_blocks(report))
    write_report(out, {"sweep.md": text, "sweep.csv": report.results.csv_text()})
    figures = sweep_figures(report, out)
    page = write_page(f"Sweep {plan.name}", text, figures, Path(own["html"]) if own["html"] else out / "dashboard.html")
    print("\n".join(verdict_lines(report)) or "one choice only: nothing to compare")
    marked = sum(len(cell.marks) for cell in report.cells)
    kinds = {"left out": len(left_out), "not finished, or not found": len(missing)}
    for kind, count in {**kinds, "trained on other data or by other code than most": marked}.items():
        if count:
            print(f"{count} runs {kind}: see {out / 'sweep.md'}")
    print(f"wrote {out}/sweep.md, sweep.csv, {', '.join(figure.name for figure in figures)} and {page}")
    return report, out


def _read(jobs: Sequence[Job]) -> tuple[list[TrainedRun], dict[str, str], list[str]]:
    """Returns the finished runs of ``jobs``, runs left out with the reason, and labels of jobs without a finished run."""
    members, left_out, missing = [], {}, []
    for job in jobs:
        if not (job.directory / "result.json").exists():
            # vanilla's taps are part of a run's name and follow the target's depth
            named = (job.decided["conditioning"] or {}).get("layer_ids", ()) is not None
            path = job.decided["target"]["path"]
            why = "" if named else f" ({path} has no config.json, which its layers and so its name depend on)"
            missing.append(label_of(job.choices) + why)
            continue
        try:
            choices = {axis: value for axis, value in job.choices.items() if axis not in ("seed", "target")}
            members.append(read_run(job.directory, choices))
        except ValueError as error:
            left_out[job.directory.name] = str(error)
    return members, left_out, missing


def main() -> int:
    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        print(__doc__)
        return 0
    return exit_code(lambda: make_report([word for word in sys.argv[1:] if word not in ("-m", "--multirun")]))
