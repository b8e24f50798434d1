"""What a W&B run holds, read back from the files that an offline run leaves; and validation.json beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hyperdflash.identity import train_run_dir
from hyperdflash.report.sweep_runs import read_run
from hyperdflash.training.curves import acceptance_rows
from hyperdflash.training.job import train
from hyperdflash.training.loggers import AXES, make_loggers, wandb_axes, wandb_labels, wandb_mode, within
from hyperdflash.training.module import DraftingModule
from hyperdflash.training.wandb_record import COLUMNS, best_summary, workspace_json
from tests.training.offline_record import configuration, panels, records, records_in, rows, values


@pytest.fixture
def two_stages(compose_config, mini_overrides):
    """Directories of a stage-1 run and of the stage-2 run that continues from it, both logged offline."""
    own = [*mini_overrides, "logger=default"]
    configs = [compose_config("train", [f"experiment={stage}", *own]) for stage in ("stage1", "stage2")]
    for config in configs:
        train(config)
    return [train_run_dir(config) for config in configs]


def test_an_offline_run_is_complete(two_stages):
    parent, run = two_stages
    check_validation_record(run)
    kept = records(run)
    (init,) = [record.run for record in kept if record.HasField("run")]
    assert init.project == "hyperdflash" and init.display_name == run.name and init.run_id == (run / "wandb" / "id").read_text()
    assert (init.run_group, init.job_type) == ("stage2", "stage2")
    assert {"stage2", "pre_hc_head-hc_gate"} <= set(init.tags)

    config = configuration(kept)
    assert config["kl"]["alpha"] == config["axis_kl_alpha"] == 0.15 and config["stage"] == 2
    assert config["axes"] == "stage2" and config["axis_reducer"] == "hc_gate"
    assert config["method"] == "pre_hc_head-hc_gate" and config["stage1_run"] == parent.name
    assert config["target_fingerprint"] in config["cache_key"] and len(config["git_revision"] or "0" * 40) == 40

    history: dict[str, list] = {}
    for row in rows(kept):
        for name, value in row.items():
            history.setdefault(name, []).append(value)
    assert len(history["val/survival_1"]) == len(history["val/tau"]) == 2  # one validation an epoch
    assert {f"val/survival_{k}" for k in range(1, 7)} | {"val/conditional_1"} <= history.keys()
    (files,) = run.glob("wandb/offline-run-*/files")
    table = json.loads((files / history["val/drafts/path"][-1]).read_text())
    assert table["columns"] == COLUMNS and table["data"][0][0] == "code"
    assert re.search(r"\{-.+-\}|\[.+\]", table["data"][0][4], re.S) and table["data"][0][5] > 0
    assert not [name for name in history if "acceptance" in name and not name.startswith("acceptance/")]

    pages = [c.local_path for r in kept for c in r.artifact.manifest.contents if c.path.endswith(".html")]
    assert pages and 'class="own"' in Path(pages[-1]).read_text()
    made = [record.artifact for record in kept if record.artifact.type == "drafter"]
    assert {a.name: (a.use_after_commit, {"best", "stage2"} <= set(a.aliases)) for a in made} == {
        f"drafter-{parent.name}": (True, False),
        f"drafter-{run.name}": (False, True),
    }
    assert {c.path for c in made[-1].manifest.contents} == {"best.ckpt", "config.yaml"}
    (output,) = [r.artifact for r in records(parent) if r.artifact.type == "drafter"]
    # the same content is the same version: what stage 1 put out is what stage 2 took in
    assert output.digest == next(a.digest for a in made if a.name == output.name)

    summary = {key: value for record in kept for key, value in values(record.summary.update).items()}
    best = json.loads((run / "validation.json").read_text())
    check_positions(kept, best)
    assert summary["best/tau"] == best["tau"] and summary["best/survival_1"] == best_summary(best)["best/survival_1"]
    assert json.loads((files / "run.json").read_text())["starts"][-1]["git_revision"] == config["git_revision"]
    assert [record.exit.exit_code for record in kept if record.HasField("exit")] == [0]


def test_a_resumed_run_logs_under_the_same_steps(runs_here, prepared_overrides, compose_config, tmp_path, monkeypatch):
    """Killed in step 6 after the checkpoint at 4: rows are numbered by step in both parts, and the second goes on at 4."""
    runs_here(tmp_path / "runs")
    config = compose_config("train", [*prepared_overrides, "logger=default", "trainer.max_epochs=2"])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        whole = DraftingModule.training_step

        def dies(module, batch, batch_index):
            if module.global_step == 6:
                raise RuntimeError("gone")
            return whole(module, batch, batch_index)

        patch.setattr(DraftingModule, "training_step", dies)
        train(config)
    train(config)
    files = sorted(train_run_dir(config).glob("wandb/offline-run-*/run-*.wandb"))
    parts = []
    for file in files:
        logged = rows(records_in(file))
        steps = [row for row in logged if "position" not in row]
        assert all(row["_step"] == row["trainer/global_step"] for row in steps)
        assert [row["_step"] for row in steps if "val/tau" in row] == [
            row["_step"] for row in steps if any(name.startswith("val/drafts") for name in row)
        ]
        parts.append({row["_step"]: row for row in steps})
        assert len(parts[-1]) == len(steps)  # one row a step
        assert [row["_step"] for row in logged if row not in steps] == ([] if file == files[0] else list(range(12, 18)))
    first, second = parts
    assert list(first) == list(range(6)) and list(second) == list(range(4, 12))
    assert all(first[step]["train/loss"] == second[step]["train/loss"] for step in (4, 5))
    ids = {record.run.run_id for file in files for record in records_in(file) if record.HasField("run")}
    assert ids == {(train_run_dir(config) / "wandb" / "id").read_text()}


def check_validation_record(run: Path) -> None:
    """validation.json is the best checkpoint, prompt by prompt, and reads as a finished run."""
    kept = json.loads((run / "validation.json").read_text())
    result = json.loads((run / "result.json").read_text())
    emitted, rounds = (sum(row[name] for row in kept["prompts"]) for name in ("emitted", "rounds"))
    assert emitted / rounds == pytest.approx(kept["tau"], abs=1e-6)
    assert kept["tau"] == pytest.approx(result["val_tau"], abs=1e-6)
    own = read_run(run)
    assert own.counts.num_slots == 6 and own.curve[:, 1].max() == pytest.approx(kept["tau"], abs=1e-5)
    assert own.curve[-1, 0] == result["steps"] and list(own.prompt_ids) == sorted(own.prompt_ids)


def test_a_worse_validation_leaves_the_record_and_a_new_start_replaces_it(tmp_path):
    """validation.json is of the validation that best.ckpt is of, whatever the file says that lies there."""
    from types import SimpleNamespace

    from hyperdflash.contracts import Rounds
    from hyperdflash.training.checkpoints import Checkpoints

    def start(best_tau: float | None = None) -> Checkpoints:
        saver = Checkpoints(tmp_path, every_steps=None, every_s=None, command="")
        if best_tau is not None:
            saver.load_state_dict({"best_tau": best_tau})
        return saver

    def validate(saver: Checkpoints, tau: float) -> tuple[dict, str]:
        numbers = torch.tensor([0])
        rounds = Rounds(numbers, numbers + 3, numbers + 1, numbers + 2, numbers + 6, num_slots=6)
        mask = torch.tensor([[False, True, True], [False, False, False]])
        batch = SimpleNamespace(ids=("a", "other rank's"), domains=("code", "code"), loss_mask=mask)
        trainer = SimpleNamespace(
            world_size=1,
            is_global_zero=True,
            global_step=7,
            callback_metrics={"val/tau": torch.tensor(tau)},
            save_checkpoint=lambda path, weights_only: path.write_text(str(tau)),
        )
        module = SimpleNamespace(check_finite=lambda: None)
        saver.on_validation_start(trainer, module)
        saver.on_validation_batch_end(trainer, module, {"rounds": rounds}, batch, 0)
        saver.on_validation_end(trainer, module)
        kept = json.loads((tmp_path / "validation.json").read_text())
        return kept, (tmp_path / "checkpoints" / "best.ckpt").read_text()

    (tmp_path / "checkpoints").mkdir()
    saver = start()
    assert validate(saver, 2.0)[0]["tau"] == 2.0
    kept, best = validate(saver, 1.5)
    assert kept["tau"] == 2.0 == float(best) and [row["id"] for row in kept["prompts"]] == ["a"]
    assert kept["prompts"][0]["survived"] == [1, 0, 0, 0, 0, 0] and kept["prompts"][0]["reached"] == [1, 1, 0, 0, 0, 0]
    assert validate(start(2.0), 1.5)[0]["tau"] == 2.0  # resumed
    kept, best = validate(start(1.0), 1.75)  # resumed from before the best of the killed run
    assert kept["tau"] == 1.75 == float(best)
    assert validate(start(), 1.5)[0]["tau"] == 1.5  # begun anew


def check_positions(kept: list, best: dict) -> None:
    """A row per drafted position whose rates are those of validation.json, and W&B's word for what stands on the x axis."""
    logged = [row for row in rows(kept) if "position" in row]
    assert [{name: row[name] for name in row if not name.startswith("_")} for row in logged] == acceptance_rows(best)
    defined = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in kept if r.HasField("metric")}
    assert defined["acceptance/*"] == "position" and defined["train/*"] == defined["val/*"] == "trainer/global_step"


def test_rates_by_position_are_counted_by_hand():
    """Two domains: 4 rounds that accept 2, 1, 0 and 2 drafts, and one round whose text ends before its second slot."""
    math = {"domain": "math", "rounds": 4, "survived": [3, 2], "reached": [4, 3]}
    code = {"domain": "my code", "rounds": 1, "survived": [1, 0], "reached": [1, 0]}
    first, second = acceptance_rows({"prompts": [math, code]})
    assert first == {
        "position": 1,
        "acceptance/survival": 4 / 5,
        "acceptance/conditional": 4 / 5,
        "acceptance/survival_math": 3 / 4,
        "acceptance/conditional_math": 3 / 4,
        "acceptance/survival_my_code": 1.0,
        "acceptance/conditional_my_code": 1.0,
    }
    assert second["acceptance/survival"] == 2 / 5 and second["acceptance/conditional"] == 2 / 3
    assert second["acceptance/survival_my_code"] == 0.0 and "acceptance/conditional_my_code" not in second


def test_a_sweeps_jobs_are_grouped_and_named_by_their_choice(compose_config, monkeypatch):
    from hyperdflash.training import loggers

    config = compose_config("train", ["sweep=kl", "kl.alpha=0.5", "seed=2"])
    monkeypatch.setattr(loggers, "swept_here", lambda: {"kl.alpha": "0.5", "seed": "2"})
    place = wandb_labels(config)
    assert (place["group"], place["job_type"]) == ("kl", "kl.alpha=0.5")
    assert place["tags"] == ["stage1", "tiny", "pre_hc_head-hc_gate", "sweep:kl"]
    flat = wandb_axes(compose_config("train", ["method=dflash_flat", "kl=paper"]))
    assert flat["method"] == "layers_flat-fc" and flat["axis_reducer"] == "fc"
    assert flat["axis_kl_alpha"] == 0.15  # a number, swept or not
    assert wandb_axes(compose_config("train", ["method=mtp_finetuned"]))["method"] == "mtp_chain"
    monkeypatch.setattr(loggers, "swept_here", lambda: {"corpus.stage1": "x" * 200, "corpus.stage2": "y" * 200})
    place, other = wandb_labels(compose_config("train")), within("x" * 199 + "z", 64)
    assert len(place["job_type"]) == 64 != len(place["group"]) and place["job_type"] != within("corpus.stage1=" + "x" * 199, 64)
    assert len(other) == 64 != other and within("x" * 64, 64) == "x" * 64


def test_a_sweep_typed_by_hand_has_a_group_a_choice_and_axes(run_command, monkeypatch):
    """Jobs of one sweep, and of another at the same values, never share the label that the workspace groups by."""
    from hyperdflash import commands
    from hyperdflash.training import job

    seen = []

    def training(config) -> dict:
        seen.append((wandb_labels(config), wandb_axes(config)["axes"]))
        return {"val_tau": 1.0}

    monkeypatch.setattr(job, "train", training)
    words = ["-m", "kl.alpha=0,0.15", "seed=0,1", "trainer.threads=1", "experiment=stage1"]
    for method in ("dflash", "best"):
        assert run_command(commands.train, *words, f"method={method}").returncode == 0
    assert run_command(commands.train, "kl.alpha=0.15").returncode == 0
    assert {place["group"] for place, _ in seen} == {"kl.alpha seed", "stage1"}
    assert [place["job_type"] for place, _ in seen[:4]] == ["kl.alpha=0", "kl.alpha=0", "kl.alpha=0.15", "kl.alpha=0.15"]
    assert len(seen) == 9 and seen[0][1] == "kl.alpha=0 experiment=stage1 method=dflash" == seen[1][1]
    assert len({axes for _, axes in seen}) == 5 and seen[-1][1] == "kl.alpha=0.15"


@pytest.mark.parametrize(
    ("environment", "option", "mode"),
    [
        ({}, "auto", "offline"),
        ({}, "online", "online"),
        ({"WANDB_API_KEY": "k"}, "auto", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": " OffLine "}, "auto", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "online", "offline"),
        ({"WANDB_MODE": ""}, "online", "online"),
        ({"WANDB_MODE": "run"}, "offline", "offline"),
        ({"WANDB_MODE": "Disabled"}, "online", "off"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "True"}, "online", "off"),
        ({"WANDB_DISABLED": "1"}, "auto", "off"),
        ({"WANDB_DISABLED": "false"}, "online", "online"),
        ({"WANDB_MODE": "nonsense"}, "online", "offline"),
        ({}, "off", "off"),
    ],
)
def test_the_environment_says_where_wandb_logs_in_any_spelling(environment, option, mode, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(option) == mode
    assert wandb_mode(option) == mode  # of the next job in this process


@pytest.mark.parametrize(("key", "project"), [("malformed", "hyperdflash"), ("", "a/b")])
def test_a_fault_of_wandb_costs_its_log_and_no_training(key, project, compose_config, monkeypatch, tmp_path, capfd):
    """A key that is none: W&B logs offline. A project that cannot be: not at all. One line each."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "" if key else "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    wandb.teardown()  # the settings of earlier runs
    config = compose_config("train", ["logger.wandb=online", f"logger.project={project}"])
    csv, *others = make_loggers(config.logger, tmp_path, "run", **wandb_labels(config))
    csv.log_metrics({"train/loss": 1.0}, step=0)
    told = [line for line in "\n".join(capfd.readouterr()).splitlines() if line]
    assert len(told) == 1 and told[0].startswith("W&B: "), told
    assert [logger.experiment.offline for logger in others] == ([True] if key else [])
    for logger in others:
        monkeypatch.setattr(logger.experiment, "log", lambda *args, **kwargs: 1 / 0)
        for step in range(3):
            logger.log_metrics({"train/loss": 1.0}, step=step)
        assert capfd.readouterr().out.count("ZeroDivisionError") == 1
        wandb.finish()
    wandb.teardown()


def workspace(compose_config, **others):
    config = compose_config("dashboard", ["entity=team"])
    from hyperdflash.training.wandb_dashboard import build_workspace

    return build_workspace("team", config.project, **{"sweep": None, "axes": config.axes, "domains": config.domains, **others})


def test_the_workspace_panel_by_panel(compose_config):
    """As `.save()` would send it, with each metric under the name that a run logs."""
    pytest.importorskip("wandb_workspaces.workspaces", reason="needs pip install -e .[wandb]")
    view = json.loads(workspace_json(workspace(compose_config, sweep="kl", axes=["kl.alpha", "reducer"], domains=["my code"])))
    first, steps, taus = "Acceptance by position, best checkpoint", "Training", "Accepted length by swept axis, best checkpoint"
    line, bar, by_step = "Run History Line Plot", "Bar Chart", "trainer/global_step"
    assert panels(view) == [
        (first, line, "survival by position, all domains", "position", ["acceptance/survival"], "axes.value"),
        (first, line, "conditional by position, all domains", "position", ["acceptance/conditional"], "axes.value"),
        (first, line, "survival by position, my code", "position", ["acceptance/survival_my_code"], "axes.value"),
        (first, line, "conditional by position, my code", "position", ["acceptance/conditional_my_code"], "axes.value"),
        (steps, line, "tau by step", by_step, ["val/tau"], "axes.value"),
        (steps, line, "loss by step", by_step, ["train/loss"], "axes.value"),
        (steps, line, "learning rate by step", by_step, ["train/lr"], "axes.value"),
        (steps, line, "gradient norm by step", by_step, ["train/grad_norm"], "axes.value"),
        (steps, line, "tokens per second by step", by_step, ["train/tokens_per_s"], "axes.value"),
        (taus, bar, "tau", None, ["summary_metrics.best/tau_mean"], "axes.value"),
        (taus, bar, "tau by kl.alpha", None, ["summary_metrics.best/tau_mean"], "axis_kl_alpha.value"),
        (taus, bar, "tau by reducer", None, ["summary_metrics.best/tau_mean"], "axis_reducer.value"),
        ("Runs", "Run Comparer", "", None, [], None),
        ("Drafted and accepted", "Media Browser", "drafts", None, ["val/drafts"], None),
    ]
    assert [key["name"] for key in view["section"]["runSets"][0]["grouping"]] == ["axes.value"]
    assert set(compose_config("dashboard", ["entity=team"]).axes) == set(AXES) - {"seed"}
