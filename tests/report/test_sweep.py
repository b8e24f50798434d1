"""A sweep's plan, its finished runs, and what its report says about them."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from hyperdflash.cli import entry_point
from hyperdflash.evaluation import report_job as entry
from hyperdflash.evaluation.report_job import make_report
from hyperdflash.identity import run_name
from hyperdflash.launch.sweep_plan import plan_sweep
from hyperdflash.report import figures
from hyperdflash.report.bootstrap import MEAN
from hyperdflash.report.results import MINUS_BASELINE
from hyperdflash.report.sweep import AHEAD, BEHIND, CURVE, EVEN, LOSS, over_seeds, verdict_lines
from hyperdflash.report.sweep_runs import read_curve
from tests.report.fake_runs import fake_sweep, noisy

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml"))
RATES = {"0.15": 0.6, "0.2": 0.7, "0.5": 0.4}
DRAW = figures.sweep_figures
KL = ["sweep=kl", "kl.alpha=0.15,0.2,0.5"]


@pytest.fixture
def runs(monkeypatch, tmp_path) -> Path:
    """An empty folder for runs; one test alone draws figures, which takes seconds."""
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    monkeypatch.setattr(figures, "sweep_figures", lambda report, out: [])
    return tmp_path


def kl_rate(job) -> float:
    return noisy(RATES[job.choices["kl.alpha"]], int(job.choices["seed"]))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_plans_different_runs_and_its_baseline_is_one(name, runs):
    """Takes two values per axis, the baseline's among them; tests/test_configs.py composes every single option."""
    file = OmegaConf.load(ROOT / "conf" / "sweep" / f"{name}.yaml")
    wanted = dict(word.split("=", 1) for word in file.sweep.baseline)
    words = []
    for axis, values in file.hydra.sweeper.params.items():
        values = str(values).split(",")
        assert len(set(values)) == len(values) > 1 and wanted.get(axis, values[0]) in values
        other = next(value for value in values if value != wanted.get(axis))
        words.append("seed=0" if axis == "seed" else f"{axis}={other},{wanted.get(axis, values[1])}")
    plan = plan_sweep([f"sweep={name}", *words])
    assert plan.name == file.sweep.name == name and plan.baseline == wanted
    assert len(plan.jobs) == len({job.directory for job in plan.jobs}) == 2 ** len(plan.axes)
    assert "seed" not in plan.axes  # one value is no axis


def test_a_plan_names_the_runs_that_the_training_command_makes(runs, compose_config):
    from hyperdflash.identity import train_run_dir

    plan = plan_sweep(["sweep=conditioning", "method=hyperdflash,dflash_flat", "target=tiny,deep", "experiment=stage2"])
    assert len(plan.jobs) == 2 * 2 * 3 * 2
    vanilla = next(
        job for job in plan.jobs if job.choices == {"method": "dflash_flat", "kl": "off", "seed": "1", "target": "deep"}
    )
    words = [
        "target=deep",
        "experiment=stage2",
        "conditioning=layers",
        "conditioning.paths=flat",
        "reducer=fc",
        "kl=off",
        "seed=1",
    ]
    assert vanilla.directory == train_run_dir(compose_config("train", words))
    with pytest.raises(ValueError, match="nothing is swept"):
        plan_sweep(["kl=off"])


def test_hydra_expands_a_sweep_into_the_same_jobs(runs, run_command):
    """The real command, with the training replaced by writing its configuration's name."""
    main = entry_point("train")(lambda config: print("JOB", run_name(config)))
    words = ["sweep=teacher", "seed=0,1", "kl.alpha=0.2"]
    done = run_command(main, *words)
    names = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("JOB")]
    assert names == [job.directory.name for job in plan_sweep(words).jobs], done.stderr
    assert len(names) == 4


def test_the_report_of_a_sweep(runs, capsys, monkeypatch):
    monkeypatch.setattr(figures, "sweep_figures", DRAW)
    fake_sweep(KL, kl_rate)
    report, out = make_report([*KL, "num_resamples=200"])
    cells = {cell.choices["kl.alpha"]: cell for cell in report.cells}
    assert list(cells) == list(RATES) and report.baseline == "kl.alpha 0.15" and cells["0.15"].is_baseline
    assert cells["0.2"].verdict == AHEAD and cells["0.5"].verdict == BEHIND
    for text in ("kl.alpha 0.2 against kl.alpha 0.15: ahead on tiny, the only target", "kl.alpha 0.5 against"):
        assert text in capsys.readouterr().out + (out / "sweep.md").read_text()
    for name in ("acceptance.png", "tau_by_axis.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    mine = [r for r in rows if (r["kl.alpha"], r["group"], r["metric"]) == ("0.2", MEAN, MINUS_BASELINE)]
    assert [r["over"] for r in mine] == ["seeds", "prompts"]
    wanted = cells["0.2"].get(MINUS_BASELINE, over="seeds").value
    assert float(mine[0]["value"]) == pytest.approx(wanted, abs=1e-6)
    steps = [r for r in rows if (r["kl.alpha"], r["metric"]) == ("0.5", f"{CURVE} minus baseline")]
    assert [int(r["slot"]) for r in steps] == [10, 20, 30, 40]
    curve = [r for r in rows if (r["kl.alpha"], r["metric"]) == ("0.5", CURVE)]
    assert [int(r["slot"]) for r in curve] == [10, 20, 30, 40]
    assert all(float(r["low"]) < float(r["value"]) < float(r["high"]) for r in curve)
    losses = [(r["slot"], float(r["value"])) for r in rows if (r["kl.alpha"], r["metric"]) == ("0.5", LOSS)]
    assert losses == [("10", 3.7), ("20", 3.4), ("30", 3.1), ("40", 3.0)] and (out / "curves.png").stat().st_size > 10_000
    check_differences_by_step(steps, runs)
    assert not list(out.glob("*.partial*"))


def check_differences_by_step(rows: list[dict], runs: Path) -> None:
    """kl.alpha 0.5 to 0.15 at every step, by hand: the runs' own curves, paired by seed, Student's t with two degrees."""
    curves: dict[str, dict[int, dict]] = {"0.15": {}, "0.5": {}, "0.2": {}}
    for run in (path.parent for path in (runs / "train").glob("*/result.json")):
        decided = json.loads((run / "result.json").read_text())["decided_by"]
        curves[f"{decided['kl']['alpha']:g}"][decided["seed"]] = dict(read_curve(run, "val/tau"))
    for row in rows:
        step = int(row["slot"])
        found = np.array([curves["0.5"][s][step] - curves["0.15"][s][step] for s in (0, 1, 2)])
        half = 4.303 * found.std(ddof=1) / math.sqrt(3)
        wanted = (found.mean(), found.mean() - half, found.mean() + half)
        got = [float(row[name]) for name in ("value", "low", "high")]
        assert got == pytest.approx(wanted, abs=2e-6)


def test_the_numbers_of_a_cell_are_those_of_its_runs(runs):
    """Against a calculation by hand: pooled within a domain, plain mean over domains, mean and t interval over seeds."""
    made = fake_sweep(KL, kl_rate)
    report, _ = make_report([*KL, "num_resamples=50"])
    per_seed: dict[str, dict[int, float]] = {}
    for run in made:
        decided = json.loads((run / "result.json").read_text())["decided_by"]
        prompts = json.loads((run / "validation.json").read_text())["prompts"]
        taus = []
        for domain in ("math", "code", "chat"):
            own = [row for row in prompts if row["domain"] == domain]
            taus.append(sum(row["emitted"] for row in own) / sum(row["rounds"] for row in own))
        per_seed.setdefault(f"{decided['kl']['alpha']:g}", {})[decided["seed"]] = np.mean(taus)
    for cell in report.cells:
        own = per_seed[cell.choices["kl.alpha"]]
        assert cell.get("tau", over="seeds").value == pytest.approx(np.mean(list(own.values())))
        if cell.shared:
            differences = np.array([own[s] - per_seed["0.15"][s] for s in (0, 1, 2)])
            half = 4.303 * differences.std(ddof=1) / math.sqrt(3)
            assert cell.get(MINUS_BASELINE, over="seeds").low == pytest.approx(differences.mean() - half)


def test_an_interval_that_covers_0_is_no_difference(runs):
    """One seed is far off: the prompts' interval excludes 0, the seeds' does not, and the verdict follows the wider."""
    rates = {("0.15", 0): 0.5, ("0.15", 1): 0.5, ("0.15", 2): 0.5, ("0.2", 0): 0.5, ("0.2", 1): 0.5, ("0.2", 2): 0.75}
    fake_sweep(KL, lambda job: rates.get((job.choices["kl.alpha"], int(job.choices["seed"]))))
    report, _ = make_report([*KL, "num_resamples=200"])
    (cell,) = [cell for cell in report.cells if cell.shared]
    assert cell.get(MINUS_BASELINE, over="prompts").low > 0 > cell.get(MINUS_BASELINE, over="seeds").low
    assert cell.verdict == EVEN
    assert len(report.missing) == 3 and "kl.alpha 0.5 · seed 2" in report.missing


def test_a_run_whose_name_depends_on_a_target_that_is_not_there_is_missing_for_that_reason(runs, tmp_path):
    gone = tmp_path / "gone"
    words = ["sweep=conditioning", "method=hyperdflash,pre_fc,dflash", "kl=off", "seed=0", f"target.path={gone}"]
    fake_sweep(words, lambda job: 0.5 if job.choices["method"] == "hyperdflash" else None)
    report, out = make_report([*words, "baseline=method=hyperdflash", "num_resamples=20"])
    why = f" ({gone} has no config.json, which its layers and so its name depend on)"
    assert report.missing == ("pre_fc", "dflash" + why)
    (run,) = report.cells[0].seeds.values()
    assert f"- hyperdflash on gone: {run.directory.name}\n" in (out / "sweep.md").read_text()


def test_one_seed_is_called_one_seed_and_has_no_interval_over_seeds(runs):
    fake_sweep(KL, lambda job: kl_rate(job) if job.choices["seed"] == "1" else None)
    report, out = make_report([*KL, "num_resamples=50"])
    assert {tuple(cell.seeds) for cell in report.cells} == {(1,)}
    text = (out / "sweep.md").read_text()
    assert "no verdict from one seed on tiny" in text and "ahead" not in text.partition("tau: tokens")[0]
    assert math.isnan(over_seeds([1.0]).low) and over_seeds([1.0, 3.0]).low == pytest.approx(2 - 12.706)


@pytest.mark.parametrize(
    ("deep", "told"),
    [(0.7, "ahead: agrees across targets (tiny, deep)"), (0.3, "targets do not agree"), (None, "not run on every target")],
)
def test_agreement_across_targets_is_claimed_only_where_it_is(runs, deep, told):
    def rate(job):
        if job.choices["kl.teacher"] == "mean_pool":
            return noisy(0.5, int(job.choices["seed"]), 0.002)
        return noisy(0.7, int(job.choices["seed"]), 0.002) if job.choices["target"] == "tiny" else deep

    fake_sweep(["sweep=teacher", "target=tiny,deep"], rate)
    report, _ = make_report(["sweep=teacher", "target=tiny,deep", "num_resamples=100"])
    (line,) = verdict_lines(report)
    assert told in line and line.startswith("kl.teacher hc_head against kl.teacher mean_pool: ")


def test_a_baseline_may_leave_an_axis_open(runs):
    """Compares each method with vanilla at the same KL, so a gain that KL gives to both is no difference."""
    gain = {"paper": 0.1, "off": 0.0}
    fake_sweep(
        ["sweep=conditioning", "method=hyperdflash,dflash"],
        lambda j: noisy(0.5 + gain[j.choices["kl"]], int(j.choices["seed"])),
    )
    words = ["sweep=conditioning", "method=hyperdflash,dflash", "num_resamples=50"]
    report, _ = make_report(words)
    assert report.baseline == "dflash at the same kl"
    assert [cell.get(MINUS_BASELINE).value for cell in report.cells if cell.shared] == [0.0, 0.0]
    other, _ = make_report([*words, "baseline=kl=off"])
    assert all(cell.get(MINUS_BASELINE).value > 0.1 for cell in other.cells if cell.choices["kl"] == "paper")


def test_runs_of_other_code_are_marked_and_unreadable_ones_left_out_by_name(runs):
    words = ["sweep=teacher", "seed=0,1,2"]
    made = fake_sweep(words, lambda job: 0.5)
    environment = made[1] / "run.json"
    environment.write_text(environment.read_text().replace("a" * 10, "b" * 10))
    (made[4] / "validation.json").unlink()
    (made[5] / "result.json").write_text("{}")
    report, out = make_report([*words, "num_resamples=50"])
    assert list(report.left_out) == [made[4].name, made[5].name] and report.missing == ()
    assert "keeps no counts per prompt" in report.left_out[made[4].name]
    assert "names no dataset" in report.left_out[made[5].name] and made[5].name in (out / "sweep.md").read_text()
    assert sum(len(cell.seeds) for cell in report.cells) == 4
    (mark,) = [mark for cell in report.cells for mark in cell.marks]
    assert "made by other code (code bbbbbbbbbb" in mark and mark in (out / "sweep.md").read_text()


def test_a_run_on_other_rows_of_the_same_dataset_is_marked(runs):
    made = fake_sweep(["sweep=teacher", "seed=0,1"], lambda job: 0.5)
    record = json.loads((made[0] / "result.json").read_text())
    edited = {**record, "dataset": {**record["dataset"], "digest": "e" * 16}}
    (made[0] / "result.json").write_text(json.dumps(edited))
    report, out = make_report(["sweep=teacher", "seed=0,1", "num_resamples=50"])
    (mark,) = [mark for cell in report.cells for mark in cell.marks]
    assert f"trained on other rows of dataset embedded-stage1 ({'e' * 16}; most runs: {'d' * 16})" in mark
    assert mark in (out / "sweep.md").read_text()
    edited["dataset"]["name"] = "embedded-stage2"  # the configuration asks for other rows: its difference is an axis or refused
    (made[0] / "result.json").write_text(json.dumps(edited))
    assert not any(cell.marks for cell in make_report(["sweep=teacher", "seed=0,1", "num_resamples=50"])[0].cells)


def test_runs_on_other_weights_or_prompts_are_not_paired(runs):
    made = fake_sweep(["sweep=teacher", "seed=0,1"], lambda job: 0.5)
    record = json.loads((made[0] / "result.json").read_text())
    (made[0] / "result.json").write_text(json.dumps({**record, "target": "0" * 16}))
    with pytest.raises(ValueError, match="different weights of tiny"):
        make_report(["sweep=teacher", "seed=0,1", "num_resamples=50"])
    (made[0] / "result.json").write_text(json.dumps(record))
    kept = json.loads((made[0] / "validation.json").read_text())
    (made[0] / "validation.json").write_text(json.dumps({**kept, "prompts": kept["prompts"][1:]}))
    with pytest.raises(ValueError, match="different prompts"):
        make_report(["sweep=teacher", "seed=0,1", "num_resamples=50"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sweep=nope"], "sweep=nope is no option: sweep takes"),
        (
            ["sweep=early"],
            "no finished run of early to report: run its trainings first, by `python -m src.train` with the same words",
        ),
        ([], "nothing is swept by ''"),
        (["num_resamples=0"], "num_resamples must be a positive integer"),
        (["sweep=teacher", "baseline=kl.teacher=nobody"], "the baseline kl.teacher nobody has no finished run on tiny"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, runs, monkeypatch, capsys):
    if "sweep=teacher" in words:
        fake_sweep(["sweep=teacher", "seed=0,1"], lambda job: 0.5)
    monkeypatch.setattr(sys, "argv", ["report", *words])
    assert entry.main() == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_without_matplotlib_the_error_says_what_to_install(runs, monkeypatch, capsys):
    fake_sweep(["sweep=teacher", "seed=0"], lambda job: 0.5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hyperdflash.report.figures")
    monkeypatch.setattr(sys, "argv", ["report", "sweep=teacher", "seed=0", "num_resamples=20"])
    assert entry.main() == 1
    assert capsys.readouterr().err == "error: matplotlib is not installed: run `pip install 'hyperdflash[figures]'`\n"


def test_a_curve_counts_steps_done_and_needs_no_file(tmp_path):
    assert read_curve(tmp_path, "val/tau").shape == (0, 2)
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss,val/tau\n4,0,1.0,\n9,0,,1.5\n19,1,,2.0\n")
    assert read_curve(tmp_path, "val/tau").tolist() == [[10, 1.5], [20, 2.0]]


def test_the_codes_digest_follows_the_training_alone(tmp_path):
    from hyperdflash.record import training_code

    for name in ("training/job.py", "report/sweep.py", "planning/plan.py", "cli.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    before = training_code(tmp_path)
    for name, same in (("report/sweep.py", True), ("planning/plan.py", True), ("training/job.py", False), ("cli.py", False)):
        (tmp_path / name).write_text("x = 2")
        assert (training_code(tmp_path) == before) is same, name
        (tmp_path / name).write_text("x = 1")
