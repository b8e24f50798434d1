"""The card's measures against what they must be on inputs whose figures are known by hand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.targets.load import load_target
from tiny_target.card.answers import Answer, answer_figures
from tiny_target.card.paths import head_gates, path_cosines, path_figures, path_sums, teacher_divergence
from tiny_target.card.rendering import Threshold, fenced, largest_rise, markdown, thresholds
from tiny_target.card.text import (
    bits_per_byte,
    group_of,
    heldout_groups,
    nats_sum,
    residuals,
)
from tiny_target.corpus.embedded import text_bytes


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.fixture(scope="module")
def tokenizer(mini_target):
    return load_tokenizer(mini_target)


def conversation(index: int, domain: str = "code", id: str | None = None) -> Conversation:
    answer = f"def f{index}(x):\n    return x + {index}  # é"
    return Conversation(
        id or f"{domain}/{index}", domain, (Turn("user", f"Write f{index}, please."), Turn("assistant", answer))
    )


# bits per byte


def test_uniform_logits_cost_log2_of_the_vocabulary_a_token(target, tokenizer):
    found = [conversation(i) for i in range(20)]
    documents = [encode(c, tokenizer) for c in found]
    heads = target.heads
    before = heads.lm_head.weight.clone()
    heads.lm_head.weight.data.zero_()
    try:
        sums = [nats_sum(heads, *batch) for batch in residuals(target, documents, batch_tokens=256)]
    finally:
        heads.lm_head.weight.data.copy_(before)
    tokens, size = sum(n for _, n in sums), sum(map(text_bytes, found))
    assert tokens == sum(len(d.input_ids) - 1 for d in documents)
    assert size == sum(len(turn.content) for c in found for turn in c.turns) + 20  # é has two bytes
    got = bits_per_byte(sum(nats for nats, _ in sums), size)
    assert got == pytest.approx(math.log2(320) * tokens / size, rel=1e-6)


def test_nats_are_those_of_the_model_itself_whatever_the_batching(target, tokenizer):
    documents = [encode(conversation(i), tokenizer) for i in range(5)]
    wanted = 0.0
    for d in documents:
        logits = target.model(d.input_ids[None]).logits[0, :-1].float()
        wanted += float(torch.nn.functional.cross_entropy(logits, d.input_ids[1:], reduction="sum"))
    for batch_tokens in (1, 10_000):
        got = sum(nats_sum(target.heads, *b, rows=7)[0] for b in residuals(target, documents, batch_tokens))
        assert got == pytest.approx(wanted, rel=1e-5)


def test_heldout_groups_keep_maths_templates_apart_and_their_size():
    maths = [conversation(i, "math", f"math/{kind}/{i}") for kind in ("seen", "unseen") for i in range(9)]
    pool = [*maths, *(conversation(i, "code") for i in range(9)), *(conversation(i, "chat") for i in range(9))]
    assert group_of("math/unseen/1", "math") == "math unseen" and group_of("code/1", "code") == "code"
    groups = heldout_groups(pool, 200)
    assert list(groups) == ["math seen", "math unseen", "code", "chat"]
    assert all(0 < sum(map(text_bytes, found)) <= 200 for found in groups.values())
    with pytest.raises(ValueError, match="math seen fits into text_bytes=10"):
        heldout_groups(pool, 10)


# hyper-connections


def test_gates_are_those_of_the_hc_head_bit_for_bit(target):
    residual = 3 * torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(0))
    gates = head_gates(target.heads.hc_head, residual)
    assert gates.shape == (2, 5, 4)
    assert torch.equal((gates.unsqueeze(-1) * residual).sum(dim=2), target.heads.hc_head(residual))


def test_identical_paths_have_cosine_one_and_no_distance(target):
    one = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(0)).expand(6, 4, 32).contiguous()
    assert torch.allclose(path_cosines(one), torch.ones(6, 4, 4), atol=1e-6)
    figures = path_figures([path_sums(target.heads, one)])
    assert figures["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert figures["relative_distance"] < 1e-3  # equal up to scale, and the norm takes the scale away
    assert abs(figures["kl_hc_head_mean_pool_nats"]) < 1e-4 and figures["argmax_differs"] == 0


def test_path_figures_are_plain_means_over_tokens(target):
    residual = torch.randn(50, 4, 32, generator=torch.Generator().manual_seed(1))
    figures = path_figures([path_sums(target.heads, part) for part in residual.split(20)])
    gates = head_gates(target.heads.hc_head, residual[None])[0].double()
    assert figures["tokens"] == 50
    assert figures["gate_means"] == pytest.approx(gates.mean(0).tolist())
    assert figures["gate_variances"] == pytest.approx(gates.var(0, unbiased=False).tolist(), rel=1e-4)
    pairs = [path_cosines(residual)[:, i, j].mean().item() for i, j in itertools.permutations(range(4), 2)]
    assert figures["mean_cosine"] == pytest.approx(sum(pairs) / 12, abs=1e-6)
    gated, pooled = target.heads.collapse(residual[None])[0], target.heads.collapse(residual[None], "mean_pool")[0]
    p, q = (torch.softmax(target.heads.logits(h), -1) for h in (gated, pooled))
    assert figures["kl_hc_head_mean_pool_nats"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert figures["kl_mean_pool_hc_head_nats"] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-4)
    assert figures["argmax_differs"] == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    assert bool((teacher_divergence(target.heads, gated, pooled)[0] >= -1e-6).all())
    with pytest.raises(ValueError, match="no tokens"):
        path_figures([path_sums(target.heads, residual[:0])])


# answers and thresholds


def test_answer_figures_by_hand():
    code = Answer("code/1", "code", "?", "def f():\n    return 1", 9, ended=True, looped=False)
    cut = replace(code, text="def f(:", num_tokens=3, ended=False, looped=True)
    figures = answer_figures([code, cut, code, replace(code, text="x =")])
    assert figures["ended"] == 0.75 and figures["looped"] == 0.25 and figures["mean_tokens"] == 7.5
    assert figures["parses"] == 0.5 and figures["parses_of_ended"] == pytest.approx(2 / 3)
    assert figures["right"] is None
    maths = replace(code, group="math seen", text="1 + 2 = 3. The answer is 3.", wanted=3)
    figures = answer_figures([maths, replace(maths, wanted=4), replace(maths, text="3")])
    assert figures["right"] == pytest.approx(1 / 3) and figures["parses"] is None
    assert answer_figures([])["ended"] is None
    texts = {"": False, "# only a comment": False, "a\0b": False, "x = '\\d'": True}
    assert {text: replace(code, text=text).parses for text in texts} == texts


def card() -> dict:
    groups = ("math seen", "math unseen", "code", "chat")
    text = {"documents": 1, "bytes": 8, "tokens": 4, "nats": 2.0, "target": 0.9}
    row = {"prompts": 2, "ended": 0.9, "looped": 0.1, "mean_tokens": 5.0}
    row |= {"parses": 0.6, "parses_of_ended": 0.7, "right": 0.5}
    paths = {"tokens": 3, "mean_cosine": 0.5, "cosines": [[1.0, 0.5], [0.5, 1.0]], "path_norms": [1.0, 2.0]}
    paths |= {"gate_means": [0.1, 0.2], "gate_variances": [0.0, 0.0], "relative_distance": 0.1}
    paths |= {"kl_hc_head_mean_pool_nats": 0.1, "kl_mean_pool_hc_head_nats": 0.2, "argmax_differs": 0.3}
    sizes = {"parameters": 3_700_000, "mtp_parameters": 1, "file_bytes": 8_000_000, "context": 2048, "vocab_size": 9}
    acceptance = {"tau": 2.0, "rounds": 7, "survival": [0.9, 0.5], "conditional": [0.9, 0.8]}
    return {
        "made_by": {"command": "python -m src.card", "git_revision": "abc", "git_dirty": False},
        "settings": {"max_new_tokens": 9, "threads": 2},
        "target": {"name": "tiny", "fingerprint": "f", "layers": 8, "hidden_size": 9, "paths": 2, **sizes},
        "training": {"tokens": 5, "steps": 1, "minutes": 90.0, "loss": 1.0, "mtp_loss": 1.0},
        "text": {name: dict(text) for name in groups},
        "answers": {name: dict(row) for name in groups},
        "mtp": {name: dict(acceptance) for name in ("math", "code", "chat", "code, no loops")},
        "paths": {name: dict(paths) for name in (*groups, "all")},
        "samples": {"code": [{"question": "Write `f`.", "text": "```\n1\n```", "ended": True}]},
        "seconds": {"answers": 1.0},
    }


def failed(found: dict) -> list[str]:
    return [one.name for one in thresholds(found) if not one.met]


def test_thresholds_hold_at_their_limits_and_fall_just_past_them():
    assert failed(card()) == []
    worse = card()
    worse["answers"]["code"]["parses"] = 0.59
    worse["answers"]["math unseen"]["ended"] = 0.89
    worse["answers"]["math seen"] |= {"looped": 0.11, "right": None}
    worse["mtp"]["code"]["conditional"] = [0.8, 0.85]
    worse["training"]["minutes"] = 90.1
    assert failed(worse) == [
        "training, minutes",
        "code answers that parse",
        "answers that end, math unseen",
        "answers that end in a loop, math seen",
        "arithmetic right, seen templates",
        "MTP first slot, code",
        "MTP conditional falls from slot to slot (largest step), code",
    ]
    without = card()
    without["training"] = None
    assert len(thresholds(without)) == len(thresholds(card())) - 1


def test_a_missing_figure_reaches_no_threshold_and_a_rise_is_found():
    assert not Threshold("x", ">=", 0.0, None).met and Threshold("x", "<", 1.0, None).written(None) == "n/a"
    assert largest_rise([0.9, 0.5, 0.6]) == pytest.approx(0.1) and largest_rise([0.9, 0.5]) == pytest.approx(-0.4)
    assert largest_rise([0.9]) is None and largest_rise([0.9, None]) is None


def test_the_markdown_is_a_function_of_the_json():
    text = markdown(json.loads(json.dumps(card())))
    assert "Made by `python -m src.card` at git revision abc; target fingerprint `f`." in text
    assert f"{len(thresholds(card()))} of {len(thresholds(card()))} thresholds are met" in text
    assert "| code answers that parse | ≥ 60.0% | 60.0% | yes |" in text
    assert fenced("```\n1\n```")[0] == "````text"
