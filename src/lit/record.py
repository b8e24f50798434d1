"""What a run writes down about where it came from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "torchmetrics", "datasets", "wandb", "safetensors")


def write_json(path: Path, record: dict) -> None:
    """The file appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)


def environment_record(command: str) -> dict:
    """Command, git revision and uncommitted diff (None outside a checkout), Python and library versions."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    return {
        "command": command,
        "git_revision": revision.strip() if revision else None,
        "git_diff": git("diff", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
