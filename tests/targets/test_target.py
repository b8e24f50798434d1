"""The tiny target is transformers' own model: our kernels, taps, loading and generation change nothing it computes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hyperdflash.targets import load
from hyperdflash.targets.deepseek_v4.compat import with_cache
from hyperdflash.targets.deepseek_v4.mtp import window_mask
from hyperdflash.targets.generate import generate_batch
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint, load_heads, load_mtp, load_target, read_config
from hyperdflash.targets.sampling import Sampler
from hyperdflash.targets.taps import tap_residual
from tiny_target.build import build_target, count_parameters, set_implementations, tiny_config


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_shipped_size_keeps_its_promises():
    config = tiny_config()
    model, mtp = build_target(config)
    assert count_parameters(model, mtp) <= 3_700_000
    assert set(config.layer_types) == {
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
    assert set(config.mlp_layer_types) == {"hash_moe", "moe"}
    assert config.hc_mult == 4 and config.num_hidden_layers == 8 and config.max_position_embeddings >= 1024
    table = model.model.layers[0].mlp.gate.tid2eid
    assert (table[:, 0] != table[:, 1]).all() and len(table.unique()) == config.n_routed_experts


def test_a_target_is_a_function_of_its_seed():
    config = tiny_config(hidden_size=32, num_hidden_layers=2, vocab_size=300)
    one, two, other = (build_target(config, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("length", [16, 48, 128])
def test_cpu_kernels_equal_transformers(target, length):
    model, x = target.model, ids(2, length)
    with torch.no_grad():
        fast = model(x).logits
        set_implementations(model, attention="eager", experts="eager")
        plain = model(x).logits
        set_implementations(model, attention="windowed", experts="dense")
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_cpu_kernels_leave_other_calls_to_transformers(target):
    """A prompt that is no whole number of windows, and decoding with a cache, agree with one long forward."""
    model, x = target.model, ids(2, 48)
    with torch.no_grad():
        whole = model(x).logits
        cache = DynamicCache(config=model.config)
        steps = [model(x[:, :21], **with_cache(cache), use_cache=True).logits]
        for i in range(21, 48):
            steps.append(model(x[:, i : i + 1], **with_cache(cache), use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-4)


def test_the_tap_is_what_the_head_collapses(target):
    model, x = target.model, ids(2, 32)
    with torch.no_grad(), tap_residual(model, [0, 3]) as taps:
        output = model(x, output_hidden_states=True)
    assert taps.residual.shape == (2, 32, 4, 32)
    heads = target.heads
    assert torch.equal(heads.logits(heads.collapse(taps.residual)), output.logits.float())
    assert torch.equal(taps.layers[0], output.hidden_states[1])
    assert torch.equal(taps.layers[3], taps.residual)
    pooled = heads.norm(taps.residual.mean(dim=2))
    assert torch.equal(heads.collapse(taps.residual, "mean_pool"), pooled)


def test_the_tap_refuses_a_layer_that_is_not_there(target):
    with pytest.raises(ValueError, match=r"0\.\.3.*\[4\]"), tap_residual(target.model, [4]):
        pass


def test_right_padding_is_exact(target):
    x = ids(1, 40)
    padded = torch.cat([x, torch.zeros(1, 24, dtype=torch.long)], dim=1)
    with torch.no_grad(), tap_residual(target.model) as taps:
        target.model(padded)
        long = taps.residual[:, :40]
        target.model(torch.cat([x, ids(1, 24, seed=5)], dim=1))
        other = taps.residual[:, :40]
    torch.testing.assert_close(long, other, rtol=1e-5, atol=1e-6)


def test_mtp_follows_the_formula(target):
    """X = e_proj(enorm(embed)) on every path + h_proj(hnorm(H)) a path, one V4 layer, own head."""
    mtp, generator = target.mtp, torch.Generator().manual_seed(2)
    residual, embeds = torch.randn(2, 24, 4, 32, generator=generator), torch.randn(2, 24, 32, generator=generator)
    x = torch.stack([mtp.e_proj(mtp.enorm(embeds)) + mtp.h_proj(mtp.hnorm(residual[:, :, j])) for j in range(4)], dim=2)
    with torch.no_grad():
        torch.testing.assert_close(mtp.combine(residual, embeds), x)
        positions = torch.arange(24)[None]
        layer = mtp.layer(
            x,
            position_embeddings=mtp.rotary(embeds, positions),
            position_ids=positions,
            attention_mask=window_mask(0, 24, 16, torch.float32),
        )
        torch.testing.assert_close(mtp(residual, embeds), mtp.norm(mtp.hc_head(layer)))


def test_mtp_sees_its_window_and_no_more(target):
    mask = window_mask(0, 20, 16, torch.float32)[0, 0] == 0
    assert mask[19].nonzero().flatten().tolist() == list(range(4, 20))
    assert mask[3].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_heads_and_mtp_load_alone(target, mini_target):
    heads = load_heads(mini_target)
    assert fingerprint(heads) == target.fingerprint
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor.float(), target.heads.state_dict()[name]), name
    alone = load_mtp(mini_target, experts="dense").state_dict()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in target.mtp.state_dict().items())


def test_tables_stay_in_bf16_and_give_what_their_widened_copies_give(target, mini_target):
    heads, hidden = load_heads(mini_target, "fp32"), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert heads.embed_tokens.weight.dtype == heads.lm_head.weight.dtype == torch.bfloat16
    assert heads.norm.weight.dtype == heads.hc_head.hc_fn.dtype == heads.dtype == target.heads.dtype == torch.float32
    assert torch.equal(heads.embed(ids(2, 9)), target.heads.embed(ids(2, 9)))
    assert torch.equal(heads.logits(hidden), target.heads.logits(hidden))
    paths = hidden[:, None, None].expand(3, 1, 4, 32).bfloat16()
    for teacher in ("hc_head", "mean_pool"):
        assert torch.equal(heads.collapse(paths, teacher), target.heads.collapse(paths, teacher))
    assert load_heads(mini_target, "bf16").dtype == torch.bfloat16 and heads.double().dtype == torch.float64


def test_nothing_of_the_target_trains(target):
    modules = (target.model, target.mtp, target.heads)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)
    assert not target.heads.train().training


def test_another_target_has_another_fingerprint(target):
    heads = TargetHeads(target.model.config)
    heads.load_state_dict(target.heads.state_dict())
    heads.layers_digest = target.heads.layers_digest
    assert fingerprint(heads) == target.fingerprint
    heads.hc_head.hc_base.data[0] += 1.0
    assert fingerprint(heads) != target.fingerprint


def test_a_fingerprint_reads_the_tables_once(target, monkeypatch):
    heads = TargetHeads(target.model.config)
    heads.load_state_dict(target.heads.state_dict())
    heads.layers_digest = target.heads.layers_digest
    read, add = [], load._add
    monkeypatch.setattr(load, "_add", lambda digest, tensors: read.extend(tensors) or add(digest, tensors))
    assert fingerprint(heads) == fingerprint(heads) == target.fingerprint
    for table in (heads.lm_head.weight, heads.embed_tokens.weight):
        assert sum(tensor is table for tensor in read) == 1
    with torch.no_grad():
        heads.lm_head.weight[0] += 1.0
    changed = fingerprint(heads)
    heads.embed_tokens.weight = torch.nn.Parameter(heads.embed_tokens.weight + 1.0)
    assert len({target.fingerprint, changed, fingerprint(heads)}) == 3


def test_a_directory_that_is_no_target(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json.*src\.pretrain"):
        read_config(tmp_path)


def test_an_unknown_kind_of_target_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match=r"holds a llama model, wanted one of deepseek_v4: give another target\.path"
    ) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_greedy_answers_equal_one_full_forward_a_token(target):
    """Ragged prompts in lockstep against the plainest reference."""
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 17, 9, 17, 30)]
    found = dict(generate_batch(target.model, prompts, eos_id=1, max_new_tokens=20))
    set_implementations(target.model, attention="eager", experts="eager")
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        with torch.no_grad():
            for _ in range(20):
                text.append(int(target.model(torch.tensor([text])).logits[0, -1].argmax()))
                if text[-1] == 1:
                    break
        assert found[row] == text[len(prompt) :]
    set_implementations(target.model, attention="windowed", experts="dense")


def test_sampling_has_the_softmax_frequencies():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.7, 1.0):
        drawn, _ = Sampler(temperature, 1.0, generator).choose(logits)
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        assert (share - torch.softmax(logits[0] / temperature, -1)).abs().max() < 0.015
    nucleus, _ = Sampler(1.0, 0.5, generator).choose(logits)
    assert set(nucleus.tolist()) == {0}
    assert set(Sampler(1.0, 0.7, generator).choose(logits)[0].tolist()) == {0, 1}
    assert Sampler().choose(logits[:3])[0].tolist() == [0, 0, 0]
