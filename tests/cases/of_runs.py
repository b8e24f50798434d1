"""Finished and broken runs: their data, their place, and the files beside them."""

from tests.cases.harness import STAGE1, Case, remove

CASES = [
    Case("a removed training file", "train $mini", 1, ["no file at rows.jsonl"], make=[remove("rows.jsonl")], absent=["runs/datasets"]),
    Case("a finished run is left alone", "train $mini", 0, ["nothing to do"], after=[STAGE1]),
]
