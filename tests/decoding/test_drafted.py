"""The drafted, accepted and rejected tokens that are shown are those that replay counts."""

from __future__ import annotations

import torch

from hyperdflash.contracts import TargetStates
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.decoding.drafted import drafted_rounds, drafts_html, drafts_text, marked_tokens
from hyperdflash.decoding.loop import Round, Seconds
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.targets.load import load_heads, load_mtp


def test_drafts_of_a_replay(mini_target):
    """Two documents: accepted drafts equal the text, the first rejected one does not, and emitted tokens join to the text."""
    heads = load_heads(mini_target)
    drafter = MTPChain(load_mtp(mini_target, experts="dense"), 4).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([30, 22])
    residual = torch.randn(2, 30, heads.num_paths, heads.hidden_size, generator=generator).to(torch.bfloat16)
    ids = torch.randint(8, 300, (2, 30), generator=generator)
    # a text that the drafter is sometimes right about: what it drafts from random states, now and then
    mask = (torch.arange(30)[None] >= 6) & (torch.arange(30)[None] < lengths[:, None])
    for start in (8, 15):
        states = TargetStates(("a", "b"), ("code", "chat"), ids, mask, lengths, residual)
        slots = drafter.slots(states, heads, torch.full((2, 1), start), torch.ones(2, 1, dtype=torch.bool))
        ids[:, start + 1] = drafter.head.logits(slots, heads)[:, 0, 0].argmax()
    states = TargetStates(("a", "b"), ("code", "chat"), ids, mask, lengths, residual)
    rounds = replay(drafter, states, heads, temperature=0.0)
    assert rounds.accepted.sum() > 0
    for row, length in enumerate(lengths.tolist()):
        made = drafted_rounds(drafter, states, heads, rounds, row)
        mine = rounds.document == row
        assert [one.accepted for one in made] == rounds.accepted[mine].tolist()
        assert [len(one.drafted) for one in made] == rounds.available[mine].tolist()
        for one in made:
            assert one.drafted[: one.accepted] == one.emitted[: one.accepted]
            if one.accepted < len(one.drafted):
                assert one.drafted[one.accepted] != one.emitted[one.accepted]
        assert [i for one in made for i in one.emitted] == ids[row, 7:length].tolist()


def test_marks_in_signs_and_colors(mini_target):
    tokenizer = load_tokenizer(mini_target)
    ids = tokenizer.encode("adds<b>names", add_special_tokens=False)
    written = [(0, tuple(ids), len(ids), (*ids, ids[0])), (9, tuple(ids[:2]), 0, (ids[1],))]
    rounds = [Round(*one, Seconds()) for one in written]
    kinds = [kind for kind, _ in marked_tokens(rounds)]
    assert kinds == ["accepted", "own", "rejected", "own"]
    assert drafts_text(rounds, tokenizer).startswith("[adds<b>names]") and "{-" in drafts_text(rounds, tokenizer)
    page = drafts_html(rounds, tokenizer)
    assert "adds&lt;b&gt;names" in page and "<b>" not in page and page.count('class="rejected"') == 1
