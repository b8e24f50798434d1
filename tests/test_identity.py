"""A run's name covers what decides its result, and nothing about where a class or the runs lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperdflash import options
from hyperdflash.identity import CONF, class_name, decided_by, run_name, runs_dir, within_runs

DRAFTER = """
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MyMTPConfig:
    num_slots: int = 6
"""


@pytest.fixture
def own_drafter(tmp_path, monkeypatch):
    """A user's drafter whose module has mtp in its name, as options of a configuration."""
    (tmp_path / "my_mtp_parts.py").write_text(DRAFTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(options, "accepted", {*options.accepted, str(tmp_path)})
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "mine.yaml").write_text("_target_: my_mtp_parts.MyMTPConfig\nnum_slots: 6\n")
    return [f"hydra.searchpath=[file://{tmp_path}]", "drafter=mine"]


def test_a_drafter_of_a_module_with_mtp_in_its_name_keeps_conditioning_and_reducer(own_drafter, compose_config):
    names = {
        run_name(compose_config("train", [*own_drafter, *words])) for words in ([], ["reducer=fc"], ["reducer.init=random"])
    }
    assert len(names) == 3 and all(name.startswith("stage1-pre_hc_head-") for name in names)


def test_a_drafter_that_reads_neither_has_one_name_with_any(compose_config):
    words = (["method=mtp_finetuned"], ["drafter=mtp", "kl=off"], ["drafter=mtp", "kl=off", "reducer=fc"])
    (name,) = {run_name(compose_config("train", list(own))) for own in words}
    assert name.startswith("stage1-mtp")


def test_a_drafter_without_its_conditioning_is_one_sentence(compose_config):
    with pytest.raises(ValueError, match="the method names none: give conditioning=NAME reducer=NAME"):
        run_name(compose_config("train", ["method=mtp_finetuned", "drafter=tiny"]))


def test_a_class_of_this_project_may_move_and_one_of_a_user_counts_by_its_path(compose_config):
    config = compose_config("train")
    before = run_name(config)
    config.reducer._target_ = "hyperdflash.elsewhere.HcGate"
    assert run_name(config) == before
    config.reducer._target_ = "my_parts.HcGate"
    other = run_name(config)
    config.reducer._target_ = "my_other_parts.HcGate"
    assert len({before, other, run_name(config)}) == 3
    assert decided_by(config)["reducer"]["option"] == "my_other_parts.HcGate"


SHORT = {"a.b.HcGate": "hc_gate", "a.MTPChainConfig": "mtp_chain", "KLConfig": "kl", "a.load_target": "load_target"}


@pytest.mark.parametrize(("path", "name"), SHORT.items())
def test_short_names(path, name):
    assert class_name({"_target_": path}) == name


def test_a_named_parent_counts_by_its_place_among_the_runs(compose_config, tmp_path, monkeypatch):
    inside = run_name(compose_config("train", [f"init_from={runs_dir()}/train/x"]))
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path / "moved"))
    assert within_runs(tmp_path / "moved/train/x") == "train/x" and within_runs("/else/x") == "/else/x"
    assert run_name(compose_config("train", [f"init_from={tmp_path}/moved/train/x"])) == inside


def test_the_number_of_steps_counts_where_it_is_given(compose_config):
    plain, short = (compose_config("train", words) for words in ([], ["trainer.max_steps=3"]))
    assert run_name(plain) != run_name(short) and "max_steps" not in decided_by(plain)["trainer"]


@pytest.mark.parametrize(
    ("named", "folder"), [("~/r", "home/r"), ("r", "r"), ("", None), (" ", None), ("~nobody-here/r", None)]
)
def test_the_folder_of_runs_is_expanded_or_refused(named, folder, monkeypatch):
    monkeypatch.setenv("HYPERDFLASH_RUNS", named)
    monkeypatch.setenv("HOME", "home")
    if folder is not None:
        assert runs_dir() == Path(folder)
    else:
        with pytest.raises(ValueError, match="names no folder"):
            runs_dir()


def test_every_method_says_what_it_is(compose_config):
    for path in sorted(Path(CONF, "method").glob("*.yaml")):
        method = compose_config("train", [f"method={path.stem}"]).method
        assert all(method[key] for key in ("title", "source", "differs")), path.stem
