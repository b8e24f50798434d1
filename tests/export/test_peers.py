"""Exported drafters give this project's logits in the classes of z-lab's dflash, speculators and transformers.

`make test-peers` makes .venv-peers with the first two, whose pins are not this project's, and runs this file.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperdflash.contracts import BlockLayout, Slots, TargetStates
from hyperdflash.drafting.heads.xpress import XPress
from hyperdflash.drafting.layers import CHANNELS
from hyperdflash.export.folder import build_drafter, read_folder
from hyperdflash.export.formats import config_of, renamed
from hyperdflash.export.job import random_states

PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
TOLERANCE = 1e-4
NUM_TOKENS = 24
PEERS = [("zlab", "dflash", method) for method in ("dflash", "fc", "causal", "dflash2")]
PEERS += [("speculators", "speculators", method) for method in ("dflash", "fc", "dspark", "dflash2")]


def as_second(folder: Path, described: dict, state: dict[str, torch.Tensor], target, to: str) -> None:
    """Writes DFlash 2 as its authors do; no export does, since no engine serves it on V4."""
    sizes, own = described["groups"], {"head": {"option": "lm_head"}}
    target_config = {**target.heads.config.to_dict(), "name": str(target.path)}
    config = config_of(to, {**described, "groups": sizes | own}, target_config) | {"architectures": ["DFlash2DraftModel"]}
    added = {"conv_kernel_size": sizes["drafter"]["convolution"], "conv_group_size": CHANNELS}
    added |= {f"selector_{name}": sizes["head"][name] for name in ("rank", "top_k")}
    if to == "speculators":
        config |= {"speculators_model_type": "dflash2", **added}
        config["speculators_config"]["algorithm"] = "dflash2"
    else:
        config["dflash_config"] |= added
    (folder / "config.json").write_text(json.dumps(config))

    def theirs(name: str) -> str:
        selector = name.replace("head.", "candidate_selector.").replace("codebook.weight", "codebook")
        kernels = renamed(name, to).replace("kernel_projection", "kernel_projection.weight")
        return selector if name.startswith("head.") else kernels

    save_file({theirs(name): tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


@pytest.fixture
def drafter_of(exported, target):
    """drafter_of(method, to) -> (folder, its drafter in this project)."""

    def load(method: str, to: str):
        folder = exported(method, "transformers" if method == "dflash2" else to)
        described, state = read_folder(folder)
        if method == "dflash2":
            as_second(folder, described, state, target, to)
        return folder, build_drafter(described, state, target.heads, {"path": str(target.path), "experts": target.experts})

    return load


def own_logits(drafter, target, states: TargetStates, anchors: torch.Tensor) -> torch.Tensor:
    """Returns [A, S, V] of this project, with the tokens of the text before each slot."""
    with torch.no_grad():
        slots = drafter.slots(states, target.heads, anchors[None], torch.ones_like(anchors, dtype=torch.bool)[None])
        return drafter.head.logits(slots, target.heads)[0].dense()


def side_by_side(drafter, target, states: TargetStates) -> torch.Tensor:
    """Returns what an engine gives a drafter, [T, N * D]: the streams of each position side by side."""
    return drafter.conditioning.gather(states, target.heads)[0].flatten(1).contiguous()


def of_peer(peer: str, folder: Path, at: Path) -> torch.Tensor:
    """Returns what peer.py computes from the file ``given`` in ``at``."""
    command = [PYTHON, Path(__file__).with_name("peer.py"), peer, folder, at / "given", at / "logits"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env={**alone, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(at / "logits")["logits"]


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peers: `make test-peers` makes it")
@pytest.mark.parametrize(("peer", "to", "method"), PEERS)
def test_a_peer_s_class_gives_our_logits(peer, to, method, drafter_of, target, tmp_path):
    folder, drafter = drafter_of(method, to)
    states, anchors = random_states(drafter, target.heads), torch.tensor([1, 5, 12, 18])
    given = {
        "input_ids": states.input_ids[0],
        "anchors": anchors,
        "hidden": side_by_side(drafter, target, states),
        "embedding": target.heads.embed_tokens.weight.float().clone(),
        "lm_head": target.heads.lm_head.weight.float().clone(),
    }
    save_file(given, tmp_path / "given")
    theirs, ours = of_peer(peer, folder, tmp_path), own_logits(drafter, target, states, anchors)
    drafted = theirs > float("-inf")  # of DFlash 2 the candidates alone
    assert theirs.shape == ours.shape and torch.equal(drafted, ours > float("-inf"))
    if not drafted.all():
        theirs, ours = (logits.log_softmax(dim=-1)[drafted] for logits in (theirs, ours))
    assert ours.std() > 0.1
    apart = float((theirs - ours).abs().max())
    print(f"{peer} {method}: logits of standard deviation {float(ours.std()):.2f}, at most {apart:.1e} apart")
    assert apart < TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peers: `make test-peers` makes it")
def test_xpress_is_the_refiner_of_speculators(target, tmp_path):
    """After the text's tokens, and after six passes over its own: the head alone, which mixes the drafted slots."""
    heads, draw = target.heads, torch.Generator().manual_seed(0)
    head = XPress(rank=8).build(heads, 6)
    for parameter in head.parameters():
        parameter.data.normal_(0.0, 0.2, generator=draw)
    features = torch.randn(1, 20, 6, heads.hidden_size, generator=draw)
    previous = torch.randint(heads.config.vocab_size, (1, 20, 6), generator=draw)
    slots, width = Slots(features, previous, BlockLayout.chain(7)), {"lm_head": heads.lm_head.weight.float().clone()}
    save_file({"features": features[0], "previous": previous[0], **width}, tmp_path / "given")
    names = {"mixing": "mix_l"} | {f"mlp.{part}_proj.weight": f"mlp_{part}.weight" for part in ("gate", "up", "down")}
    save_file({names.get(name, name): value for name, value in head.state_dict().items()}, tmp_path / "weights")
    theirs = of_peer("xpress", tmp_path / "weights", tmp_path)
    with torch.no_grad():
        ours = torch.cat([logits.dense() for logits in (head.logits(slots, heads), head.drafted(slots, heads))])
    assert theirs.shape == ours.shape and not torch.equal(ours[0], ours[1])
    print(f"speculators xpress: standard deviation {float(ours.std()):.2f}, {float((theirs - ours).abs().max()):.1e} apart")
    assert (theirs - ours).abs().max() < TOLERANCE


def test_the_generator_of_transformers_drafts_from_the_paths_as_its_layers(drafter_of, target):
    """Driven round by round, since transformers refuses DeepSeek-V4 as its target: the four paths stand for four layers."""
    generation = pytest.importorskip("transformers.generation.candidate_generator")
    if not hasattr(generation, "DFlashTokenCandidateGenerator"):
        pytest.skip("this transformers has no DFlashTokenCandidateGenerator")
    from transformers import GenerationConfig, MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    folder, drafter = drafter_of("fc", "dflash")
    config = json.loads((folder / "config.json").read_text())
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    weights = {names.get(name, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: config[name] for name in (*kept, "rms_norm_eps", "rope_parameters", "layer_types", "block_size")}
    assistant = MuseGlimmerAssistantModel(
        MuseGlimmerAssistantConfig(**sizes, **{k: config["dflash_config"][k] for k in ("mask_token_id", "target_layer_ids")})
    ).eval()
    assistant.load_state_dict(weights)
    heads, states = target.heads, random_states(drafter, target.heads)
    ids, paths = states.input_ids, states.residual  # [1, T], [1, T, M, D]
    generator = generation.DFlashTokenCandidateGenerator(
        assistant, heads.embed_tokens, heads.lm_head, GenerationConfig(max_length=100, do_sample=False)
    )
    generator.get_candidates(ids[:, :6], {}, None, is_first_iteration=True, n_last_matches=0)
    done, apart = 0, 0.0  # positions whose states the generator has read
    for anchor in (6, 9, 10, 15):  # the prompt's end, then rounds that keep two, no and four drafts
        layers = [None, *paths[:, done:].unbind(2)]  # hidden_states[i + 1] is layer i
        given = {"position_ids": torch.arange(anchor + 1)[None], "attention_mask": None}
        drafted, logits = generator.get_candidates(
            ids[:, : anchor + 1],
            given,
            SimpleNamespace(hidden_states=layers),
            is_first_iteration=False,
            n_last_matches=anchor - done - 1,
        )
        ours = own_logits(drafter, target, states, torch.tensor([anchor]))[0]
        apart, done = max(apart, float((logits[0] - ours).detach().abs().max())), anchor
        assert drafted[0, anchor + 1 :].tolist() == ours.argmax(dim=-1).tolist()
    print(f"transformers fc: at most {apart:.1e} apart")
    assert apart < TOLERANCE
