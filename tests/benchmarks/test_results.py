"""Every committed result is rendered from its record by the code at hand."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest

from benchmarks import kills
from benchmarks.result import RESULTS, in_turn

NAMES = sorted(path.stem for path in RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_result_is_rendered_from_its_record(name, tmp_path):
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    importlib.import_module(f"benchmarks.{name}").main(["--render", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads((RESULTS / f"{name}.json").read_text())


def test_the_recorded_kills_leave_no_difference():
    record = json.loads((RESULTS / "kills.json").read_text())
    assert len(record) == 2 and not any(part["differences"] for part in record.values())
    assert "| training, 1 rank, 60 steps | 20 | 21 | 0 tensors, states, metrics and files | 23 steps |" in (
        (RESULTS / "kills.md").read_text()
    )


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        kills.main(["speed"])
    assert "no part speed: there are training, 1 rank, training, 2 ranks" in capsys.readouterr().err


def test_every_result_has_one_record_and_one_text():
    assert {path.name for path in RESULTS.iterdir()} == {f"{name}.{kind}" for name in NAMES for kind in ("json", "md")}


def test_sides_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    found = in_turn({name: lambda n, name=name: calls.append((name, n)) or n for name in "ab"}, 2, "test", warm_up=1)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found == {"a": [1, 2], "b": [1, 2]}
