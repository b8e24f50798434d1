"""python -m tests.training.without_text CONFIG.yaml: trains in a process in which this project can import nothing of text."""

from __future__ import annotations

import builtins
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

from omegaconf import OmegaConf

OWN = [f"hyperdflash.{name}" for name in ("data", "answers", "engines", "preparing")]
LIBRARIES = ("tokenizers", "datasets", "tiny_target")  # transformers and torchmetrics import the first two by themselves


class NoText(MetaPathFinder):
    """Raises for the folders of text, answers, engines and preparing, whoever imports them."""

    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(f"{blocked}.") for blocked in OWN):
            raise ImportError(f"{name} is blocked")


def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    """Raises when this project imports a library of text or a class of tokenizers, also one that is imported already."""
    words = [*name.split("."), *(fromlist or ())]
    ours = (globals or {}).get("__name__", "").partition(".")[0] in ("hyperdflash", "src")
    if ours and (words[0] in LIBRARIES or (words[0] == "transformers" and any("Token" in word for word in words))):
        raise ImportError(f"{globals['__name__']} imports {' '.join(words)}, which is blocked")
    return real_import(name, globals, locals, fromlist, level)


real_import = builtins.__import__

if __name__ == "__main__":
    sys.meta_path.insert(0, NoText())
    builtins.__import__ = guarded
    from hyperdflash.training.job import train

    train(OmegaConf.load(Path(sys.argv[1])))
