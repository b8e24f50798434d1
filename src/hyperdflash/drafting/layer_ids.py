"""The layers of a target that vanilla DFlash taps by default. This module resolves configurations and imports no torch."""

from pathlib import Path

from hyperdflash.files import REFETCH, read_json


def default_layer_ids(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """Spreads ``num_taps`` layers evenly from 1 to num_target_layers - 3 (DFlash); puts a single tap in the middle.

    >>> default_layer_ids(43, 5)
    (1, 11, 20, 30, 40)
    """
    if num_taps == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    if not 1 < num_taps <= last - first + 1:
        raise ValueError(
            f"num_taps must be in 1..{max(last, 1)} for a target of {num_target_layers} layers "
            f"(they are spread from layer 1 to {last}), got {num_taps}: give conditioning.layer_ids=[...]"
        )
    return tuple(round(first + i * (last - first) / (num_taps - 1)) for i in range(num_taps))


def layer_ids_of(folder: str | Path, num_taps: int) -> list[int] | None:
    """Applies the rule to the target in ``folder``; None without a config.json, which loading the target reports."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    return list(default_layer_ids(read_json(path, REFETCH, "num_hidden_layers")["num_hidden_layers"], num_taps))
