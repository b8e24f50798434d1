"""Decides which side of the train/held-out split a text is on, by its content, never by an order or a count."""

from __future__ import annotations

from typing import Literal

from hyperdflash.stable_hash import fold_text, unit_interval

Split = Literal["train", "heldout"]
SPLITS = ("train", "heldout")

HELDOUT_MODULES = 0.04  # share of whole modules (first three parts of the dotted path)
HELDOUT_TEXTS = 0.03  # share of the texts of all other modules, and of seen math templates


def is_heldout_module(module: str) -> bool:
    """Tells whether everything below the first three parts of ``module`` (``torch.nn.modules``) is held out."""
    return unit_interval(".".join(module.split(".")[:3]), salt="module") < HELDOUT_MODULES


def is_heldout_text(text: str) -> bool:
    """Tells whether ``text`` is held out; texts that differ only in case, digits or spacing share a side."""
    return unit_interval(fold_text(text), salt="text") < HELDOUT_TEXTS


def heldout_kind(conversation_id: str) -> str | None:
    """Returns "seen" or "unseen" (the template) for a math id (``math/seen/...``), None for other domains."""
    parts = conversation_id.split("/")
    return parts[1] if parts[0] == "math" and len(parts) == 3 else None
