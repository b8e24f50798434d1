"""Rules that hold for the repository as a whole: who imports whom, what files hold, that every named command exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"

# src/ in data order: a module imports only from what stands left of its own folder or file, or from its own folder.
# Files that are not named here, and a folder's __main__, are entry points; they stand right of everything and do not import
# each other.
ORDER = [
    "contracts",
    "settings",
    "files",
    "muon",
    "corpus",
    "target",
    "cache",
    "blocks",
    "drafter",
    "loss",
    "decode",
    "report",
    "entry",
    "lit",
    "bench",
]
TORCH_PACKAGES = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers"}
MAX_BYTES = 8_000_000
VAGUE_NAMES = {"utils.py", "common.py", "helpers.py", "util.py", "misc.py"}
# Absolute paths of somebody's machine, written in parts so that this file passes too.
FOREIGN_PATH = re.compile(r"(?<![\w.~})*-])/(?:" + "|".join(["work", "root"]) + ")/")


def dotted(path: Path) -> str:
    """src/loss/__init__.py -> src.loss"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(name: str) -> Path | None:
    """src.loss -> src/loss/__init__.py, None where ``name`` is no module of this project."""
    base = ROOT.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def imports(path: Path, text: str | None = None) -> Iterator[str]:
    """Dotted names a module imports, anywhere in it: in functions and under TYPE_CHECKING too.

    ``from src import loss`` gives src.loss, not src; ``from src.loss import objective`` gives src.loss.objective.
    """
    package = dotted(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if base == "src" or (base.startswith("src.") and module_file(name)) else base


def order_violations(path: Path, text: str | None = None) -> list[str]:
    def rank(unit: str) -> int:
        return ORDER.index(unit) if unit in ORDER else len(ORDER)

    folder = dotted(path).split(".")[1]
    own = "__main__" if path.name == "__main__.py" else folder
    units = {name.split(".")[1] for name in imports(path, text) if name.startswith("src.")} - {folder}
    return [f"{path.relative_to(ROOT)} imports src.{unit}" for unit in sorted(units) if rank(unit) >= rank(own)]


def repository_files() -> list[Path]:
    """What is committed or would be: tracked, or neither tracked nor ignored."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """Its text; empty for binary files and for files that are not there."""
    data = path.read_bytes() if path.is_file() else b""
    try:
        return "" if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return ""


def code_of_readme() -> str:
    """Code blocks and code spans of README.md: prose may say "make sure"."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text_of(ROOT / "README.md"), flags=re.DOTALL))


def make_dry_run(target: str) -> list[str]:
    """Commands that ``make target`` would run. Runs under ``make test`` too, so without what that make hands down."""
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "RUNS"}}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_imports_go_left():
    folders = {path.parent.name for path in SRC.glob("*/*.py")}
    assert folders <= set(ORDER), f"give these folders of src/ a place in ORDER: {sorted(folders - set(ORDER))}"
    modules = [path for path in sorted(SRC.rglob("*.py")) if path != SRC / "__init__.py"]
    wrong = [line for path in modules for line in order_violations(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("src/loss/x.py", "from src.drafter.model import Drafter", []),
        ("src/loss/x.py", "from src.loss.objective import Objective", []),
        ("src/loss/x.py", "from src.decode import replay", ["src.decode"]),
        ("src/loss/x.py", "if TYPE_CHECKING:\n    from src.lit.run import train", ["src.lit"]),
        ("src/loss/x.py", "def f():\n    import src.report.tables", ["src.report"]),
        ("src/loss/x.py", "from src import lit, blocks", ["src.lit"]),
        ("src/loss/x.py", "from ..decode import replay", ["src.decode"]),
        ("src/loss/x.py", "from . import objective", []),
        ("src/contracts.py", "import src.settings", ["src.settings"]),
        ("src/train.py", "from src.lit.run import train", []),
        ("src/train.py", "from src.evaluate import main", ["src.evaluate"]),
        ("src/report/__main__.py", "from src.lit.run import train", []),
        ("src/report/__main__.py", "from src.train import main", ["src.train"]),
        ("src/lit/x.py", "from src.train import main", ["src.train"]),
    ],
)
def test_the_import_check_sees(file, text, found):
    assert [line.split()[-1] for line in order_violations(ROOT / file, text)] == found


def test_report_imports_no_torch():
    waiting, seen, wrong = sorted(set((SRC / "report").rglob("*.py")) - {SRC / "report" / "__main__.py"}), set(), []
    assert waiting
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            if name.split(".")[0] in TORCH_PACKAGES:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            # importing src.a.b runs src/__init__.py and src/a/__init__.py first
            parts = name.split(".")
            ancestors = (".".join(parts[: i + 1]) for i in range(len(parts))) if parts[0] == "src" else ()
            waiting += [file for ancestor in ancestors if (file := module_file(ancestor))]
    assert not wrong, "\n".join(wrong)


def test_no_path_of_a_machine():
    wrong = []
    for path in repository_files():
        for number, line in enumerate(text_of(path).split("\n"), start=1):
            if FOREIGN_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_the_path_check_sees():
    here = "/" + "work" + "/main"
    assert FOREIGN_PATH.search(f"see {here}") and FOREIGN_PATH.search(f'"{here}"')
    assert not FOREIGN_PATH.search(f"https://example.org{here}") and not FOREIGN_PATH.search(f"./net{here}")


def test_files_are_small_and_named_for_what_they_hold():
    files = repository_files()
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in files if p.stat().st_size > MAX_BYTES}
    assert not large, f"over {MAX_BYTES:,} bytes: {large}"
    vague = [str(p.relative_to(ROOT)) for p in files if p.name in VAGUE_NAMES]
    assert not vague, f"name the concept: {vague}"


def test_named_make_targets_exist():
    makefile = text_of(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.MULTILINE))
    documented = set(re.findall(r"^([a-z][\w-]*):.*## ", makefile, flags=re.MULTILINE))
    assert targets == documented, f"without a ## comment for `make help`: {sorted(targets - documented)}"
    scripts = "\n".join(text_of(ROOT / name) for name in (".ci/run", ".github/workflows/ci.yml"))
    called = set(re.findall(r"^\s*(?:- run: )?make ([a-z][\w-]*)", scripts, flags=re.MULTILINE))
    assert {"test", "lint"} <= called
    named = called | set(re.findall(r"\bmake ([a-z][\w-]*)", code_of_readme()))
    assert named <= targets, f"no such target: {sorted(named - targets)}"


def test_named_modules_exist():
    """Whatever text says `python -m src.x`, README, error message or comment, names something that runs."""
    files = [
        ROOT / "README.md",
        ROOT / "Makefile",
        ROOT / ".ci/run",
        *SRC.rglob("*.py"),
        *(ROOT / "conf").rglob("*.yaml"),
    ]
    wrong = []
    for path in files:
        for name in sorted(set(re.findall(r"-m (src(?:\.\w+)+)", text_of(path)))):
            base = ROOT.joinpath(*name.split("."))
            if not (base.with_suffix(".py").is_file() or (base / "__main__.py").is_file()):
                wrong.append(f"{path.relative_to(ROOT)}: python -m {name}")
    assert not wrong, "no such module:\n" + "\n".join(wrong)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_demo_trains_what_evaluate_measures():
    commands = [re.search(r"-m (src\.\w+) ?(.*)", line) for line in make_dry_run("demo")]
    commands = [(found[1], frozenset(shlex.split(found[2]))) for found in commands if found]
    trained = [overrides for module, overrides in commands if module == "src.train"]
    assert commands[-1][0] == "src.evaluate"
    methods = [m for m in OmegaConf.load(ROOT / "conf/compare/all.yaml").methods if "train" in m]
    assert methods
    for method in methods:
        stage2 = frozenset(method.train)
        stage1 = stage2 - {"experiment=stage2"} | {"experiment=stage1"}
        for overrides in (stage1, stage2):
            assert overrides in trained, f"make demo does not run what {method.name!r} needs: {sorted(overrides)}"
        assert trained.index(stage1) < trained.index(stage2), method.name
