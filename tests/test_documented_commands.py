"""Every command of README.md and docs/ composes: its options exist, in the entry point that it names. Every figure that a
document takes from the planner is what the planner says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from hyperdflash.planning.plan_job import make_plan, plan_markdown

ROOT = Path(__file__).resolve().parents[1]
OWN_CONFIG = (
    "train",
    "regenerate",
    "plan",
    "evaluate",
    "parity",
    "check_engine",
    "generate",
    "export",
    "pretrain",
    "card",
    "roofline",
)
CONFIG_OF = {"capture": "train"} | {name: name for name in OWN_CONFIG}
# nothing is run: `python` tells its arguments, other programs are not found
PRELUDE = """
PATH=/nowhere
python() { printf '%s\\x1f' "$@"; printf '\\n'; }
seq() { printf 1; }
make() { :; }; pip() { :; }; vllm() { :; }
"""


def documented(path: Path) -> list[tuple[str, list[str]]]:
    """(entry point, overrides) of each `python -m src.<entry point>` in a bash block; a document's variables reach its end."""
    found = []
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL)
    in_turn = re.sub(r"(?<!&)&(?!&)", ";", "\n".join(blocks))  # nothing in the background: its words would mix with others
    told = subprocess.run(["/bin/bash", "-c", PRELUDE + in_turn], capture_output=True, text=True, check=False)
    assert told.stderr == "", (path, told.stderr)
    for line in told.stdout.splitlines():
        words = line.split("\x1f")[:-1]
        if words[:1] == ["-m"] and words[1].startswith("src."):
            found.append((words[1].removeprefix("src."), words[2:]))
    return found


DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = [command for path in DOCUMENTS for command in documented(path)]


def test_there_are_commands():
    assert {"train", "capture", "plan", "evaluate", "regenerate", "check_engine", "parity"} <= {name for name, _ in COMMANDS}


def first_job(words: list[str]) -> list[str]:
    """Of a sweep: the first value of each axis."""
    if "-m" not in words and not any(word.startswith("sweep=") for word in words):
        return words
    return [re.sub(r"=([^=,\[{]+),.*", r"=\1", word) for word in words if word != "-m"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(name, first_job(words)) for name, words in COMMANDS if name in CONFIG_OF],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:80],
)
def test_its_options_compose(name, overrides, compose_config, shown_files):
    compose_config(CONFIG_OF[name], overrides)


@pytest.mark.parametrize("document", ["README.md", "docs/api.md"])
def test_its_python_runs(document, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile("\n".join(blocks), document, "exec"), names)
    assert names["answer"].text in capsys.readouterr().out and names["answer"].generation.tau > 1


def test_its_module_exists():
    for name, _ in COMMANDS:
        path = ROOT / "src" / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_the_planner_says_what_the_tables_say(compose_config):
    """A table with a heading of the planner's has rows of the plans that its document asks for, word by word."""
    path = ROOT / "docs" / "deepseek_v4_flash.md"
    printed = set()
    for overrides in [overrides for name, overrides in documented(path) if name == "plan"]:
        printed |= set(plan_markdown(make_plan(compose_config("plan", overrides))).splitlines())
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), flags=re.MULTILINE)]
    planned = [table for table in tables if table[0] in printed]
    assert len(planned) == 4 and len(tables) == 5  # the last one is of what was run
    wrong = [row for table in planned for row in table if row not in printed]
    assert not wrong, "the plans say otherwise:\n" + "\n".join(wrong)
