"""Provenance: the command, revision and versions that a run records at every start."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

from hyperdflash.files import read_json, write_text

STARTS = "run.json"
PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "torchmetrics", "datasets", "wandb", "safetensors")


def write_json(path: Path, record: dict) -> None:
    """Writes ``record`` as JSON; the file appears only when complete."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def training_code(source: Path) -> str:
    """Returns a digest of every module of the package that a training can reach: all but reports and plans."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("[!.]*.py")):
        name = path.relative_to(source)
        if name.parts[0] not in ("report", "planning"):
            digest.update(str(name).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def environment_record(command: str) -> dict:
    """Returns command, git revision and uncommitted diff (None outside a checkout), digest of the code, and versions."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    return {
        "command": command,
        "git_revision": (git("rev-parse", "HEAD") or "").strip() or None,
        "git_diff": git("diff", "HEAD"),
        "training_code": training_code(package),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    """Returns None for an extra that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_start(run: Path, command: str) -> None:
    """Appends this start to run/run.json: its time in UTC and ``environment_record``; earlier starts stay as they are."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(run / STARTS, {"starts": [*read_starts(run), {"time": now, **environment_record(command)}]})


def read_starts(run: Path) -> list[dict]:
    """Returns the records of ``add_start``, first start first; empty if the run has none."""
    path = run / STARTS
    return read_json(path, "remove the file, which records the run's starts alone", "starts")["starts"] if path.exists() else []
