"""Which side of the train/held-out split a text is on: a function of its content, never of an order or a count."""

from __future__ import annotations

from typing import Literal

from hyperdflash.data.near_duplicates import fold_text
from hyperdflash.stable_hash import unit_interval

Split = Literal["train", "heldout"]
SPLITS = ("train", "heldout")

HELDOUT_MODULES = 0.04  # share of whole modules (first three parts of the dotted path)
HELDOUT_TEXTS = 0.03  # share of the texts of all other modules, and of seen maths templates


def is_heldout_module(module: str) -> bool:
    """Whether everything below ``module``'s first three parts (``torch.nn.modules``) is held out."""
    return unit_interval(".".join(module.split(".")[:3]), salt="module") < HELDOUT_MODULES


def is_heldout_text(text: str) -> bool:
    """By the normalised text, so that texts that differ in case, digits or spacing share a side."""
    return unit_interval(fold_text(text), salt="text") < HELDOUT_TEXTS


def heldout_kind(conversation_id: str) -> str | None:
    """ "seen" or "unseen" template for a maths id (``math/seen/...``), None for other domains."""
    parts = conversation_id.split("/")
    return parts[1] if parts[0] == "math" and len(parts) == 3 else None
