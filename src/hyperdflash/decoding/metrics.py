"""Acceptance of rounds: counts pool over rounds and are divided once. Shapes: see contracts.py. ``AcceptanceMetrics`` pools all
rounds and ranks; ``document_counts`` gives one row per document, for intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from hyperdflash.contracts import Rounds
from hyperdflash.report.bootstrap import PromptCounts


class Acceptance(NamedTuple):
    """``tau``, emitted tokens per round, and ``accepted``, draft tokens kept per round, scalars in fp64; ``rounds`` int64.

    ``survival`` [S]: share of all rounds that accept at least k slots; a round clipped before slot k does not.
    ``conditional`` [S]: share of rounds that accept slot k, among those that accept all slots < k and whose text has a
    slot k; NaN without such a round. Without rounds every value is NaN.
    """

    tau: Tensor
    accepted: Tensor
    survival: Tensor
    conditional: Tensor
    rounds: Tensor


def tau_of(rounds: Rounds) -> float:
    """Returns emitted tokens per round; NaN without a round."""
    return int(rounds.emitted.sum()) / len(rounds.emitted) if len(rounds.emitted) else float("nan")


class AcceptanceMetrics(Metric):
    """Acceptance of one drafter with ``num_slots`` slots. Every state is a sum, so ranks and batches pool exactly."""

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_slots: int, **kwargs):
        super().__init__(**kwargs)
        self.num_slots = num_slots
        for name in ("emitted_sum", "accepted_sum", "rounds_count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("survived_count", "reached_count"):
            self.add_state(name, torch.zeros(num_slots, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rounds: Rounds) -> None:
        if rounds.num_slots != self.num_slots:
            raise ValueError(f"these metrics count {self.num_slots} slots, got rounds with {rounds.num_slots}")
        survived, reached = slot_outcomes(rounds)
        device = self.emitted_sum.device
        self.emitted_sum += rounds.emitted.sum().to(device)
        self.accepted_sum += rounds.accepted.sum().to(device)
        self.rounds_count += len(rounds.accepted)
        self.survived_count += survived.sum(dim=0).to(device)
        self.reached_count += reached.sum(dim=0).to(device)

    def compute(self) -> Acceptance:
        rounds = self.rounds_count.double()
        return Acceptance(
            tau=self.emitted_sum / rounds,
            accepted=self.accepted_sum / rounds,
            survival=self.survived_count / rounds,
            conditional=self.survived_count.double() / self.reached_count,
            rounds=self.rounds_count,
        )


def slot_outcomes(rounds: Rounds) -> tuple[Tensor, Tensor]:
    """Returns (survived, reached), bool [R, S]: slot k is accepted; slot k exists and all earlier ones are accepted."""
    slots = torch.arange(1, rounds.num_slots + 1, device=rounds.accepted.device)
    accepted, available = rounds.accepted.unsqueeze(1), rounds.available.unsqueeze(1)
    return accepted >= slots, (accepted >= slots - 1) & (available >= slots)


def document_counts(rounds: Rounds, num_documents: int) -> PromptCounts:
    """Sums rounds per document, for documents without rounds too."""
    document = rounds.document

    def pooled(values: Tensor) -> np.ndarray:
        out = torch.zeros(num_documents, *values.shape[1:], dtype=torch.int64, device=values.device)
        return out.index_add_(0, document, values.to(torch.int64)).cpu().numpy()

    survived, reached = slot_outcomes(rounds)
    return PromptCounts(
        emitted=pooled(rounds.emitted),
        accepted=pooled(rounds.accepted),
        rounds=pooled(torch.ones_like(rounds.accepted)),
        survived=pooled(survived),
        reached=pooled(reached),
    )


def ends_in_loop(
    answer_ids: Sequence[int],
    max_period: int = 16,
    min_repeats: int = 3,
    min_length: int = 24,
    end_token_id: int | None = None,
) -> bool:
    """Returns whether the tail of ``answer_ids`` [T], the answer's tokens, repeats with a period of 1..``max_period``.

    Definition: for some period d the last n tokens satisfy x[i] = x[i - d] for all but their first d, with
    n >= d * ``min_repeats`` and n >= ``min_length``. The second bound excludes ``)))`` and a line of dashes.
    A final ``end_token_id`` is not part of the tail. Text that changes with each repetition ("1. a 2. a") is not a loop.
    """
    ids = np.asarray(answer_ids)
    if end_token_id is not None and len(ids) and ids[-1] == end_token_id:
        ids = ids[:-1]
    for period in range(1, min(max_period, len(ids) - 1) + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        tail = len(ids) - (differs[-1] + 1 if len(differs) else 0)  # ids[differs[-1] + 1 :] is periodic
        if tail >= max(period * min_repeats, min_length):
            return True
    return False
