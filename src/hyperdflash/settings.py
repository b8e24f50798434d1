"""Checks of configured values; each error is one sentence that says what was wanted and what was given."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

MOST = 2**40  # of an integer: a seed times 1,000,003 and a number of rows then fit into 64 bits
MOST_RESAMPLES = 10**6  # of a bootstrap, which holds a number per prompt and resample
# a name that other trainers have -> the closest here; a batch is the documents of an optimizer step
MEANT = dict.fromkeys(("limit_train_batches", "overfit_batches", "fast_dev_run", "num_train_steps"), "max_steps")


def positive_int(name: str, value: object, most: int = MOST) -> int:
    return _integer(name, value, 1, most, "a positive integer")


def natural_int(name: str, value: object) -> int:
    return _integer(name, value, 0, MOST, "an integer of at least 0")


def positive_number(name: str, value: object) -> float:
    return float(_checked(name, value, _is_number(value) and 0 < value < float("inf"), "a number above 0"))


def number_between(name: str, value: object, low: float, high: float) -> float:
    return float(_checked(name, value, _is_number(value) and low <= value <= high, f"in [{low:g}, {high:g}]"))


def boolean(name: str, value: object) -> bool:
    return _checked(name, value, isinstance(value, bool), "true or false")


def one_of(name: str, value: object, choices: Sequence[str | None]) -> str:
    return _checked(name, value, value in choices, " or ".join(map(str, choices)))


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ValueError where the values give no sampling rule; temperature 0 is greedy."""
    if isinstance(temperature, bool) or not (isinstance(temperature, int | float) and 0 <= temperature < float("inf")):
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature!r}")
    if isinstance(top_p, bool) or not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")


def no_option(place: str, name: str, allowed: Iterable[object]) -> str:
    """Returns the sentence about ``name``, no option of ``place`` ("trainer." or "reducer="; "" is the command)."""
    names = sorted(str(other) for other in allowed if other != "hydra")
    close = get_close_matches(MEANT.get(name, name), names, n=3)
    meant = f" (did you mean {' or '.join(f'{place}{other}' for other in close)}?)" if close else ""
    return f"{place}{name} is no option{meant}: {place.rstrip('.=') or 'this command'} takes {', '.join(names)}"


def _integer(name: str, value: object, least: int, most: int, wanted: str) -> int:
    right = _is_number(value, int) and value >= least
    return _checked(name, value, right and value <= most, f"at most {most:,}" if right else wanted)


def _checked(name: str, value: object, right: bool, wanted: str) -> Any:
    if right:
        return value
    raise ValueError(f"{name} must be {wanted}, got {_shown(value)}")


def _is_number(value: object, kind: type = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """Returns the value for a message. YAML 1.1 reads ``3e-4``, a number without a point, as a string."""
    try:
        number = repr(float(value)) if isinstance(value, str) else ""
    except ValueError:
        number = ""
    if not number:
        return repr(value)
    number = number if "." in number else number.replace("e", ".0e")
    return f"the string {value!r} (YAML takes it for text: write {number})"
