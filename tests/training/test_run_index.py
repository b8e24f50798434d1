"""A run is found by what decided it: by a method's name, by its directory, and as a parent; from made-up result.json files."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from hyperdflash.evaluation.methods import compose_method, find_run
from hyperdflash.identity import decided_by, runs_dir
from hyperdflash.training.run_index import RunIndex, find_stage1, finished_run, parent_of


@pytest.fixture
def finish(compose_config, mini_target):
    """finish("name", "method=dflash", ...) writes the record of such a run and returns its directory."""

    def write(name: str, *words: str, **record):
        given = [f"target.path={mini_target}", "experiment=stage2", *words]
        given = given[1:] if any(word.startswith("target.path=") for word in words) else given
        given = [word for word in given if word != "experiment=stage2" or "experiment=stage1" not in words]
        run = runs_dir() / "train" / name
        run.mkdir(parents=True)
        decided = decided_by(compose_config("train", given))
        (run / "result.json").write_text(json.dumps({"decided_by": decided, "target": "f", "init_from": None, **record}))
        return run

    return write


@pytest.fixture
def found(compose_config, mini_target):
    """found("dflash", training="seed=1") -> the directory that an evaluation takes for a method."""

    def find(method: str, training: str = "", *words: str):
        config = compose_config("evaluate", [f"target.path={mini_target}", *words])
        config.training = training
        return find_run(method, compose_method(method, training), config).directory

    return find


VANILLA = ("method=dflash", "conditioning.layer_ids=[0,2]")  # the rule for layers does not fit four layers


def test_a_method_is_found_among_runs_of_other_parts_stages_seeds_and_targets(finish, found, capsys, tmp_path):
    finish("gate", "method=hyperdflash")
    finish("flat", "method=dflash_flat", "conditioning.layer_ids=[0,2]")
    finish("first", *VANILLA, "experiment=stage1")
    finish("other seed", *VANILLA, "seed=1")
    finish("with kl", *VANILLA, "kl=paper")
    finish("other target", *VANILLA, f"target.path={tmp_path}")
    finish("tuned", "method=mtp_finetuned")
    right = finish("right", *VANILLA)
    assert found("dflash") == right and "differs" not in capsys.readouterr().out
    assert found("dflash", "seed=1").name == "other seed" and found("dflash", "experiment=stage1").name == "first"
    assert found("mtp_finetuned").name == "tuned" and found("hyperdflash").name == "gate"
    with pytest.raises(ValueError, match=r"run `python -m src\.train method=pre_fc experiment=stage2` first"):
        found("pre_fc")


def test_the_nearest_of_several_runs_is_taken_and_its_differences_are_printed(finish, found, capsys):
    finish("far", "method=hyperdflash", "drafter.num_layers=4", "blocks.num_anchors=3")
    finish("near", "method=hyperdflash", "drafter.num_layers=4")
    assert found("hyperdflash").name == "near"
    text = capsys.readouterr().out
    assert "train/near, the nearest of 2 runs" in text and "differs in drafter.num_layers: the run has 4" in text
    assert found("hyperdflash", "drafter.num_layers=4 blocks.num_anchors=3").name == "far"


def test_two_that_fit_alike_are_refused_by_name(finish, found):
    finish("one", "method=hyperdflash", "blocks.num_anchors=3")
    finish("two", "method=hyperdflash", "blocks.num_anchors=4")
    with pytest.raises(ValueError, match=r"has 2 finished runs that fit alike, (one, two|two, one): give one") as caught:
        found("hyperdflash")
    assert "\n" not in str(caught.value)
    assert found("hyperdflash", "blocks.num_anchors=4").name == "two"


def test_a_moved_runs_folder_keeps_its_parents(finish, compose_config, mini_target, tmp_path, monkeypatch):
    parent = finish("parent", "experiment=stage1", best_checkpoint="x")
    config = compose_config("train", ["experiment=stage2", f"target.path={mini_target}"])
    run = runs_dir() / "train" / "child"
    assert parent_of(config, run) == find_stage1(config) == parent
    assert json.loads((run / "parent.json").read_text()) == {"init_from": "train/parent"}
    child = finish("grown", init_from="train/parent", best_checkpoint="x")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(parent.parent, moved / "train")
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(moved))
    assert parent_of(config, moved / "train" / "child") == moved / "train" / "parent"
    assert finished_run(moved / "train" / child.name).parent == moved / "train" / "parent"


def test_a_parent_of_equal_nearness_is_the_newest(finish, compose_config, mini_target, capsys):
    for age, name in enumerate(("new", "old")):
        run = finish(name, "experiment=stage1", f"blocks.num_anchors={age + 3}")
        os.utime(run / "result.json", (100 - age, 100 - age))
    config = compose_config("train", ["experiment=stage2", f"target.path={mini_target}"])
    assert find_stage1(config).name == "new"
    assert "train/new, the nearest of 2 finished stage-1 runs" in capsys.readouterr().out


def test_unfinished_and_damaged_runs_are_named(finish, tmp_path):
    (tmp_path / "train" / "stage1-broken-00000000").mkdir(parents=True)
    assert list(RunIndex()) == []
    (tmp_path / "train" / "stage1-broken-00000000" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged .*: remove the file"):
        list(RunIndex())
    (tmp_path / "train" / "stage1-broken-00000000").rename(tmp_path / "train" / "of somebody else")
    assert list(RunIndex()) == []
    with pytest.raises(ValueError, match="is not a finished run"):
        finished_run(tmp_path / "train" / "nobody")


def test_a_run_of_another_version_is_refused_by_one_sentence(finish, capsys):
    old = finish("old", *VANILLA)
    record = json.loads((old / "result.json").read_text())
    record["decided_by"]["recipe"] -= 1
    (old / "result.json").write_text(json.dumps({**record, "command": "python -m src.train method=dflash"}))
    with pytest.raises(ValueError, match=r"another version of the code: train it again .*python -m src\.train method=dflash"):
        finished_run(old)
    new = finish("new", *VANILLA)
    assert [run.directory for run in RunIndex()] == [new]
    assert "1 runs of another version of the code are left out" in capsys.readouterr().out
