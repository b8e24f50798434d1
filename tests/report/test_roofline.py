"""The roofline against DeepSeek-V4-Flash's published totals, transformers' own module, this project's drafter, and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.planning.roofline import (
    GPU,
    Method,
    Work,
    block_drafting,
    mtp_drafting,
    total_seconds,
    verification,
)
from hyperdflash.planning.roofline_job import passes_figure, roofline_blocks, roofline_record, setting_of, write_roofline
from hyperdflash.planning.v4_sizes import V4Sizes, active_parameters, checkpoint_bytes, mtp_weights, total_parameters
from hyperdflash.report.results import Results, Row
from hyperdflash.report.tables import markdown

FP4, FP8 = 0.5 + 1 / 32, 1 + 1 / 128**2
# 1 head of 8 (2 of them RoPE), one sliding, one sparse and one heavily compressed layer, the MTP block
SMALL = V4Sizes(
    vocab_size=10, hidden_size=4, num_attention_heads=1, head_dim=8, qk_rope_head_dim=2, q_lora_rank=2, o_lora_rank=3,
    o_groups=1, sliding_window=16, index_n_heads=2, index_head_dim=4, index_topk=5, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=6, num_hash_layers=1, hc_mult=2, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip
BLOCK = Method(name="B", drafter="block", slots=2, tau=2.0, speedup=1.0, reducer="fc")
MTP = Method(name="M", drafter="mtp", slots=1, tau=2.5, speedup=1.0)
UNIT = GPU(name="unit", bandwidth_tb_s=1e-12, fp8_tflops=1e-12, bf16_tflops=1e-12)  # one byte, one FLOP a second


@pytest.fixture
def setting(compose_config):
    return lambda overrides=(): setting_of(compose_config("roofline", list(overrides)))


def parts(works) -> dict[str, Work]:
    return {work.part: work for work in works}


def test_published_totals(setting):
    """284B parameters, 13B active, 159.6 GB on disk: formats and sizes together."""
    sizes = setting().sizes
    assert total_parameters(sizes) / 1e9 == pytest.approx(284, abs=0.5)
    assert active_parameters(sizes) / 1e9 == pytest.approx(13, abs=0.5)
    assert checkpoint_bytes(sizes) / 1e9 == pytest.approx(159.6, abs=0.05)
    assert sizes.entry_bytes == 584 and len(sizes.layer_ratios) == 43
    assert [round(sizes.distinct_experts(t)) for t in (1, 7, 16)] == [6, 39, 81]


def test_parameters_are_those_of_transformers(setting):
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    from hyperdflash.targets.deepseek_v4.mtp import MTPBlock

    sizes = setting().sizes
    config = DeepseekV4Config(compress_ratios=list(sizes.compress_ratios))
    with torch.device("meta"):
        model, mtp = DeepseekV4ForCausalLM(config), MTPBlock(config)
    assert total_parameters(sizes) == sum(p.numel() for p in model.parameters())
    apart = sum(p.numel() for name, p in mtp.named_parameters() if ".mlp.experts." in name)
    assert apart == sizes.n_routed_experts * sizes.expert_weights
    own = sum(p.numel() for p in mtp.parameters()) - apart
    assert sum(w.count for w in mtp_weights(sizes)) == own + sizes.vocab_size * sizes.hidden_size


def test_drafter_weights_are_those_of_the_module(setting):
    from transformers import DeepseekV4Config

    from hyperdflash.drafting.conditioning import PreHcHead
    from hyperdflash.drafting.draft_model import DrafterParts
    from hyperdflash.drafting.reducers.fc import Fc
    from hyperdflash.drafting.reducers.hc_gate import HcGate
    from hyperdflash.targets.heads import TargetHeads

    found = setting()
    method = replace(found.methods[3], tau=1.0)
    with torch.device("meta"):
        heads = TargetHeads(DeepseekV4Config())
    for name, reducer in (("hc_gate", HcGate()), ("fc", Fc())):
        with torch.device("meta"):
            given = DrafterParts(conditioning=PreHcHead(), reducer=reducer, heads=heads, mask_token_id=0)
            module = found.drafter.build(given)
        norms = sum(p.numel() for path, p in module.named_parameters() if "norm" in path and "reducer" not in path)
        count = sum(p.numel() for p in module.parameters()) - norms
        again = found.drafter.num_layers * 2 * 4096 * 1024  # key and value projections are read for the new states too
        work = parts(block_drafting(found.sizes, found.drafter, replace(method, reducer=name), 1, 0))
        assert work["draft layers"].bytes + work["reducer and new keys"].bytes == 2 * (count + again)


def test_one_verification_by_hand():
    """Two tokens of three rows, 200 tokens of context."""
    found = parts(verification(SMALL, n=2, batch=3, context=200))
    # wq_a 4 x 2, wq_b 2 x 8, wkv 4 x 8, wo_a 8 x 3, wo_b 3 x 4 = 92; norms 4 + 2 + 8; one sink
    sliding = (92 * FP8, 14 * 2, 4)
    # wkv, wgate [16, 4] and norm 8, bias 4 x 16; indexer wq_b 2 x 8, weights 4 x 2, compressor 2 [8, 4] + 4, bias 4 x 8
    sparse = (92 * FP8 + 16 * FP8, (14 + 136 + 8 + 68) * 2, (1 + 64 + 32) * 4)
    # wkv, wgate [8, 4], norm 8, bias 128 x 8
    heavy = (92 * FP8, (14 + 72) * 2, (1 + 1024) * 4)
    assert found["attention"].bytes == pytest.approx(sum(sliding) + sum(sparse) + sum(heavy))
    assert found["attention"].fp8_flops == 2 * 6 * (3 * 92 + 16)
    assert found["attention"].bf16_flops == 2 * 6 * (14 + 1 + 226 + 97 + 86 + 1025)
    assert found["shared expert and router"].bytes == pytest.approx(3 * (72 * FP8 + (16 + 4) * 2))
    # 2 + m mixes of m * D, their biases, three scales, twice a layer; hc_head 2 x 8 + 2 + 1
    assert found["hyper-connections"].bytes == 4 * (3 * 2 * (8 * 8 + 8 + 3) + 19)
    assert found["LM head"].bytes == 2 * (40 + 4)
    assert SMALL.distinct_experts(1) == 2 and SMALL.distinct_experts(2) == 3
    assert found["routed experts"].bytes == pytest.approx(3 * 4 * (1 - 0.5**6) * 72 * FP4)
    assert found["routed experts"].fp8_flops == 3 * 6 * 2 * 2 * 72
    # an entry: 6 FP8, 2 BF16, no full scale group, padding = 11; index key 8. Window 16 in each layer;
    # sparse: 50 compressed, 5 a query, keys of all 50; heavy: 1 compressed
    entries = 16 + (16 + 10) + (16 + 1)
    assert SMALL.entry_bytes == 11 and found["cache"].bytes == 3 * (entries * 11 + 50 * 8)
    assert found["cache"].bf16_flops == 6 * 4 * 8 * (16 + (16 + 5) + (16 + 1))
    assert found["cache"].fp8_flops == 6 * 2 * 2 * 4 * 50


def test_tokens_that_share_experts_read_fewer_of_them():
    own, same, one = (parts(verification(SMALL, n, 2, 0, s))["routed experts"] for n, s in ((3, False), (3, True), (1, False)))
    assert one.bytes == same.bytes < own.bytes
    assert own.fp8_flops == same.fp8_flops == 3 * one.fp8_flops


def test_mtp_steps_read_the_head_again():
    one, three = (parts(mtp_drafting(SMALL, None, replace(MTP, slots=slots), 2, 100)) for slots in (1, 3))
    assert three["LM head"].bytes == 3 * one["LM head"].bytes == 3 * 2 * 44
    assert three["LM head"].bf16_flops == 3 * 2 * 44 * 2
    # 2.5 tokens of two rows in the first step, one a row in the others
    assert one["routed experts"].fp8_flops == 2 * 2 * 72 * 5 and three["routed experts"].fp8_flops == 2 * 2 * 72 * 9
    experts = [SMALL.distinct_experts(t) * 72 * FP4 for t in (5, 2, 2)]
    assert three["routed experts"].bytes == pytest.approx(sum(experts))
    assert one["cache"].bytes == 2 * 16 * 11  # sliding window only


def test_block_drafter_by_hand():
    drafter = DrafterConfig(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, intermediate_size=5, block_size=3)
    found = parts(block_drafting(SMALL, drafter, BLOCK, 3, 7))
    layer = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 5
    assert found["draft layers"].bytes == 2 * 2 * layer and found["draft layers"].bf16_flops == 2 * 2 * layer * 9
    fresh = 2 * 4 * 4 + 2 * (2 * 4 * 2)  # fc, then keys and values of both layers
    assert found["reducer and new keys"].bytes == 2 * fresh and found["reducer and new keys"].bf16_flops == 2 * fresh * 6
    assert found["cache"].bytes == 3 * 2 * 7 * 2 * 2 * 2 and found["cache"].bf16_flops == 4 * 4 * 2 * 10 * 9
    assert found["LM head"].bytes == 80 and found["LM head"].bf16_flops == 2 * 40 * 6
    windowed = parts(block_drafting(SMALL, replace(drafter, context_window=4), BLOCK, 3, 7))["cache"]
    assert windowed.bytes == 3 * 2 * 4 * 2 * 2 * 2 and windowed.bf16_flops == 4 * 4 * 2 * 7 * 9
    wide = parts(block_drafting(SMALL, replace(drafter, hidden_size=8), replace(BLOCK, tau=1.0, reducer="hc_gate"), 1, 0))
    assert wide["draft layers"].bytes == 2 * (2 * (2 * 8 * 4 + 2 * 8 * 2 + 3 * 8 * 5) + 2 * 4 * 8)
    with pytest.raises(ValueError, match="reducer must be hc_gate or fc, got 'mean'"):
        block_drafting(SMALL, drafter, replace(BLOCK, reducer="mean"), 1, 0)


def test_time_is_the_larger_of_both_and_shared_by_gpus():
    gpu = GPU(name="x", bandwidth_tb_s=2.0, fp8_tflops=4.0, bf16_tflops=1.0)
    assert total_seconds([Work("a", 6e12, fp8_flops=4e12, bf16_flops=1e12)], gpu) == 3.0
    assert total_seconds([Work("a", 2e12, fp8_flops=4e12, bf16_flops=1e12)], gpu) == 2.0
    assert total_seconds([Work("a", 6e12), Work("b", 0, 8e12)], replace(gpu, count=2)) == 1.5 + 1.0


def test_predicted_speedup_is_the_formula(setting):
    drafter = DrafterConfig(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2, intermediate_size=5, block_size=3)
    small = replace(setting(), sizes=SMALL, drafter=drafter, gpu=UNIT, context=0)
    found = small.round(BLOCK, 1)
    verify, plain = (total_seconds(verification(SMALL, n, 1, 0), UNIT) for n in (3, 1))
    draft = total_seconds(block_drafting(SMALL, drafter, BLOCK, 1, 0), UNIT)
    assert found["speedup"] == pytest.approx(2 * plain / (draft + verify))
    assert found["drafter_share"] == pytest.approx(draft / (draft + verify))
    with pytest.raises(ValueError, match=r"set drafter\.block_size=5"):
        small.round(replace(BLOCK, slots=4), 1)


def test_trends_on_flash(setting):
    """Checks orders, not values: by batch size, by method and by context."""
    found = setting()
    assert found.ratio(7, 1) == pytest.approx(2.70, abs=0.01) and found.ratio(7, 1, True) < 1.01
    assert found.ratio(7, 128) < found.ratio(7, 32) < found.ratio(7, 4)
    shares = {m.name: found.round(m, 1)["drafter_share"] for m in found.methods}
    assert shares["MTP (6)"] > shares["MTP (3)"] > shares["HyperDFlash (6)"]
    longer = replace(found, context=262144)
    assert longer.round(found.methods[3], 1)["draft_s"] > 2 * found.round(found.methods[3], 1)["draft_s"]


def test_report(setting, compose_config, tmp_path, capsys):
    overrides = ["batch=[1,8]", "max_tokens=4", "gpu=h200"]
    found = setting(overrides)
    text = markdown(roofline_blocks(found, roofline_record(found), {}))
    assert "4 x H200 (4.8 TB/s" in text and "284.3B parameters, 13.3B active per token, 159.6 GB" in text
    assert "| HyperDFlash (6) | 3.69 | 2.80× | 1 |" in text and "Table 2 (Non-thinking)" in text
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1
    write_roofline(compose_config("roofline", [*overrides, f"out={tmp_path}"]))
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "roofline.md").read_text() == text and text in capsys.readouterr().out
    data = json.loads((tmp_path / "roofline.json").read_text())
    rows = data["verification"]
    assert [(row["batch"], row["n"]) for row in rows[3:5]] == [(1, 4), (8, 1)]
    assert rows[0]["experts"] == 6 and rows[4]["over_one"] == 1
    assert data["setting"]["gpu"]["name"] == "h200" and len(rows) == 8
    assert len(data["rounds"]) == len(found.methods) * 2 * 2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["gpu=mine"], "gpu must be h100 or h200 or b200, got 'mine'"),
        (["batch=8"], r"batch must be a list such as \[1,8\], got 8"),
        (["batch=[0]"], "batch must be a positive integer, got 0"),
        (["batch=[]"], "batch and methods need an entry each"),
        (["context=-1"], "context must be an integer of at least 0"),
        (["num_gpus=0"], "num_gpus must be a positive integer"),
        (["gpus.h100.bandwidth_tb_s=0"], "gpu h100: bandwidth_tb_s must be a number above 0"),
        (["drafter=mtp"], "drafter must be a block drafter's sizes"),
        (["+model.compress_ratios=[0]"], "compress_ratios needs a layer and the MTP block's entry"),
        (["+model.head_dim=0"], r"model\.head_dim must be a positive integer"),
    ],
)
def test_refuses(setting, overrides, sentence):
    from hydra.errors import InstantiationException

    with pytest.raises((ValueError, InstantiationException), match=sentence):
        setting(overrides)


def test_a_markov_head_reads_its_table_per_slot_and_the_lm_head_once(setting):
    sizes, drafter = setting().sizes, setting().drafter
    plain = replace(BLOCK, slots=6)
    heads = plain, replace(plain, head="markov", rank=64), replace(plain, head="domino", rank=64, state=8)
    read = {m.head: parts(block_drafting(sizes, drafter, m, 1, 100)) for m in heads}
    assert read["markov"]["LM head"].bytes == read["lm_head"]["LM head"].bytes
    assert read["markov"]["draft head"].bytes == 6 * sizes.vocab_size * 64 * 2 and "draft head" not in read["lm_head"]
    more = 3 * 8 * (sizes.hidden_size + 8) + (sizes.hidden_size + 8) * 64
    assert read["domino"]["draft head"].bytes == read["markov"]["draft head"].bytes + 6 * 2 * more
    assert read["domino"]["LM head"].bytes == read["lm_head"]["LM head"].bytes


def test_a_correction_reads_the_lm_head_per_slot(setting):
    sizes, drafter = setting().sizes, setting().drafter
    plain, corrected = (
        parts(block_drafting(sizes, drafter, replace(BLOCK, slots=6, head=h), 1, 100)) for h in ("lm_head", "correction")
    )
    assert corrected["LM head"].bytes == 6 * plain["LM head"].bytes
    assert corrected["LM head"].bf16_flops == plain["LM head"].bf16_flops
    assert corrected["draft head"].bytes == 6 * 3 * 2 * sizes.hidden_size**2 * 2


def test_a_lead_adds_its_steps_and_leaves_fewer_slots_to_the_block(setting):
    sizes, drafter = setting().sizes, setting().drafter
    led = parts(block_drafting(sizes, drafter, replace(BLOCK, slots=6, lead=2), 1, 100))
    block = parts(block_drafting(sizes, drafter, replace(BLOCK, slots=6), 1, 100))
    steps = parts(mtp_drafting(sizes, drafter, replace(MTP, slots=2, tau=BLOCK.tau), 1, 100))
    assert led["routed experts"] == steps["routed experts"] and led["draft layers"] == block["draft layers"]
    assert led["LM head"].bytes == steps["LM head"].bytes + block["LM head"].bytes
    assert led["LM head"].bf16_flops == pytest.approx(block["LM head"].bf16_flops * 4 / 6 + steps["LM head"].bf16_flops)


def test_a_lead_of_every_slot_leaves_the_block_nothing_to_do(setting):
    """Passes: the chain's steps, one for a block, a lead's steps and the block's one."""
    sizes, drafter = setting().sizes, setting().drafter
    chain = replace(MTP, slots=6, tau=BLOCK.tau)
    led = [replace(BLOCK, slots=6, lead=lead, head="correction") for lead in (0, 1, 5, 6)]
    assert block_drafting(sizes, drafter, led[-1], 8, 100) == mtp_drafting(
        sizes, drafter, replace(chain, head="correction"), 8, 100
    )
    assert [method.passes for method in (chain, *led)] == [6, 1, 2, 6, 6]


def test_the_picture_and_the_table_have_each_batch_and_what_was_measured(compose_config, setting, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setitem(passes_figure.__globals__, "save_figure", lambda figure, path: drawn.append(figure) or path)
    rows = [
        Row("", name, "non_think", temperature, "mean", "speedup", None, speedup)
        for name, temperature, speedup in [("AR", 0, 1), ("MTP (3)", 0, 1.7), ("MTP (6)", 1, 3)]
    ]
    (tmp_path / "paper.csv").write_text(Results((*rows, rows[1]._replace(group="math", value=2.5))).csv_text())
    found = setting(["batch=[1,8]"])
    write_roofline(compose_config("roofline", ["batch=[1,8]", f"measured={tmp_path}", f"out={tmp_path}"]))
    assert "| MTP (3) | 2.93 | 1.70× | 1 |" in (tmp_path / "roofline.md").read_text()
    axes = [axis for part in drawn[0].subfigs[1:] for axis in part.axes]
    predicted = [[found.round(method, batch)["speedup"] for method in found.methods] for batch in (1, 8)]
    for axis, values in zip(axes, ([method.tau for method in found.methods], [1.7], *predicted), strict=True):
        points = [bars.lines[0].get_xydata()[0] for bars in axis.containers]
        assert [round(x) for x, _ in points] == [3, 6, 1, 1][: len(values)] and [y for _, y in points] == pytest.approx(values)
    with pytest.raises(ValueError, match="by=decoding"):
        write_roofline(compose_config("roofline", [f"measured={tmp_path}/no", f"out={tmp_path}"]))


def test_an_evaluation_gives_methods_with_the_parts_of_their_runs(setting, compose_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    runs = {"MTP (3)": "as shipped", "Best": "best-run"}
    rows = [
        Row("", name, "", 0.0, "mean", metric, None, value)
        for name, slots, tau in (("MTP (3)", 3, 2.3), ("Best", 6, 3.1))
        for metric, value in [("tau", tau), *[("survival", 0.5)] * slots]
    ]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "acceptance.csv").write_text(Results(tuple(rows)).csv_text())
    (tmp_path / "demo" / "metrics.json").write_text(json.dumps({"runs": runs}))
    with pytest.raises(ValueError, match="a run that is gone"):
        setting([f"from={tmp_path}/demo"])
    (tmp_path / "train" / "best-run").mkdir(parents=True)
    OmegaConf.save(compose_config("train", ["method=best"]), tmp_path / "train" / "best-run" / "config.yaml")
    shipped, best = setting([f"from={tmp_path}/demo"]).methods
    assert (shipped.drafter, shipped.slots, shipped.tau) == ("mtp", 3, 2.3)
    assert (best.drafter, best.slots, best.tau, best.reducer, best.lead, best.head) == (
        "block",
        6,
        3.1,
        "hc_gate",
        2,
        "correction",
    )
    (tmp_path / "demo" / "acceptance.csv").rename(tmp_path / "demo" / "paper.csv")
    drafted = {"MTP (3)": {1: 30, 3: 10}, "Best": {6: 5}}
    (tmp_path / "demo" / "evaluation.json").write_text(json.dumps({"runs": runs, "drafted": drafted}))
    early, whole = setting([f"from={tmp_path}/demo"]).methods
    assert early.drafted == {1: 0.75, 3: 0.25} and (early.tau, whole.tau) == (2.3, 3.1)
    with pytest.raises(ValueError, match=r"has no metrics\.json"):
        setting([f"from={tmp_path}"])


def test_a_draft_that_ends_early_costs_what_it_computes(setting):
    """A chain computes the slot before which it ends, and verification reads the drafts that are left."""
    found = setting()
    chain = replace(MTP, slots=6, drafted={0: 0.5, 2: 0.25, 6: 0.25})
    own = found.round(chain, 8)
    drafting = {n: total_seconds(mtp_drafting(found.sizes, None, chain, 8, found.context, n), found.gpu) for n in (1, 3, 6)}
    assert own["draft_s"] == pytest.approx(0.5 * drafting[1] + 0.25 * drafting[3] + 0.25 * drafting[6])
    assert own["verify_s"] == pytest.approx(sum(w * found.verify_s(n, 8) for w, n in ((0.5, 1), (0.25, 3), (0.25, 7))))
    block = replace(BLOCK, slots=6, lead=2, drafted={1: 0.5, 4: 0.5}, reducer="hc_gate")
    assert (chain.passes, block.passes) == (0.5 * 1 + 0.25 * 3 + 0.25 * 6, 0.5 * 2 + 0.5 * 3)
    assert found.round(block, 1)["draft_s"] < found.round(replace(block, drafted={}), 1)["draft_s"]
