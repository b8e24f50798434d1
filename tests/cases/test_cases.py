"""Runs every case of the tables beside this file: exit code, one sentence and no traceback, and what is on disk afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import of_faults, of_options, of_rows, of_runs
from tests.cases.harness import Case, rows, sentences, words_of
from tests.conftest import text_rows

ROOT = Path(__file__).resolve().parents[2]
CASES = [case for table in (of_rows, of_runs, of_options, of_faults) for case in table.CASES]


@pytest.fixture(scope="session")
def folders(mini_target, tmp_path_factory) -> dict[tuple[str, ...], Path]:
    """Finished folders by the commands that have run in them."""
    fresh = tmp_path_factory.mktemp("cases") / "fresh"
    shutil.copytree(mini_target, fresh / "target")
    rows("rows.jsonl", *text_rows(60))(fresh)
    return {(): fresh}


@pytest.fixture
def folder(folders, run_command, monkeypatch, tmp_path):
    """folder(commands) copies the folder in which they have run, and goes there."""
    monkeypatch.setenv("HYPERDFLASH_RUNS", "runs")

    def enter(commands: tuple[str, ...]) -> Path:
        here = tmp_path / str(len(commands))
        if commands not in folders:
            made = enter(commands[:-1])
            done = run_command(*words_of(commands[-1]))
            assert done.returncode == 0, done.stderr
            folders[commands] = shutil.copytree(made, folders[()].with_name(f"{len(folders)}"))
        shutil.copytree(folders[commands], here, dirs_exist_ok=True)
        monkeypatch.chdir(here)
        return here

    return enter


def run_apart(command: str, *words: str) -> subprocess.CompletedProcess:
    """Runs `python -m src.COMMAND` in the current folder and environment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-m", f"src.{command}", *words]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, folder, run_command, monkeypatch):
    here = folder(tuple(case.after))
    for change in case.make:
        change(here)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with case.within():
        done = (run_apart if case.apart else run_command)(*words_of(case.command))
    output = done.stdout + done.stderr
    assert done.returncode == case.code, output
    assert "Traceback" not in output, output
    one = case.code == 0 or "-m" in words_of(case.command)  # a sweep has a sentence per job
    assert one or len(sentences(done.stderr)) == 1, done.stderr
    assert [word for word in case.words if word not in output] == [], output
    assert [glob for glob in case.exist if not any(here.glob(glob))] == []
    assert [glob for glob in case.absent if any(here.glob(glob))] == []
    if case.check is not None:
        case.check(here)


def test_no_two_cases_have_one_name():
    assert len({case.name for case in CASES}) == len(CASES)
