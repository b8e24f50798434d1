"""`--help`, tab completion, and what both say of conf/."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hyperdflash import commands
from hyperdflash.command_help import command_help, read_comments
from hyperdflash.identity import CONF
from hyperdflash.report.sweep_runs import flat

WHOLE_GROUPS = ("${loss}", "${kl}")  # as terms of an objective


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "parity"])
def test_every_group_and_option_of_the_help_has_a_meaning(command, run_command):
    done = run_command(command, "--help")
    assert done.returncode == 0 and not done.stderr
    sentence, groups, options = re.split(r"\n\n(?:groups|options) \(.*\n", done.stdout)
    assert re.match(r"[A-Z][a-z]+s .*\.\n", sentence) and f"python -m src.{command}" in sentence
    assert re.search(r"^  target +deep \| deepseek_v4_flash \| \[tiny\]", groups, re.M)
    assert options.count("\n  ") > 8 and unexplained(options) == []


def unexplained(options: str) -> list[str]:
    said = re.sub(r"\n {40,}", " ", options).splitlines()
    return [line for line in said if not re.match(r"  [\w.]+=.*?  +\S", line)]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(CONF).glob("*.yaml")))
def test_every_option_of_every_command_has_a_meaning(name):
    sentence, options = re.split(r"\noptions \(.*\n", command_help(name))
    assert sentence[0].isupper() and unexplained(options) == []


def test_every_choice_of_a_group_and_its_options_have_a_meaning():
    files = [path for path in Path(CONF).glob("*/**/*.yaml") if path.parts[-3] != "hydra"]
    assert len(files) > 60 and [path for path in files if not read_comments(path)[0]] == []
    missing = []
    for path in files:
        if path.parent.name in ("method", "sweep", "experiment"):  # these set options of other groups
            continue
        known = {name for other in path.parent.glob("*.yaml") for name in read_comments(other)[1]}
        for name, value in flat(OmegaConf.to_container(OmegaConf.load(path), resolve=False)).items():
            own = "_" in (name[0], name.rpartition(".")[2][0]) or name == "defaults" or value in WHOLE_GROUPS
            missing += [] if own or {name, name.rpartition(".")[0]} & known else [f"{path.parent.name}/{path.stem}: {name}"]
    assert missing == []


def test_the_help_names_the_groups_that_a_command_reads_and_no_other():
    train, generate = command_help("train", ["kl=off"]), command_help("generate")
    assert re.search(r"^  kl +\[off\] \| paper$", train, re.M) and re.search(r"^  reducer +fc \| \[hc_gate\]", train, re.M)
    assert re.search(r"^  target +deep", generate, re.M)
    assert not re.search(r"^  (kl|optim|benchmarks|recipe|hydra\S*) ", generate, re.M) and "benchmarks" not in train
    assert "  kl.alpha=0.0 " in train and "hydra." not in train and "_target_" not in train


def test_comments_are_read_with_their_options(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "# @package _global_\n# What it does.\n# An example.\ndefaults:\n  - method: a   # all parts\n  - _self_\n"
        "one: 1   # first\n         # and more\ntwo:     # a group\n  three: 4  # inner\n  # a line of its own\nlast: null\n"
    )
    head, comments = read_comments(path)
    assert head == ["What it does.", "An example."]
    assert comments == {
        "method": "all parts",
        "one": "first and more",
        "two": "a group",
        "two.three": "inner",
    }


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("hyperdflash tr", {"train", "evaluate", "generate"}),
        ("hyperdflash train reducer=", {"reducer=hc_gate", "reducer=fc"}),
        ("hyperdflash evaluate bench", {"benchmarks=", "benchmarks."}),
        ("hyperdflash capture kl.al", {"kl.alpha="}),
        ("hyperdflash no_command ", set()),
    ],
)
def test_tab_completes_commands_groups_and_options(line, wanted, run_command, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setattr(sys, "argv", ["hyperdflash"])
    done = run_command(commands.main, "-sc", "query=bash")
    assert done.returncode == 0 and wanted <= set(done.stdout.split()), done


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_installed_completion_works_in_bash(tmp_path):
    """The script that the console script prints, in a shell that has the console script on its path."""
    console = tmp_path / "hyperdflash"
    console.write_text(
        f"#!{sys.executable}\nimport sys\nfrom hyperdflash.commands import main\nsys.exit(main())\n", encoding="utf-8"
    )
    console.chmod(0o755)
    script = (
        'eval "$(hyperdflash -sc install=bash)"; COMP_LINE="hyperdflash train reducer=hc"; COMP_POINT=28; COMP_CWORD=2; '
        'hydra_bash_completion 2> /dev/null; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["reducer=hc_gate", "reducer=hc_gates"], done
