"""Options: each has an effect or is refused, wherever the error arises."""

from tests.cases.harness import Case

CASES = [
    Case("an unknown reducer", "train $mini reducer=nope", 1, ["reducer/nope"], absent=["runs/train/*"]),
    Case("too many layers", "train $mini conditioning=layers drafter.num_layers=7", 1, ["got 7"], absent=["runs/train/*"]),
]
