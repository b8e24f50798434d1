"""The replay benchmark at sizes that take seconds."""

import pytest

from benchmarks.own_step import build
from benchmarks.products import products
from benchmarks.replay import beside_loop, beside_products, blocks, keep_drafts, replayed
from benchmarks.shapes import QUICK, Case
from hyperdflash.data.chat import user_rounds
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.report.tables import markdown
from hyperdflash.targets.load import load_target


def test_the_products_are_the_forward_ones_of_all_positions():
    shape = replayed(QUICK)
    assert shape.num_anchors == 64 - 7 - 1
    assert {p.name: p.flops for p in products(shape)}["LM head"] == 2 * (56 * 6) * 32 * 512


def test_a_toy_document_is_replayed():
    row = beside_products(QUICK, "fp32", "half", rounds=1, rate_s=0.0)
    assert row["replay_s"] > 0 and row["ratio"] == row["replay_s"] / row["matmul_s"]
    assert "| quick | fp32 | half |" in markdown(blocks({"rows": [row], "loop": []}))


@pytest.mark.parametrize(("kept", "least", "most"), [("all", 6.0, 6.0), ("half", 0.6, 1.4)])
def test_the_share_of_kept_drafts_is_the_named_one(kept, least, most):
    setup = build(Case(replayed(QUICK), "fp32", "own"))
    setup.states.loss_mask[:, 0] = False
    keep_drafts(setup, kept)
    rounds = replay(setup.drafter, setup.states, setup.heads, temperature=0.0)
    whole = rounds.available == 6
    assert least <= float(rounds.accepted[whole].float().mean()) <= most  # of halves 1/2 + 1/4 + .. = 0.98


def test_the_loop_and_replay_of_its_texts_agree(mini_target):
    target = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    module = MTPChain(target.mtp, 3)
    methods = {"MTP (3)": (module, module.proposer(target.heads), ())}
    conversations = [user_rounds(prompt)[0] for prompt in load_eval_prompts("math")[:2]]
    (row,) = beside_loop(target, load_tokenizer(mini_target), methods, conversations, max_new_tokens=12)
    assert row["loop_tau"] == pytest.approx(row["replay_tau"]) and row["texts"] == 2
    assert min(row["loop_s"], row["states_s"], row["replay_s"]) > 0
    assert "| MTP (3) | 2 |" in markdown(blocks({"rows": [], "loop": [row]}))
