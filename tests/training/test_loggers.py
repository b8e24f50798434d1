"""What a W&B run holds, read back from the files that an offline run leaves; and validation.json beside it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from wandb.proto import wandb_internal_pb2 as pb

from hyperdflash.identity import train_run_dir
from hyperdflash.report.sweep_runs import read_run
from hyperdflash.training.job import train
from hyperdflash.training.loggers import WANDB_AXES, wandb_axes, wandb_place
from hyperdflash.training.module import DraftingModule
from hyperdflash.training.wandb_record import COLUMNS, best_summary

BLOCK, HEADER = 32768, 7


def records(run: Path) -> list[pb.Record]:
    """Every record of a run's only offline file."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return records_in(file)


def records_in(file: Path) -> list[pb.Record]:
    """LevelDB's log format, a protobuf message each."""
    data, position, parts, found = file.read_bytes(), 7, [], []  # the file's own header: ":W&B", magic, version
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        position += HEADER
        if kind == 0:
            break
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


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
    assert init.project == "hyperdflash" and init.display_name == run.name and init.run_id == (run / "wandb_id").read_text()
    assert (init.run_group, init.job_type) == ("stage2", "stage2")
    assert {"stage2", "pre_hc_head-hc_gate"} <= set(init.tags)

    config = {}
    for record in kept:
        for update in record.config.update:
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
    assert config["kl"]["alpha"] == config["axis_kl_alpha"] == 0.15 and config["stage"] == 2
    assert config["method"] == "pre_hc_head-hc_gate" and config["stage1_run"] == parent.name
    assert config["target_fingerprint"] in config["cache_key"] and len(config["git_revision"] or "0" * 40) == 40

    logged = [(item.key or "/".join(item.nested_key), item.value_json) for r in kept for item in r.history.item]
    history: dict[str, list] = {}
    for name, value in logged:
        history.setdefault(name, []).append(json.loads(value))
    assert len(history["val/survival_1"]) == len(history["val/tau"]) == 2  # one validation an epoch
    assert {f"val/survival_{k}" for k in range(1, 7)} | {"val/conditional_1"} <= history.keys()
    (files,) = run.glob("wandb/offline-run-*/files")
    table = json.loads((files / history["val/drafts/path"][-1]).read_text())
    assert table["columns"] == COLUMNS and table["data"][0][0] == "code"
    assert re.search(r"\{-.+-\}|\[.+\]", table["data"][0][4], re.S) and table["data"][0][5] > 0
    chart = json.loads((files / history["val/acceptance_table/path"][-1]).read_text())
    assert {row[1] for row in chart["data"]} == {"survival", "conditional"} and len(chart["data"]) == 12

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

    summary = {}
    for record in kept:
        for update in record.summary.update:
            summary[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
    best = json.loads((run / "validation.json").read_text())
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
        rows = [
            {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            for record in records_in(file)
            if record.HasField("history")
        ]
        assert all(row["_step"] == row["trainer/global_step"] for row in rows)
        assert [row["_step"] for row in rows if "val/tau" in row] == [
            row["_step"] for row in rows if any(name.startswith("val/acceptance") for name in row)
        ]
        parts.append({row["_step"]: row for row in rows})
        assert len(parts[-1]) == len(rows)  # one row a step
    first, second = parts
    assert list(first) == list(range(6)) and list(second) == list(range(4, 12))
    assert all(first[step]["train/loss"] == second[step]["train/loss"] for step in (4, 5))
    ids = {record.run.run_id for file in files for record in records_in(file) if record.HasField("run")}
    assert ids == {(train_run_dir(config) / "wandb_id").read_text()}


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


def test_a_sweeps_jobs_are_grouped_and_named_by_their_choice(compose_config, monkeypatch):
    from hyperdflash.training import loggers

    config = compose_config("train", ["sweep=kl", "kl.alpha=0.5", "seed=2"])
    monkeypatch.setattr(loggers, "swept_here", lambda: {"kl.alpha": "0.5", "seed": "2"})
    place = wandb_place(config)
    assert (place["group"], place["job_type"]) == ("kl", "kl.alpha=0.5")
    assert place["tags"] == ["stage1", "tiny", "pre_hc_head-hc_gate", "sweep:kl"]
    flat = wandb_axes(compose_config("train", ["method=dflash_flat", "kl=paper"]))
    assert flat["method"] == "layers_flat-fc" and flat["axis_kl_alpha"] == 0.15
    assert wandb_axes(compose_config("train", ["method=mtp_finetuned"]))["method"] == "mtp_chain"
    assert set(WANDB_AXES) <= flat.keys() | {"axis_gamma"}


def test_the_dashboard_names_what_runs_log(compose_config):
    """Built by the library as far as it allows without a login: the view that `.save()` would send."""
    ws = pytest.importorskip("wandb_workspaces.workspaces", reason="needs pip install -e .[wandb]")
    from hyperdflash.training.wandb_dashboard import build_workspace

    workspace = build_workspace("team", "hyperdflash", sweep="kl")
    assert isinstance(workspace, ws.Workspace)
    view = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    named = set(re.findall(r"config:(axis_\w+)\.value", view))
    assert named == set(WANDB_AXES)
    record = {
        "tau": 2.0,
        "step": 3,
        "prompts": [{"domain": "code", "emitted": 4, "rounds": 2, "survived": [1] * 6, "reached": [1] * 6}],
    }
    logged = set(best_summary(record))
    assert set(re.findall(r"summary[_a-z]*[.:](best/\w+)", view)) <= logged
    assert {"val/tau", "val/survival_1", "val/conditional_6", "val/drafts"} <= set(re.findall(r"val/\w+", view))
    for kind in ("Parallel Coordinates Plot", "Bar Chart", "Scatter Plot", "Run History Line Plot"):
        assert kind in view, kind
