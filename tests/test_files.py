"""A file is there whole or not at all, whoever writes it at the same time."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import OmegaConf

from hyperdflash.files import write_text
from hyperdflash.launch.child import save_job


def test_processes_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / "new" / "corpus.json", Path.replace, []

    def overtaken(partial: Path, target: Path) -> Path:
        """Another process writes the same file when this one has written and not yet renamed."""
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        write_text(path, "theirs")
        seen.append(path.read_text())
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    write_text(path, "ours")
    assert seen == ["theirs"] and path.read_text() == "ours"
    assert list(path.parent.iterdir()) == [path]


def test_a_new_start_of_ranks_leaves_what_ranks_did_not_write(tmp_path):
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for name in ("0.json", "3.log", "hydra.yaml", "notes.txt", "1 (copy).log"):
        (ranks / name).write_text("x")
    (ranks / "mine").mkdir()
    save_job(OmegaConf.create({"a": 1}), tmp_path)
    assert {path.name for path in ranks.iterdir()} == {"config.yaml", "notes.txt", "1 (copy).log", "mine"}
