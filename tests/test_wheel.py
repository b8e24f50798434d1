"""The wheel: it holds all that a command reads, and it runs from a folder that knows nothing of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hyperdflash.identity import run_name

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "conf", "assets", "tiny_target", "pyproject.toml", "setup.py", "README.md", "LICENSE")

NAME_OF_THE_RUN = """
from hydra import compose, initialize_config_dir
from hyperdflash.identity import CONF, run_name
with initialize_config_dir(CONF, version_base="1.3"):
    print(run_name(compose("train")))
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder in which the wheel of this checkout is installed, without its dependencies."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:  # a copy: a build leaves folders behind
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", out], check=True)
    (wheel,) = out.glob("*.whl")
    subprocess.run([*pip, "install", wheel, "--no-deps", "--no-index", "--no-compile", "--target", out / "site"], check=True)
    return out / "site"


def hyperdflash(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The installed console script, run in ``folder``."""
    return python(site, folder, str(site / "bin" / "hyperdflash"), *words)


def python(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "HYPERDFLASH_RUNS"} | {"PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_files_that_commands_read(site):
    for folder in ("conf", "assets"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file():
                assert (site / "hyperdflash" / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path
    for package, folder in (("hyperdflash", ROOT / "src" / "hyperdflash"), ("tiny_target", ROOT / "tiny_target")):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (site / package / path.relative_to(folder)).is_file(), path
    assert not (site / "src").exists() and not (site / "train.py").exists()


def test_a_command_runs_from_another_folder(site, tmp_path, compose_config):
    overview = hyperdflash(site, tmp_path)
    assert overview.returncode == 0 and "train a drafter" in overview.stdout
    told = hyperdflash(site, tmp_path, "train", "--help")
    assert told.returncode == 0 and "[pre_hc_head]" in told.stdout, told.stderr
    composed = hyperdflash(site, tmp_path, "train", "--cfg", "job", "--resolve")
    assert composed.returncode == 0, composed.stderr
    config = yaml.safe_load(composed.stdout)
    assert config["target"]["path"] == str(site / "hyperdflash" / "assets" / "tiny")
    named = python(site, tmp_path, "-c", NAME_OF_THE_RUN)
    assert named.stdout.strip() == run_name(compose_config("train")), "a run's name changes with the folder"


def test_a_users_relative_path_is_relative_to_where_the_user_stands(site, tmp_path):
    composed = hyperdflash(site, tmp_path, "train", "--cfg", "job", "--resolve", "target.path=mine")
    assert yaml.safe_load(composed.stdout)["target"]["path"] == "mine"
    failed = hyperdflash(site, tmp_path, "train", "target.path=mine")
    assert failed.returncode == 1 and "mine" in failed.stderr and "Traceback" not in failed.stderr


def test_an_unknown_command_is_one_sentence(site, tmp_path):
    unknown = hyperdflash(site, tmp_path, "trian")
    assert unknown.returncode == 1 and "no command 'trian' (did you mean train?)" in unknown.stderr
