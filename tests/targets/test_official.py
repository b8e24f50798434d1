"""A checkpoint in DeepSeek's layout and formats gives the model that it was written from: whole, heads alone, MTP alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from official_checkpoint import from_fp4, miniature, official_config, to_fp4, write_official
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from hyperdflash.targets.deepseek_v4.checkpoint import dequantize
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint, load_heads, load_mtp, load_target
from hyperdflash.targets.producer import InProcess
from hyperdflash.training.run_index import check_target
from tiny_target.build import save_target

TOKENS = torch.randint(0, 384, (2, 160), generator=torch.Generator().manual_seed(0))  # past a window of 128


@pytest.fixture(scope="module")
def source():
    """Model and MTP block on the quantisation grid."""
    return miniature()


@pytest.fixture(scope="module")
def official(source, tmp_path_factory) -> Path:
    """As DeepSeek writes it, in five shards."""
    directory = tmp_path_factory.mktemp("official")
    write_official(directory, *source)
    return directory


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Path:
    """The same weights in transformers' layout, BF16 in one file."""
    directory = tmp_path_factory.mktemp("plain")
    save_target(directory, *source)
    return directory


def copy_of(checkpoint: Path, directory: Path, *, shards: set[str] | None = None) -> Path:
    """config.json, the index and ``shards`` (None: all)."""
    directory.mkdir()
    for path in checkpoint.iterdir():
        if shards is None or path.suffix == ".json" or path.name in shards:
            shutil.copy(path, directory)
    return directory


def index_of(checkpoint: Path) -> dict[str, str]:
    return json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]


def edit_config(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | values
    (checkpoint / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def load(path: Path, **options):
    return load_target(**({"path": path, "dtype": "fp32", "attention": "eager", "experts": "dense"} | options))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def test_the_miniature_has_the_official_formats(official):
    wanted = {
        "embed.weight": ("BF16", [384, 256]),
        "norm.weight": ("BF16", [256]),
        "hc_head_fn": ("F32", [4, 1024]),
        "layers.0.ffn.gate.tid2eid": ("I64", [384, 2]),
        "layers.1.attn.wq_a.weight": ("F8_E4M3", [128, 256]),
        "layers.1.attn.wq_a.scale": ("F8_E8M0", [1, 2]),
        "layers.1.attn.compressor.wkv.weight": ("BF16", [256, 256]),
        "layers.1.attn.indexer.wq_b.weight": ("F8_E4M3", [128, 128]),
        "layers.2.attn.compressor.ape": ("F32", [128, 128]),
        "layers.2.ffn.gate.bias": ("F32", [4]),
        "layers.2.ffn.experts.3.w1.weight": ("I8", [128, 128]),
        "layers.2.ffn.experts.3.w1.scale": ("F8_E8M0", [128, 8]),
        "mtp.0.e_proj.scale": ("F8_E8M0", [2, 2]),
        "mtp.0.ffn.experts.0.w2.weight": ("I8", [256, 64]),
    }
    shards = index_of(official)
    for name, (dtype, shape) in wanted.items():
        with safe_open(official / shards[name], framework="pt") as file:
            found = file.get_slice(name)
            assert (found.get_dtype(), found.get_shape()) == (dtype, shape), name
    assert len(set(shards.values())) == 5 and shards["embed.weight"] != shards["head.weight"]
    config = json.loads((official / "config.json").read_text())
    assert config["compress_ratios"] == [0, 4, 128, 0] and config["num_hidden_layers"] == 3 and config["expert_dtype"] == "fp4"


def test_dequantization_by_hand():
    byte = torch.tensor([[0x2A] + [0] * 15, [0x07] + [0] * 14 + [0x90]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[8.0], [0.25]]).to(torch.float8_e8m0fnu)
    found = dequantize(byte, scale, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 32)
    assert found[0, :3].tolist() == [-8.0, 8.0, 0.0]  # low four bits 0xA = -1 first, then 0x2 = 1
    assert (found[1, 0], found[1, 31]) == (1.5, -0.125)  # 6 / 4 and -0.5 / 4

    weight = torch.ones(130, 257).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]).to(torch.float8_e8m0fnu)
    found = dequantize(weight, scale, torch.float32)
    assert [found[r, c].item() for r in (127, 128) for c in (127, 128, 256)] == [1, 2, 4, 8, 16, 32]
    with pytest.raises(ValueError, match=r"130 x 257 wants a scale \[2, 3\], got \[1, 3\]"):
        dequantize(weight, scale[:1], torch.float32)

    random = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dequantize(*to_fp4(random), torch.float32), from_fp4(*to_fp4(random)))


@pytest.mark.parametrize("expert_dtype", [True, False])
def test_the_whole_target_gives_the_sources_logits(source, official, tmp_path, expert_dtype):
    checkpoint = copy_of(official, tmp_path / "copy")
    (checkpoint / "config.json").write_text(json.dumps(official_config(source[0], expert_dtype=expert_dtype)))
    target = load(checkpoint)
    assert {p.dtype for p in target.model.parameters()} == {torch.float32}
    assert (logits(target.model) - logits(source[0])).abs().max() == 0
    state = target.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in source[0].state_dict().items())


def test_weights_are_dequantized_on_a_gpu_too(official, monkeypatch):
    """Without a GPU transformers does it unasked; with one it would look for FP8 kernels."""
    asked, load_model = [], DeepseekV4ForCausalLM.from_pretrained
    record = lambda path, **options: asked.append(options["config"].quantization_config) or load_model(path, **options)  # noqa: E731
    monkeypatch.setattr(DeepseekV4ForCausalLM, "from_pretrained", record)
    assert type(load(official).model.model.layers[0].self_attn.q_a_proj) is torch.nn.Linear
    assert asked[0]["dequantize"] is True and asked[0]["quant_method"] == "fp8"


def test_both_layouts_give_the_same_states_in_bf16(official, plain):
    """The arithmetic of the real target: BF16 matrices, FP32 hyper-connections."""
    targets = [load(path, dtype="bf16") for path in (official, plain)]
    states = [InProcess(target).states([TOKENS[0], TOKENS[1, :77]], layer_ids=[0]) for target in targets]
    assert all(torch.equal(states[0][tap], states[1][tap]) for tap in (None, 0))
    assert states[0][None].dtype == torch.bfloat16 and states[0][None].shape == (237, 4, 256)
    heads = targets[0].heads
    assert heads.lm_head.weight.dtype == torch.bfloat16 and heads.hc_head.hc_fn.dtype == torch.float32
    alone = load_heads(official, "bf16")
    assert torch.equal(alone.collapse(states[0][None][None]), heads.collapse(states[0][None][None]))


def test_heads_load_from_their_own_shards(source, official, tmp_path):
    shards = index_of(official)
    own = {shards[name] for name in shards if name.split(".")[0] in ("embed", "head", "norm") or name.startswith("hc_head")}
    assert len(own) == 2 < len(set(shards.values()))
    checkpoint = copy_of(official, tmp_path / "heads", shards=own)
    heads = load_heads(checkpoint)
    for name, tensor in TargetHeads.of(source[0]).state_dict().items():
        assert torch.equal(tensor, heads.state_dict()[name].to(tensor.dtype)), name
    with pytest.raises(ValueError, match=r"lacks 3 of 5 shards, first model-00002-of-00005\.safetensors"):
        load(checkpoint)


def test_the_mtp_block_loads_from_its_own_shards(source, official, tmp_path):
    shards = index_of(official)
    checkpoint = copy_of(official, tmp_path / "mtp", shards={shards[name] for name in shards if name.startswith("mtp.")})
    mtp = load_mtp(checkpoint, experts="dense")
    assert mtp.state_dict().keys() == source[1].state_dict().keys()
    for name, tensor in source[1].state_dict().items():
        assert torch.equal(tensor, mtp.state_dict()[name]), name
    generator = torch.Generator().manual_seed(2)
    residual, embeds = torch.randn(1, 40, 4, 256, generator=generator), torch.randn(1, 40, 256, generator=generator)
    with torch.no_grad():
        assert torch.equal(mtp(residual, embeds), source[1](residual, embeds))


def test_the_mtp_block_keeps_its_frequencies_and_gates_in_fp32(official, plain):
    for path in (official, plain):
        mtp = load_mtp(path, experts="dense", dtype="bf16")
        assert torch.equal(mtp.rotary_emb.main_inv_freq, load_mtp(path, experts="dense").rotary_emb.main_inv_freq)
        kept = {name for name, p in mtp.named_parameters() if p.dtype == torch.float32}
        assert {"layer.attn_hc.fn", "hc_head.hc_fn", "layer.self_attn.sinks", "norm.weight"} <= kept
        assert mtp.layer.mlp.experts.down_proj.dtype == mtp.e_proj.weight.dtype == torch.bfloat16


def test_a_fingerprint_names_the_weights_and_not_the_layout(source, official, plain, tmp_path):
    name = fingerprint(load_heads(official))
    shared = TargetHeads.of(source[0])
    shared.layers_digest = load_heads(plain).layers_digest
    assert name == fingerprint(load_heads(plain)) == fingerprint(shared) == load(official, dtype="bf16").fingerprint
    spelled = copy_of(official, tmp_path / "spelled")
    edit_config(
        spelled,
        swiglu_limit=10,
        rope_theta=10000.0,
        expert_dtype=None,
        compress_ratios=None,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"heavily_compressed_attention": 128, "compressed_sparse_attention": 4},
        rope_scaling={
            "rope_type": "yarn",
            "factor": 16.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
    )
    assert fingerprint(load_heads(spelled)) == name
    edit_config(spelled, rope_scaling={"type": "yarn", "factor": 8, "original_max_position_embeddings": 65536})
    assert fingerprint(load_heads(spelled)) != name


def test_a_later_checkpoint_is_another_target(source, official, tmp_path):
    """One trained on: a drafter of the first one is refused."""
    model, mtp = miniature()
    model.model.norm.weight.data[0] += 0.125
    write_official(tmp_path / "later", model, mtp)
    first, later = (fingerprint(load_heads(path)) for path in (official, tmp_path / "later"))
    with pytest.raises(ValueError, match=rf"was trained on the target {first}, this one is {later}"):
        check_target(first, later, Path("run"))


@pytest.mark.parametrize("name", ["1.attn.kv_norm.weight", "2.ffn.experts.3.w1.weight", "0.ffn.gate.tid2eid"])
def test_a_fingerprint_covers_every_layer(official, tmp_path, name):
    changed, name = copy_of(official, tmp_path / "changed"), f"layers.{name}"
    shard = changed / index_of(official)[name]
    tensors = load_file(shard)
    tensors[name].view(torch.int8).view(-1)[2] ^= 1  # one bit of the second value
    save_file(tensors, shard)
    assert fingerprint(load_heads(changed)) != fingerprint(load_heads(official))


def test_the_digest_of_a_large_checkpoint_is_computed_once_and_serves_the_heads_alone(official, tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path / "runs"))
    name, shards = fingerprint(load_heads(official)), index_of(official)
    own = {shards[name] for name in shards if name.split(".")[0] in ("embed", "head", "norm") or name.startswith("hc_head")}
    heads = copy_of(official, tmp_path / "heads", shards=own)
    with pytest.raises(ValueError, match=r"has not all shards.* and 0 files .* know it: complete the checkpoint"):
        fingerprint(load_heads(heads))

    monkeypatch.setattr("hyperdflash.targets.load.KEPT_BYTES", 0)
    assert fingerprint(load_heads(official)) == name == fingerprint(load_heads(heads))
    (kept,) = (tmp_path / "runs" / "fingerprints").glob("*.json")
    kept.with_stem(f"{kept.stem} (copy)").write_text("mine")
    kept = kept.rename(kept.with_stem(f"{kept.stem[:16]}-{'beef' * 4}"))
    assert fingerprint(load_heads(official)) != name  # read, not computed
    kept.write_text('{"files": {}}')
    assert fingerprint(load_heads(official)) == name  # of other files
    with pytest.raises(ValueError, match="and 2 files"):
        fingerprint(load_heads(heads))


def with_tensors(checkpoint: Path, directory: Path, names: list[str], *, without: str = "~") -> Path:
    """A copy whose index has ``names`` too, in a shard of their own, and nothing that starts with ``without``."""
    copy_of(checkpoint, directory)
    shards = {name: shard for name, shard in index_of(checkpoint).items() if not name.startswith(without)}
    if names:
        save_file({name: torch.zeros(2, 2) for name in names}, directory / "model-more.safetensors")
    shards |= dict.fromkeys(names, "model-more.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return directory


@pytest.mark.parametrize(
    ("names", "without", "sentence"),
    [
        (["mtp.1.attn.wq_a.weight", "mtp.2.attn.wq_a.weight"], "~", r"DSpark drafter.*it has mtp\.1\.attn\.wq_a\.weight"),
        (["mtp.0.markov_head.markov_w1"], "~", r"DSpark drafter.*it has mtp\.0\.markov_head"),
        (["mtp.0.confidence_head.proj.weight"], "~", r"DSpark drafter.*April 2026 preview"),
        ([], "mtp.0.enorm", r"DSpark drafter.*it has no mtp\.0\.enorm\.weight"),
        ([], "mtp.", r"has no mtp\.0\.\* tensors.*leave MTP methods out"),
    ],
)
def test_a_dspark_drafter_is_named_when_mtp_is_asked_for(official, tmp_path, names, without, sentence):
    checkpoint = with_tensors(official, tmp_path / "dspark", names, without=without)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_mtp(checkpoint, experts="dense")
    assert "\n" not in str(caught.value)
    assert fingerprint(load_heads(checkpoint)) == fingerprint(load_heads(official))


def test_a_target_with_a_dspark_drafter_can_still_be_captured(source, official, tmp_path):
    target = load(with_tensors(official, tmp_path / "dspark", ["mtp.1.attn.wq_a.weight", "mtp.2.markov_head.markov_w1"]))
    assert torch.equal(logits(target.model), logits(source[0]))
    with pytest.raises(ValueError, match="DSpark"):
        _ = target.mtp
