"""The lossless draft-verify loop, one text at a time, with the time of each part.

Shapes: see contracts.py with B = 1. The text so far is x[0..a]; x[a] is the newest token, whose state is not yet known.

    1. prefill    the target reads the prompt and gives the first token                               FirstToken
    2. propose    n <= min(S, room) drafts of x[a+1..], up to the text's last position; fewer where the drafter ends early
    3. verify     one forward over [x[a], d_1..d_n] -> n + 1 distributions
    4. accept     j leading drafts, then the target's own token: its argmax, or a draw from the residual
    5. roll back  the target's cache keeps x[a..] up to the last token whose successor is known
    6. update     the drafter takes their states H[a..], rounded to the cache's dtype                 Round

A stop token ends the text wherever it stands in a block. ``max_new_tokens`` truncates a block, bonus token included, as
decoding/replay.py does. Plain autoregressive decoding is this loop with n = 0.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperdflash.contracts import Proposal, Rounds, TargetStates
from hyperdflash.decoding.acceptance import verify_greedy, verify_sampled
from hyperdflash.drafting.proposer import Proposer
from hyperdflash.settings import positive_int
from hyperdflash.states.codecs import Codec, rounded
from hyperdflash.targets.sampling import Sampler
from hyperdflash.targets.session import TargetSession, TargetStep


@dataclass(frozen=True)
class Seconds:
    """Seconds of the drafter's calls (``draft``), the target's forward pass and rollback (``verify``) and the ``rest``."""

    draft: float = 0.0
    verify: float = 0.0
    rest: float = 0.0

    @property
    def total(self) -> float:
        return self.draft + self.verify + self.rest

    def __add__(self, other: Self) -> Self:
        return Seconds(self.draft + other.draft, self.verify + other.verify, self.rest + other.rest)


@dataclass(frozen=True)
class FirstToken:
    """The token of the prefill; ``seconds.total`` is the time to it, including the drafter's pass over the prompt."""

    token_id: int
    seconds: Seconds


@dataclass(frozen=True)
class Round:
    """One round from position ``anchor``, which keeps ``accepted`` leading drafts and adds the tokens ``emitted``. ``emitted``
    holds the accepted drafts and, unless the text ends before it, the target's own token."""

    anchor: int
    drafted: tuple[int, ...]
    accepted: int
    emitted: tuple[int, ...]
    seconds: Seconds


@dataclass(frozen=True)
class Generation:
    """A finished text: ``token_ids`` without the prompt, with the stop token if there is one."""

    token_ids: tuple[int, ...]
    ended_by: Literal["stop", "length"]
    first: FirstToken
    rounds: tuple[Round, ...]

    @property
    def seconds(self) -> Seconds:
        """The sum over all rounds, without the first token."""
        return reduce(Seconds.__add__, (r.seconds for r in self.rounds), Seconds())

    @property
    def tau(self) -> float:
        """Emitted tokens per round; NaN if the prefill's token ends the text."""
        return sum(len(r.emitted) for r in self.rounds) / len(self.rounds) if self.rounds else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Speed of all rounds, without the prefill and its token; NaN without a round."""
        return sum(len(r.emitted) for r in self.rounds) / self.seconds.total if self.rounds else float("nan")


@torch.inference_mode()
def speculate(
    session: TargetSession,
    drafter: Proposer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampler: Sampler | None = None,
    synchronize: bool = False,
    copies: int = 1,
) -> Iterator[FirstToken | Round]:
    """Writes one text and yields the first token, then every round as it ends; greedy without a ``sampler``.

    ``session`` must be new and tap ``drafter.layer_ids``. ``synchronize`` waits for the GPU before each time stamp; without it
    only the sum of a GPU's times is exact. Time that the caller spends between two events does not count. ``copies`` decodes
    the text in that many rows in lockstep and keeps the first row, which measures the cost of a batch of equal lengths.
    """
    if not prompt_ids:
        raise ValueError("a prompt has no tokens: encode it with its chat header first")
    positive_int("max_new_tokens", max_new_tokens)
    sampler = sampler or Sampler()
    clock = _clock(synchronize)

    started = clock()
    prompt = torch.tensor([list(prompt_ids)] * copies, device=session.model.device)
    step = session.prefill(prompt)
    prefilled = clock()
    newest = sampler.choose(step.logits[:1, -1])[0]  # [1] x[a]
    token_id = int(newest)
    anchor, end = len(prompt_ids), len(prompt_ids) + max_new_tokens - 1  # x[end] is the last token within the limit
    going_on = anchor < end and token_id not in stop_ids
    chosen = clock()
    if going_on:
        drafter.begin(_states(step, prompt, session.layer_ids, drafter.codec))
    begun = clock()
    yield FirstToken(token_id, Seconds(draft=begun - chosen, verify=prefilled - started, rest=chosen - prefilled))

    while going_on:
        started = clock()
        draft = drafter.propose(newest, min(drafter.num_slots, end - anchor), sampler)
        proposed = clock()
        block = torch.cat([newest, draft.ids]).expand(copies, -1)  # [1, n + 1]
        step = session.extend(block)
        verified = clock()
        accepted, newest = _accept(draft, step.logits[0], sampler)
        num_accepted, following, *drafted = torch.cat([accepted[None], newest, draft.ids]).tolist()
        emitted = [*drafted[:num_accepted], following][: end - anchor]
        emitted = emitted[: next((i + 1 for i, token_id in enumerate(emitted) if token_id in stop_ids), None)]
        known = block[:, : len(emitted)]  # tokens whose successors are in the text: their states are context
        states = _states(step, known, session.layer_ids, drafter.codec)
        judged = clock()
        session.rollback(keep=len(emitted))
        rolled_back = clock()
        drafter.update(states)
        updated = clock()
        seconds = Seconds(
            draft=proposed - started + updated - rolled_back,
            verify=verified - proposed + rolled_back - judged,
            rest=judged - verified,
        )
        yield Round(anchor, tuple(drafted), min(num_accepted, len(emitted)), tuple(emitted), seconds)
        anchor += len(emitted)
        going_on = anchor < end and emitted[-1] not in stop_ids


def _accept(draft: Proposal, logits: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Verifies n drafts against logits [n + 1, V] -> accepted [], the token after them [1]."""
    if sampler.temperature == 0:
        accepted, following = verify_greedy(draft.ids, logits.argmax(dim=-1))
    else:
        q = torch.nn.functional.one_hot(draft.ids, logits.shape[-1]).float() if draft.probs is None else draft.probs
        accepted, following = verify_sampled(draft.ids, q, sampler.probabilities(logits), sampler.generator)
    return accepted, following[None]


def _states(step: TargetStep, token_ids: Tensor, layer_ids: tuple[int, ...], codec: Codec) -> TargetStates:
    """Returns the first P states of a step, those of ``token_ids`` [1, P], rounded by ``codec``."""
    num_new = token_ids.shape[1]
    return TargetStates(
        ids=("",) * len(token_ids),
        domains=("",) * len(token_ids),
        input_ids=token_ids,
        loss_mask=torch.ones_like(token_ids, dtype=torch.bool),
        lengths=torch.full((len(token_ids),), num_new, device=token_ids.device),
        residual=rounded(step.residual[:, :num_new], codec),
        layers=None if step.layers is None else rounded(step.layers[:, :num_new], codec),
        layer_ids=layer_ids,
    )


def _clock(synchronize: bool):
    if not (synchronize and torch.cuda.is_available()):
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return read


def collect(events: Iterable[FirstToken | Round], stop_ids: Collection[int]) -> Generation:
    """Runs ``speculate`` to its end."""
    first, *rounds = events
    token_ids = (first.token_id, *(token_id for r in rounds for token_id in r.emitted))
    return Generation(token_ids, "stop" if token_ids[-1] in stop_ids else "length", first, tuple(rounds))


def decode(
    model: PreTrainedModel, drafter: Proposer, prompt_ids: Sequence[int], *, stop_ids: Collection[int], **settings
) -> Generation:
    """Decodes one whole text in a session of its own; ``settings`` as in ``speculate``."""
    with TargetSession(model, drafter.layer_ids) as session:
        return collect(speculate(session, drafter, prompt_ids, stop_ids=stop_ids, **settings), stop_ids)


def loop_rounds(generations: Sequence[Generation], num_slots: int) -> Rounds:
    """Returns the loop's rounds in the form of ``replay``; a text's document is its place in ``generations``."""
    rows = []
    for document, generation in enumerate(generations):
        end = sum(len(r.emitted) for r in generation.rounds) + (generation.rounds[0].anchor if generation.rounds else 0)
        rows += [
            (document, r.anchor, r.accepted, len(r.emitted), min(len(r.drafted), end - r.anchor)) for r in generation.rounds
        ]
    columns = torch.tensor(rows, dtype=torch.int64).view(-1, 5).unbind(dim=1)
    return Rounds(*columns, num_slots=num_slots)
