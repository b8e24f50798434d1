"""Rules that hold for the repository as a whole: who imports whom, what files hold, that every named command exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PACKAGE = SRC / "hyperdflash"

# The package in data order: a module imports only from what stands left of its own folder or file, or from its own folder.
# Folders of one tuple may import each other. src/*.py are entry points: they stand right of everything and do not import each
# other.
ORDER = [
    "contracts",
    "settings",
    "files",
    "leases",
    "stable_hash",
    "numerics",
    "record",
    "journal",
    "options",
    "optim",
    "data",
    "targets",
    "engines",
    "answers",
    "states",
    "objectives",
    "drafting",
    "identity",
    "report",
    "decoding",
    "command_help",
    "cli",
    ("preparing", "training", "launch", "evaluation", "checks", "planning", "generation", "export"),
    "commands",
]
PLACES = {unit: place for place, units in enumerate(ORDER) for unit in ([units] if isinstance(units, str) else units)}
TORCH_PACKAGES = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers"}
BESIDE = {"tiny_target", "benchmarks"}  # they import the package, never the other way round
MAX_BYTES = 8_000_000
VAGUE_NAMES = {"utils.py", "common.py", "helpers.py", "util.py", "misc.py"}
# Absolute paths of somebody's machine, written in parts so that this file passes too.
FOREIGN_PATH = re.compile(r"(?<![\w.~})*-])/(?:" + "|".join(["work", "root"]) + ")/")


def dotted(path: Path) -> str:
    """src/hyperdflash/objectives/__init__.py -> hyperdflash.objectives; src/train.py -> src.train"""
    parts = path.relative_to(SRC if PACKAGE in path.parents else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(name: str) -> Path | None:
    """hyperdflash.objectives -> src/hyperdflash/objectives/__init__.py; None where ``name`` is no module of this project."""
    base = (SRC if name.split(".")[0] == "hyperdflash" else ROOT).joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def imports(path: Path, text: str | None = None) -> Iterator[str]:
    """Dotted names a module imports, anywhere in it: in functions and under TYPE_CHECKING too.

    ``from hyperdflash import objectives`` gives hyperdflash.objectives, not hyperdflash.
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
                whole = base in ("src", "hyperdflash") or (base.startswith("hyperdflash.") and module_file(name))
                yield name if whole else base


def order_violations(path: Path, text: str | None = None) -> list[str]:
    """Imports of ``path`` that do not go left in ORDER; nothing imports an entry point."""
    parts = dotted(path).split(".")
    own = parts[1] if parts[0] == "hyperdflash" and len(parts) > 1 else None
    wrong = []
    for name in sorted(set(imports(path, text))):
        root, _, rest = name.partition(".")
        unit = rest.split(".")[0]
        beside = root in BESIDE and parts[0] == "hyperdflash"
        right = (
            root == "hyperdflash"
            and own is not None
            and unit not in (own, *peers(own))
            and PLACES.get(unit, len(ORDER)) >= PLACES[own]
        )
        if root == "src" or beside or right:
            wrong.append(f"{path.relative_to(ROOT)} imports {root}.{unit}")
    return sorted(set(wrong))


def peers(unit: str) -> tuple[str, ...]:
    """Folders that ``unit`` shares a place with."""
    units = ORDER[PLACES[unit]]
    return () if isinstance(units, str) else units


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
    """Commands that ``make target`` would run after ``make setup``; without what the make of ``make test`` hands down."""
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "RUNS"}}
    command = ["make", "-n", "-o", ".venv/.done", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_imports_go_left():
    units = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"}
    assert units == set(PLACES), f"give every folder and file of the package a place in ORDER: {sorted(units ^ set(PLACES))}"
    wrong = [line for path in sorted(SRC.rglob("*.py")) for line in order_violations(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("src/hyperdflash/drafting/x.py", "from hyperdflash.objectives.objective import Objective", []),
        ("src/hyperdflash/objectives/x.py", "from hyperdflash.objectives.objective import Objective", []),
        ("src/hyperdflash/objectives/x.py", "from hyperdflash.decoding import replay", ["hyperdflash.decoding"]),
        ("src/hyperdflash/objectives/x.py", "from hyperdflash.drafting import drafter", ["hyperdflash.drafting"]),
        (
            "src/hyperdflash/objectives/x.py",
            "if TYPE_CHECKING:\n    from hyperdflash.training.job import train",
            ["hyperdflash.training"],
        ),
        ("src/hyperdflash/objectives/x.py", "def f():\n    import hyperdflash.report.tables", ["hyperdflash.report"]),
        ("src/hyperdflash/objectives/x.py", "from hyperdflash import training, settings", ["hyperdflash.training"]),
        ("src/hyperdflash/objectives/x.py", "from ..decoding import replay", ["hyperdflash.decoding"]),
        ("src/hyperdflash/objectives/x.py", "from . import objective", []),
        ("src/hyperdflash/objectives/x.py", "import src.hyperdflash.contracts", ["src.hyperdflash"]),
        ("src/hyperdflash/contracts.py", "import hyperdflash.settings", ["hyperdflash.settings"]),
        ("src/hyperdflash/data/x.py", "from tiny_target.corpus.embedded import load_embedded", ["tiny_target.corpus"]),
        ("src/hyperdflash/data/x.py", "def f():\n    import benchmarks.step", ["benchmarks.step"]),
        ("src/hyperdflash/__init__.py", "import src.train", ["src.train"]),
        ("src/pretrain.py", "from tiny_target.pretraining import pretrain", []),
        ("src/train.py", "from hyperdflash.training.job import train", []),
        ("src/train.py", "from src.evaluate import main", ["src.evaluate"]),
        ("src/hyperdflash/training/x.py", "from src.train import main", ["src.train"]),
    ],
)
def test_the_import_check_sees(file, text, found):
    assert [line.split()[-1] for line in order_violations(ROOT / file, text)] == found


def test_only_their_own_tests_import_the_benchmarks():
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if (ROOT / "tests" / "benchmarks") not in path.parents]
    wrong = [str(p.relative_to(ROOT)) for p in tests if any(name.split(".")[0] == "benchmarks" for name in imports(p))]
    assert tests and not wrong, f"move what they share into tests/ or the package: {wrong}"


def test_nothing_imports_the_package_under_a_second_name():
    """`src.hyperdflash` would be a second copy of every module and class."""
    wrong = [str(p.relative_to(ROOT)) for p in repository_files() if re.search(r"\bsrc\.hyper" + "dflash", text_of(p))]
    assert wrong in ([], [str(Path(__file__).relative_to(ROOT))]), wrong


V4_CLASS = re.compile(r"\bDeepseekV4")
UNDOCUMENTED = re.compile(
    r"\b_(?:attn_implementation|experts_implementation|init_weights|hf_hook|apply_gate|layer_type)\b|\bhf_device_map\b"
    r"|\bALL_\w+_FUNCTIONS\b|\bpast_key_values\b|\btransformers\.(?:cache_utils|masking_utils|modeling_utils|integrations)\b"
)  # what transformers and accelerate change without notice

HYDRA = re.compile(r"\bhydra\._internal\b|\bhydra\.core\.override_parser\b")
LIGHTNING = re.compile(r"\blightning(?:\.\w+)*\._\w|\b(?:trainer|fit_loop|epoch_loop|strategy)\._\w|\b_train_progress_bar\b")
WANDB = re.compile(r"\bwandb(?:\.\w+)*\._\w|\b(?:wandb_run|workspace|experiment)\._\w")


def lines_with(pattern: re.Pattern, texts: dict[str, str], allowed: str) -> list[str]:
    """Lines of ``texts`` (path -> text) that match, but for files whose path begins with ``allowed``."""
    return [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts.items()
        if not path.startswith(allowed)
        for number, line in enumerate(text.split("\n"), start=1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize(
    ("pattern", "allowed", "line"),
    [
        (V4_CLASS, "src/hyperdflash/targets/deepseek_v4/", "from transformers import DeepseekV4Config"),
        (UNDOCUMENTED, "src/hyperdflash/targets/deepseek_v4/compat.py", "config._attn_implementation = 'eager'"),
        (HYDRA, "src/hyperdflash/journal.py", "from hydra._internal.hydra import Hydra"),
        (LIGHTNING, "src/hyperdflash/training/checkpoints.py", "trainer.fit_loop._data_source"),
        (WANDB, "src/hyperdflash/training/wandb_record.py", "wandb_run._log_artifact(artifact)"),
    ],
    ids=["classes of the model file", "undocumented names", "Hydra", "Lightning", "W&B"],
)
def test_one_place_depends_on_what_a_library_may_change(pattern, allowed, line):
    texts = {str(p.relative_to(ROOT)): text_of(p) for folder in (SRC, ROOT / "tiny_target") for p in folder.rglob("*.py")}
    wrong = lines_with(pattern, texts, allowed)
    assert not wrong, f"only {allowed} may say this:\n" + "\n".join(wrong)
    assert any(pattern.search(text) for path, text in texts.items() if path.startswith(allowed))
    assert lines_with(pattern, {"src/hyperdflash/drafting/x.py": line}, allowed)


def test_report_imports_no_torch():
    waiting, seen, wrong = sorted(set((PACKAGE / "report").rglob("*.py"))), set(), []
    assert waiting
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            if name.split(".")[0] in TORCH_PACKAGES:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            # importing hyperdflash.a.b runs the __init__.py of hyperdflash and of hyperdflash.a first
            parts = name.split(".")
            ancestors = (".".join(parts[: i + 1]) for i in range(len(parts))) if parts[0] == "hyperdflash" else ()
            waiting += [file for ancestor in ancestors if (file := module_file(ancestor))]
    assert not wrong, "\n".join(wrong)


def test_one_file_outside_the_target_names_the_lm_heads_weight_and_none_asks_for_a_drafters_kind():
    """Everything else reads logits of a draft head, and asks a drafter instead of its class."""
    rooms = ("objectives", "drafting", "decoding", "checks", "training", "evaluation", "generation")
    files = [path for room in rooms for path in sorted((PACKAGE / room).rglob("*.py"))]
    naming = [path.name for path in files if re.search(r"lm_head\.weight|\.lm_head\b(?! import)", text_of(path))]
    assert naming == ["factored_logits.py"]
    kinds = r"isinstance\([^)]*\b(?:Drafter|DrafterConfig|MTPChain|MTPChainConfig|BlockProposer|MTPProposer)\b"
    assert not [str(path.relative_to(ROOT)) for path in files if re.search(kinds, text_of(path))]


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
        for name in sorted(set(re.findall(r"-m ((?:src|hyperdflash|benchmarks|tiny_target)(?:\.\w+)+)", text_of(path)))):
            base = (SRC if name.startswith("hyperdflash") else ROOT).joinpath(*name.split("."))
            if not (base.with_suffix(".py").is_file() or (base / "__main__.py").is_file()):
                wrong.append(f"{path.relative_to(ROOT)}: python -m {name}")
    assert not wrong, "no such module:\n" + "\n".join(wrong)


def test_the_console_script_and_the_entry_points_run_the_same():
    from hyperdflash.commands import COMMANDS

    places = {name: place.split(":") for group in COMMANDS.values() for name, (place, _) in group.items()}
    assert set(places) == {path.stem for path in SRC.glob("*.py")} - {"__init__"}
    for name, (module, function) in places.items():
        imported = f"from {module} import {function}"
        assert re.search(rf"^{imported}( as main)?$", text_of(SRC / f"{name}.py"), re.MULTILINE), f"src/{name}.py: {imported}"


def test_demo_trains_what_evaluate_measures():
    methods = OmegaConf.load(ROOT / "conf/evaluate.yaml").methods
    trained = [name for name in methods if "native_steps" not in OmegaConf.load(ROOT / f"conf/method/{name}.yaml").method]
    named = re.search(r"^METHODS := (.*)$", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    assert sorted(named[1].split()) == sorted(trained)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_demo_trains_both_stages_of_each_method_on_states_that_exist_and_measures_last():
    lines = make_dry_run("demo")
    commands = [line.split(" -m ", 1)[1].split(" 2>&1")[0] for line in lines if ".venv/bin/python -m " in line]
    commands = [command for command in commands if command.startswith("src.")]
    captured = [commands.index(f"src.capture method=dflash experiment={stage}") for stage in ("stage1", "stage2")]
    trained = [commands.index(command) for command in commands if command.startswith("src.train")]
    assert len(trained) == 4 and min(trained) > max(captured)
    assert all(commands[index].endswith(" experiment=stage1,stage2") for index in trained)
    assert [command.split()[0] for command in commands[-2:]] == ["src.evaluate", "src.roofline"]


def test_links_to_files_of_the_repository_lead_somewhere():
    """Relative links and pictures of all Markdown."""
    wrong, seen = [], 0
    for path in (path for path in repository_files() if path.suffix == ".md"):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(path)):
            if "://" not in link and not link.startswith("mailto:"):
                seen += 1
                wrong += [] if (path.parent / link).exists() else [f"{path.relative_to(ROOT)}: {link}"]
    assert seen and not wrong, "\n".join(wrong)
