"""replay() over fake heads whose hidden states are logits, so that each test chooses p and q."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hyperdflash.contracts import BlockLayout, Slots, TargetStates
from hyperdflash.decoding.metrics import AcceptanceMetrics
from hyperdflash.decoding.replay import answers, position_uniforms, replay
from hyperdflash.drafting.anchors import previous_ids
from hyperdflash.drafting.heads.lm_head import LMDraftHead
from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.targets.sampling import probabilities

VOCAB = 5


class LogitHeads:
    """H[b, t] [M = 1, D = V] is the target's log-distribution of x[t + 1]."""

    lm_head, dtype, hidden_size = SimpleNamespace(weight=torch.eye(VOCAB)), torch.float32, VOCAB
    config = SimpleNamespace(vocab_size=VOCAB)

    def collapse(self, residual: Tensor) -> Tensor:
        return residual.squeeze(-2)


class TableDrafter:
    """Reads its logits from a table [B, T, S, V]; ``passes`` records the requested anchors."""

    def __init__(self, table: Tensor):
        self.table, self.num_slots, self.passes = table, table.shape[2], []
        self.head, self.layout = LMDraftHead(), BlockLayout.chain(self.num_slots + 1)

    def slots(self, states: TargetStates, heads: LogitHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        self.passes.append(anchors.shape[1])
        rows = [int(name[1:]) for name in states.ids]
        hidden = self.table[torch.tensor(rows)[:, None], anchors].clone()
        hidden[~anchor_mask] = float("nan")  # must not be read
        return Slots(hidden, previous_ids(states.input_ids, anchors, self.layout), self.layout)


def states_of(text: Tensor, spans: list[list[tuple[int, int]]], residual: Tensor | None = None) -> TargetStates:
    """``spans`` [(first answer position, last)] per row; a document ends with its last span."""
    mask = torch.zeros(text.shape, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for first, last in row_spans:
            mask[row, first : last + 1] = True
    batch, length = text.shape
    return TargetStates(
        ids=tuple(f"d{i}" for i in range(batch)),
        domains=("math",) * batch,
        input_ids=text,
        loss_mask=mask,
        lengths=torch.tensor([row[-1][1] + 1 for row in spans]),
        residual=torch.zeros(batch, length, 1, VOCAB) if residual is None else residual,
    )


def table_from(text: Tensor, accept: Tensor) -> Tensor:
    """Drafts x[a + k] where ``accept`` [B, T, S], another token elsewhere: one-hot logits [B, T, S, V]."""
    _, length, num_slots = accept.shape
    padded = torch.nn.functional.pad(text, (0, num_slots))
    labels = torch.stack([padded[:, k : k + length] for k in range(1, num_slots + 1)], dim=-1)
    return torch.nn.functional.one_hot(torch.where(accept, labels, (labels + 1) % VOCAB), VOCAB).float()


def test_answers_are_runs_inside_the_length():
    states = states_of(torch.zeros(2, 12, dtype=torch.long), [[(2, 5), (8, 10)], [(3, 3)]])
    states.loss_mask[1, 8:] = True  # padding, past the document's length
    document, start, end = answers(states)
    assert (document.tolist(), start.tolist(), end.tolist()) == ([0, 0, 1], [2, 8, 3], [5, 10, 3])


def test_an_answer_without_a_prompt_is_an_error():
    states = states_of(torch.zeros(1, 6, dtype=torch.long), [[(0, 4)]])
    with pytest.raises(ValueError, match="'d0' is supervised from its first token"):
        answers(states)


@pytest.mark.parametrize(
    ("num_slots", "hidden_bytes", "passes"), [(3, 0, [21] * 8), (6, 1 << 30, [21]), (6, 5 * 21 * 6 * 4 * 3, [21] * 3)]
)
def test_greedy_replay_is_the_sequential_loop(num_slots: int, hidden_bytes: int, passes: list[int], sequential_loop):
    generator = torch.Generator().manual_seed(num_slots)
    text = torch.randint(0, VOCAB, (8, 40), generator=generator)
    accept = torch.rand(8, 40, num_slots, generator=generator) < 0.7
    spans = [[(int(s), int(s) + 3 * i)] for i, s in enumerate(torch.randint(1, 15, (8,), generator=generator))]
    drafter = TableDrafter(table_from(text, accept))
    states = states_of(text, spans)
    rounds = replay(drafter, states, LogitHeads(), 0.0, hidden_bytes=hidden_bytes)
    assert drafter.passes == passes  # a few documents at a time
    for row, [(start, end)] in enumerate(spans):

        def draft(anchor: int, row: int = row) -> list[int]:
            return drafter.table[row, anchor].argmax(-1).tolist()

        expected = sequential_loop(draft, text[row].tolist(), num_slots, start, end)
        mine = rounds.document == row
        assert rounds.anchor[mine].tolist() == [r[0] for r in expected]
        assert rounds.accepted[mine].tolist() == [r[1] for r in expected]
        assert rounds.emitted[mine].tolist() == [r[2] for r in expected]


@pytest.mark.parametrize(("temperature", "reads"), [(0.0, "is_argmax"), (1.0, "token_probabilities")])
def test_a_slot_after_a_rejected_one_is_not_read(monkeypatch, temperature, reads):
    generator = torch.Generator().manual_seed(5)
    text, accept = torch.randint(0, VOCAB, (4, 30), generator=generator), torch.rand(4, 30, 6, generator=generator) < 0.6
    states = states_of(text, [[(3, 3 + 6 * row)] for row in range(4)])
    table = 1e3 * table_from(text, accept)  # at T = 1 all of q is on the draft, so that a rejected one has q(x) = 0
    read, real = [], getattr(FactoredLogits, reads)
    monkeypatch.setattr(FactoredLogits, reads, lambda self, ids, *rest: read.append(len(ids)) or real(self, ids, *rest))
    replay(TableDrafter(table), states, LogitHeads(), temperature)
    leading = accept.int().cumprod(dim=-1).sum(dim=-1)
    wanted = sum(min(int(leading[row, a]) + 1, 6, 3 + 6 * row - a) for row in range(4) for a in range(3, 3 + 6 * row))
    answered = sum(6 * row + 1 for row in range(4)) if temperature else 0  # the target's own probability of every token
    assert sum(read) == wanted + answered


def test_answers_of_one_token_need_no_drafter():
    drafter = TableDrafter(torch.zeros(2, 8, 3, VOCAB))
    states = states_of(torch.zeros(2, 8, dtype=torch.long), [[(3, 3)], [(1, 1)]])
    assert len(replay(drafter, states, LogitHeads(), 0.0).anchor) == 0 and drafter.passes == []


def test_a_slot_never_reaches_the_next_turn():
    text = torch.zeros(1, 14, dtype=torch.long)
    accept = torch.ones(1, 14, 6, dtype=torch.bool)
    rounds = replay(TableDrafter(table_from(text, accept)), states_of(text, [[(1, 4), (8, 13)]]), LogitHeads(), 0.0)
    assert rounds.anchor.tolist() == [1, 8]
    assert rounds.available.tolist() == [3, 5] and rounds.emitted.tolist() == [3, 5]


def test_a_drafter_that_is_the_target_is_always_accepted_when_sampling():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, VOCAB, (3, 30), generator=generator)
    residual = torch.randn(3, 30, 1, VOCAB, generator=generator)
    padded = torch.nn.functional.pad(residual.squeeze(2), (0, 0, 0, 6))
    table = torch.stack([padded[:, k : k + 30] for k in range(6)], dim=2)  # slot k reads H[a + k - 1]
    states = states_of(text, [[(2, 22)], [(5, 19)], [(1, 29)]], residual)
    rounds = replay(TableDrafter(table), states, LogitHeads(), 1.0)
    assert (rounds.accepted == rounds.available).all()


def test_draws_depend_on_the_document_not_on_the_batch_or_the_drafter():
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, VOCAB, (2, 40), generator=generator)
    residual = torch.randn(2, 40, 1, VOCAB, generator=generator)
    table = torch.randn(2, 40, 6, VOCAB, generator=generator)
    both = replay(TableDrafter(table), states_of(text, [[(2, 30)], [(2, 39)]], residual), LogitHeads(), 1.0, seed=4)
    longer = torch.nn.functional.pad(text[:1], (0, 9))
    alone = states_of(longer, [[(2, 30)]], torch.nn.functional.pad(residual[:1], (0, 0, 0, 0, 0, 9)))
    single = replay(TableDrafter(table[:1]), alone, LogitHeads(), 1.0, seed=4)
    mine = both.document == 0
    assert both.anchor[mine].tolist() == single.anchor.tolist()
    assert both.accepted[mine].tolist() == single.accepted.tolist()
    other = replay(TableDrafter(table[:1]), alone, LogitHeads(), 1.0, seed=5)
    assert other.anchor.tolist() != single.anchor.tolist()
    assert torch.equal(position_uniforms(4, "d0", 10), position_uniforms(4, "d0", 40)[:10])
    assert not torch.equal(position_uniforms(4, "d0", 10), position_uniforms(4, "d1", 10))


def markov(generator, scale=1.5):
    """[V, V] rows of log-probabilities."""
    return torch.log_softmax(scale * torch.randn(VOCAB, VOCAB, generator=generator), -1)


def sample_text(log_p: Tensor, batch: int, length: int, generator) -> Tensor:
    text = torch.zeros(batch, length, dtype=torch.long)
    for t in range(1, length):
        text[:, t] = torch.multinomial(log_p[text[:, t - 1]].exp(), 1, generator=generator).squeeze(1)
    return text


def speculative_sampling(log_p, log_q, num_slots, batch, length, generator):
    """The real loop on a Markov target: block drafter q_k(. | anchor token), until ``length``. Lists of accepted."""
    pooled_emitted = pooled_rounds = 0
    written = torch.zeros(batch, dtype=torch.long)  # last token
    remaining = torch.full((batch,), length)
    survived = torch.zeros(num_slots)
    while (remaining > 0).any():
        live = remaining > 0
        anchor, last, accepted = written.clone(), written.clone(), torch.zeros(batch, dtype=torch.long)
        running = live.clone()
        for k in range(num_slots):
            running = running & (accepted < remaining)
            p, q = log_p[last].exp(), log_q[k][anchor].exp()
            y = torch.multinomial(q, 1, generator=generator).squeeze(1)
            ratio = p.gather(1, y[:, None]).squeeze(1) / q.gather(1, y[:, None]).squeeze(1)
            kept = torch.rand(batch, generator=generator) < ratio
            redraw = torch.multinomial((p - q).clamp(min=1e-12), 1, generator=generator).squeeze(1)
            last = torch.where(running, torch.where(kept, y, redraw), last)
            rejected = running & ~kept
            running = running & kept
            accepted += running
            survived[k] += running.sum()
            # a rejected row has drawn its bonus token from the residual
            written = torch.where(rejected | running, last, written)
        full = live & running
        bonus = torch.multinomial(log_p[last].exp(), 1, generator=generator).squeeze(1)
        written = torch.where(full, bonus, written)
        emitted = torch.minimum(accepted + 1, remaining) * live
        remaining = remaining - emitted
        pooled_emitted += int(emitted.sum())
        pooled_rounds += int(live.sum())
    return pooled_emitted / pooled_rounds, survived / pooled_rounds


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.85)])
def test_sampled_replay_has_the_loops_tau_and_survival(temperature: float, top_p: float):
    generator = torch.Generator().manual_seed(11)
    logits_p = markov(generator)
    mixed = [0.7 * logits_p + 0.3 * markov(generator), 0.5 * logits_p + 0.5 * markov(generator), markov(generator)]
    logits_q = torch.stack(mixed)  # [S, V, V]
    log_p = probabilities(logits_p, temperature, top_p).log()
    log_q = probabilities(logits_q, temperature, top_p).log()
    batch, length = 4000, 12
    loop_tau, loop_survival = speculative_sampling(log_p, log_q, 3, batch, length, generator)

    text = sample_text(log_p, batch, length + 2, generator)
    text = torch.cat([torch.zeros(batch, 1, dtype=torch.long), text], dim=1)[:, : length + 2]  # x[0] prompt, x[1] = 0
    text[:, 1] = 0
    residual = logits_p[text].unsqueeze(2)
    table = logits_q[:, text].permute(1, 2, 0, 3)  # [B, T, S, V]
    states = states_of(text, [[(1, length + 1)]] * batch, residual)
    rounds = replay(TableDrafter(table), states, LogitHeads(), temperature, top_p, logits_bytes=1 << 20)
    metrics = AcceptanceMetrics(3)
    metrics.update(rounds)
    result = metrics.compute()
    assert abs(float(result.tau) - loop_tau) < 0.02
    assert torch.allclose(result.survival.float(), loop_survival, atol=0.012)
