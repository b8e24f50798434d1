"""Options: each has an effect or is refused, wherever the error arises."""

import json
from pathlib import Path

from tests.cases.harness import Case


def statuses(*wanted: str):
    """The jobs of the one sweep ended so."""

    def check(here: Path) -> None:
        found = sorted((json.loads(path.read_text()) for path in here.glob("runs/sweeps/*/*.json")), key=lambda job: job["job"])
        assert [job["status"] for job in found] == list(wanted)

    return check


CASES = [
    Case("an unknown reducer", "train $mini reducer=nope", 1, ["reducer=nope is no option"], absent=["runs/train/*"]),
    Case("too many layers", "train $mini conditioning=layers drafter.num_layers=7", 1, ["got 7"], absent=["runs/train/*"]),
    Case("an unknown key", "train $mini kl.alfa=1", 1, ["did you mean kl.alpha"], absent=["runs/train/*"]),
    Case("a group that is null", "train $mini ~trainer", 1, ["trainer"], absent=["runs/train/*"]),
    Case("an interpolation to nowhere", "evaluate out=${nope}", 1, ["nope"]),
    Case("a job that cannot be composed", "train -m $mini reducer=nope,fc kl.alpha=2", 1, ["2 jobs: 0 finished, 2 not", "reducer=nope is no option", "kl.alpha must be"], absent=["runs/unnamed"], check=statuses("failed", "failed")),
    Case("a failing job of a first batch", "train -m $mini kl.alpha=2,3 hydra.sweeper.max_batch_size=1", 1, ["got 2", "got 3"], check=statuses("failed", "failed")),
]
