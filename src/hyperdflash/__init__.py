"""Speculative-decoding drafters for targets with hyper-connections: train, measure, generate. ``hyperdflash.load_target``,
``load_drafter``, ``generate``, ``generate_stream`` and ``push_to_hub`` load torch at first use."""

from importlib import import_module

_API = dict.fromkeys(("generate", "generate_stream", "load_drafter", "load_target"), "hyperdflash.generation.api")
_PLACES = {**_API, "push_to_hub": "hyperdflash.export.job"}
__all__ = ["generate", "generate_stream", "load_drafter", "load_target", "push_to_hub"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
