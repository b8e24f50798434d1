"""DeepSeek-V4-Flash at full size on the meta device, from its own config.json: counts, taps, reducers, drafter, MTP block.

Nothing here holds a weight; every module is the one that runs.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from hyperdflash.contracts import TargetStates
from hyperdflash.drafting.conditioning import Layers, PostHcHead, PreHcHead
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.drafter import Drafter
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.drafting.reducers.mean import Mean
from hyperdflash.drafting.table1 import FLASH
from hyperdflash.identity import default_layer_ids
from hyperdflash.planning.v4_sizes import active_parameters, mtp_weights, read_sizes, total_parameters
from hyperdflash.targets.adapter import Gate
from hyperdflash.targets.deepseek_v4.adapter import even_device_map
from hyperdflash.targets.deepseek_v4.mtp import MTPBlock, window_mask
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint, load_heads, read_config
from hyperdflash.targets.taps import tap_residual
from tiny_target.build import build_target, set_implementations, tiny_config

ROOT = Path(__file__).parents[2]
META = torch.device("meta")
SIZES = read_sizes(FLASH)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    with META:
        model = DeepseekV4ForCausalLM(read_config(FLASH))
    set_implementations(model, attention="windowed", experts="dense")
    return model.eval()


def test_the_target_has_the_published_size(model):
    assert count(model) == total_parameters(SIZES) == 284_332_230_231
    assert round(active_parameters(SIZES) / 1e9) == 13
    assert count(model.model.hc_head) == 65_541
    assert 2 * SIZES.hc_mult * SIZES.hidden_size == 32 * 1024  # bytes of one residual in bf16
    kinds = model.config.layer_types
    assert len(kinds) == 43 and kinds[:2] == ["sliding_attention"] * 2 and kinds[42] == "compressed_sparse_attention"
    assert kinds.count("compressed_sparse_attention") == 21 and kinds.count("heavily_compressed_attention") == 20
    assert model.config.mlp_layer_types.count("hash_moe") == 3


def test_sizes_come_from_a_config_json_in_either_spelling():
    written = json.loads((FLASH / "config.json").read_text())  # as DeepSeek writes it
    assert all(getattr(SIZES, f.name) == written[f.name] for f in fields(SIZES))
    tiny = ROOT / "assets" / "tiny"  # as transformers writes it
    assert read_sizes(tiny).hidden_size == read_config(tiny).hidden_size
    assert len(read_sizes(tiny).layer_ratios) == read_config(tiny).num_hidden_layers
    with pytest.raises(ValueError, match=r"nowhere has no config\.json"):
        read_sizes("nowhere")


def test_config_json_and_transformers_agree_on_flash(model):
    """The file as DeepSeek writes it, against transformers' defaults for the same model; its schedule is its own."""
    ours, defaults = model.config.to_dict(), DeepseekV4Config().to_dict()
    own = {"layer_types", "rope_parameters", "quantization_config", "architectures", "dtype", "expert_dtype", "topk_method"}
    own |= {"_attn_implementation", "experts_implementation", "transformers_version"}
    different = {name for name in ours.keys() & defaults.keys() if ours[name] != defaults[name]}
    assert different <= own, different
    assert ours["rope_parameters"]["compress"]["rope_theta"] == 160000 and ours["rope_parameters"]["compress"]["factor"] == 16
    assert ours["rope_parameters"]["main"]["rope_type"] == "default"


def test_every_tap_of_a_forward(model):
    for module in model.modules():
        if isinstance(module, DeepseekV4HyperConnection):
            module.hc_sinkhorn_iters = 1  # iterations change no shape
    mask = window_mask(0, 256, 128, torch.float32, META).expand(2, -1, -1, -1)
    with torch.no_grad(), tap_residual(model, range(43)) as taps:
        ids = torch.zeros(2, 256, dtype=torch.long, device=META)
        output = model(ids, use_cache=False, attention_mask={"sliding_attention": mask})
    assert output.logits.shape == (2, 256, 129_280)
    assert taps.residual.shape == (2, 256, 4, 4096) and len(taps.layers) == 43
    assert all(tap.shape == taps.residual.shape for tap in taps.layers.values())


def test_the_mtp_block(model):
    with META:
        mtp = MTPBlock(model.config)
    apart = sum(w.count for w in mtp_weights(SIZES) if w.part != "LM head")
    experts = SIZES.n_routed_experts * SIZES.expert_weights
    assert count(mtp) == apart + experts + SIZES.hidden_size  # the block's own norm is counted with the LM head there
    set_implementations(model, mtp, attention="windowed", experts="dense")
    residual, embeds = torch.empty(2, 256, 4, 4096, device=META), torch.empty(2, 256, 4096, device=META)
    mask = window_mask(0, 256, 128, torch.float32, META)
    assert mtp(residual, embeds, mask).shape == (2, 256, 4096)


TAPS = default_layer_ids(43, 5)
CASES = [
    (PreHcHead(), HcGate(), 65_541 + 4 * 4096),
    (PreHcHead(), HcGate(path_norm=False), 65_541),
    (PreHcHead(), Fc(), 4 * 4096 * 4096),
    (PreHcHead(), Mean(), 0),
    (PostHcHead(), Mean(), 0),
    (PostHcHead(), Fc(), 4096 * 4096),
    (Layers(layer_ids=TAPS), Fc(), 5 * 4096 * 4096),
    (Layers(layer_ids=TAPS, paths="flat"), Fc(), 20 * 4096 * 4096),
]


@pytest.mark.parametrize(("conditioning", "reducer", "parameters"), CASES, ids=lambda value: getattr(value, "name", None))
def test_every_reducer_and_the_papers_drafter(conditioning, reducer, parameters):
    """Drawn, conditioned and drafting, on tensors without memory that claim to be on the CPU: autocast knows no meta device."""
    config = instantiate(OmegaConf.load(ROOT / "conf" / "drafter" / "paper.yaml"))
    with FakeTensorMode(), torch.no_grad():
        heads = TargetHeads(read_config(FLASH))
        drafter = Drafter(config, DrafterParts(conditioning=conditioning, reducer=reducer, heads=heads, mask_token_id=128_799))
        drafter.reset_parameters(heads, torch.Generator())
        states = TargetStates(
            ids=("a",),
            domains=("math",),
            input_ids=torch.zeros(1, 200, dtype=torch.long),
            loss_mask=torch.ones(1, 200, dtype=torch.bool),
            lengths=torch.tensor([200]),
            residual=torch.empty(1, 200, 4, 4096, dtype=torch.bfloat16),
            layers=torch.empty(1, 200, len(conditioning.layer_ids), 4, 4096, dtype=torch.bfloat16),
            layer_ids=tuple(conditioning.layer_ids),
        )
        context = drafter.context(states, heads)
        keys = drafter.project_context(context, torch.arange(200))
        anchors, visible = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, 200, dtype=torch.bool)
        hidden = drafter.draft(anchors[..., None], anchors, keys, visible, heads)
        logits = heads.logits(hidden)
    assert context.shape == (1, 200, 4096) and len(keys) == 5
    assert hidden.shape == (1, 3, 6, 4096) and logits.shape == (1, 3, 6, 129_280)
    assert count(drafter.reducer) == parameters
    attention, mlp = 4096 * (2 * 32 + 2 * 8) * 128, 3 * 4096 * 12_288
    assert count(drafter) - parameters == 5 * (attention + mlp + 2 * 4096 + 2 * 128) + 2 * 4096


def test_eight_gpus_of_80_gb_hold_it_in_bf16(model):
    """Weights alone, with room for a forward's activations; the head lies on another GPU than the embedding."""
    placed, used = even_device_map(43, 8), [0] * 8
    for name, parameter in model.named_parameters():
        gpu = next(gpu for module, gpu in placed.items() if name.startswith(f"{module}."))
        used[gpu] += 2 * parameter.numel()
    assert max(used) / 2**30 < 74.5 and sum(used) == 2 * count(model)
    assert placed["model.embed_tokens"] != placed["model.hc_head"]


@pytest.mark.parametrize(("hc_mult", "hidden_size", "layers"), [(2, 64, 3), (8, 96, 6)])
def test_other_numbers_of_paths_widths_and_depths(hc_mult, hidden_size, layers):
    """From tap to drafted block with real numbers, and by the counts."""
    config = tiny_config(hc_mult=hc_mult, hidden_size=hidden_size, num_hidden_layers=layers, vocab_size=256, sliding_window=16)
    model, mtp = build_target(config)
    heads = TargetHeads.of(model)
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tap_residual(model, [0, layers - 1]) as taps:
        logits = model(ids).logits
    assert taps.residual.shape == taps.layers[0].shape == (2, 32, hc_mult, hidden_size)
    assert torch.equal(heads.logits(heads.collapse(taps.residual)), logits)
    assert torch.equal(taps.layers[layers - 1], taps.residual)
    assert mtp(taps.residual, heads.embed(ids)).shape == (2, 32, hidden_size)
    generator = torch.Generator().manual_seed(1)
    reducer = HcGate(path_norm=False).build(PreHcHead(), heads, hidden_size)
    reducer.reset_parameters(heads, generator)
    assert count(reducer) == hc_mult * hc_mult * hidden_size + hc_mult + 1
    assert torch.equal(reducer(taps.residual), heads.hc_head(taps.residual))
    other = read_sizes(FLASH, hc_mult=hc_mult, hidden_size=hidden_size)
    assert (other.hc_mult, other.hidden_size) == (hc_mult, hidden_size)


class LastGate(nn.Module):
    """Collapses as a target might that has no head of its own: with the gate by which its last sublayer reads the paths."""

    def __init__(self, connection: DeepseekV4HyperConnection):
        super().__init__()
        self.connection = connection

    def forward(self, paths):
        return self.connection(paths)[2]

    def gate(self):
        paths = self.connection.hc_mult
        return Gate(self.connection.fn[:paths], self.connection.base[:paths], self.connection.scale[:1])


class MeanOfPaths(nn.Module):
    """No weights, no gate."""

    def forward(self, paths):
        return paths.mean(dim=2)

    def gate(self):
        return None


@pytest.fixture
def tiny():
    return build_target(tiny_config(num_hidden_layers=2, hidden_size=32, vocab_size=256))[0]


def heads_with(model: DeepseekV4ForCausalLM, collapse: nn.Module) -> TargetHeads:
    heads = TargetHeads(model.config)
    heads.hc_head = collapse
    heads.load_state_dict(model.model.embed_tokens.state_dict(prefix="embed_tokens."), strict=False)
    return heads


def test_another_collapse_serves_teacher_conditioning_and_gate(tiny):
    paths = torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(0))
    states = TargetStates(("a",), ("math",), None, None, None, paths)
    connection = tiny.model.layers[-1].ffn_hc
    connection.fn.data.normal_(generator=torch.Generator().manual_seed(1))
    gated, mean = heads_with(tiny, LastGate(connection)), heads_with(tiny, MeanOfPaths())
    assert torch.equal(mean.collapse(paths), mean.collapse(paths, "mean_pool"))
    assert not torch.equal(gated.collapse(paths), mean.norm(paths.mean(2)))
    for heads in (gated, mean):
        assert torch.equal(PostHcHead().gather(states, heads)[:, :, 0], heads.collapse(paths))
    assert fingerprint(gated) != fingerprint(mean)

    reducer = HcGate(path_norm=False).build(PreHcHead(), gated, 32)
    reducer.reset_parameters(gated, torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(reducer(paths), connection(paths)[2])
    with pytest.raises(ValueError, match=r"reducer\.init=inherit .* this target has none: run with reducer\.init=random"):
        HcGate().build(PreHcHead(), mean, 32).reset_parameters(mean, torch.Generator())


def test_the_shipped_target_keeps_its_name():
    """Caches and drafters made on it stay valid."""
    assert fingerprint(load_heads(ROOT / "assets" / "tiny")) == "e864f0007c2193a1"
