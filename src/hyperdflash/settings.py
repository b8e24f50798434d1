"""Checks of configured values; each error is one sentence that says what was wanted and what was given."""

from collections.abc import Sequence


def positive_int(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"{name} must be a positive integer, got {_shown(value)}")


def natural_int(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{name} must be an integer of at least 0, got {_shown(value)}")


def positive_number(name: str, value: object) -> float:
    if _is_number(value) and 0 < value < float("inf"):
        return float(value)
    raise ValueError(f"{name} must be a number above 0, got {_shown(value)}")


def number_between(name: str, value: object, low: float, high: float) -> float:
    if _is_number(value) and low <= value <= high:
        return float(value)
    raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {_shown(value)}")


def boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be true or false, got {_shown(value)}")


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    if value in choices:
        return value
    raise ValueError(f"{name} must be {' or '.join(choices)}, got {_shown(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
