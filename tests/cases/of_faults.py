"""Faults from outside: the sentence names the file and the cure."""

from tests.cases.harness import CAPTURED, Case, cut

CASES = [
    Case("a damaged dataset", "train $mini", 1, ["dataset.json is damaged"], after=[CAPTURED], make=[cut("runs/datasets/*/dataset.json")], absent=["runs/train/*/checkpoints"]),
]
