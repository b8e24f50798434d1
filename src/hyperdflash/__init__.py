"""Speculative-decoding drafters for targets with hyper-connections: train, measure, generate.

``hyperdflash.load_target``, ``load_drafter``, ``generate`` and ``generate_stream`` load torch at their first use.
"""

from importlib import import_module

__all__ = ["generate", "generate_stream", "load_drafter", "load_target"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hyperdflash.generation.api"), name)
