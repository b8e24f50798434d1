"""The draft classes for engines reduce and draft as this project's drafter does; stubs stand for the engines' classes."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import hyperdflash
from hyperdflash.contracts import BlockLayout, Slots
from hyperdflash.drafting.heads.correction import Correction
from hyperdflash.drafting.heads.markov import Markov
from hyperdflash.targets.sampling import Sampler
from tests.proposed_block import propose

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
NUM_SLOTS = 4
HEADS = {
    "vanilla": Markov(rank=5, confidence=True),
    "gated": Markov(rank=5, kind="gated"),
    "rnn": Markov(rank=5, kind="rnn"),
    "correction": Correction(),
}


@pytest.fixture
def plugin(monkeypatch):
    """plugin(folder, module) imports a plug-in's module afresh."""

    def load(folder: str, module: str):
        monkeypatch.syspath_prepend(str(PLUGINS / folder))
        for name in list(sys.modules):
            if name.startswith("hyperdflash_"):
                monkeypatch.delitem(sys.modules, name)
        return import_module(module)

    return load


@pytest.fixture
def stub(monkeypatch):
    """stub(name, **attributes) puts a module with them, and its parents, in the place of the engine's."""

    def put(name: str, **attributes) -> None:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                if count > 1:
                    monkeypatch.setattr(
                        sys.modules[".".join(parts[: count - 1])], parts[count - 1], sys.modules[path], raising=False
                    )
        for attribute, value in attributes.items():
            monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)

    return put


def config_of(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def load(module: torch.nn.Module, folder: Path, place: str = "{}") -> None:
    """Gives the export's tensors to those parameters that a stub has; none of the plug-in's own may stay without."""
    weights = {place.format(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    own = module.state_dict()
    assert {name for name in own if "reducer." in name or ("head." in name and "lm_head" not in name)} <= weights.keys()
    module.load_state_dict({name: weights.get(name, value) for name, value in own.items()})


@torch.no_grad()
def own_drafts(head, states: torch.Tensor, anchor_id: torch.Tensor, heads) -> list[int]:
    """[K, D] states of one block -> its drafts by the loop."""
    slots = Slots(states[None, None], torch.zeros(1, 1, NUM_SLOTS, dtype=torch.long), BlockLayout.chain(NUM_SLOTS + 1))
    return propose(head, slots, heads, anchor_id, Sampler()).ids.tolist()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_drafts_slot_by_slot_as_in_the_loop(name, plugin, target):
    heads, draw = target.heads, torch.Generator().manual_seed(2)
    own = HEADS[name].build(heads, 4)
    for parameter in own.parameters():
        parameter.data.normal_(0.0, 0.7, generator=draw)
    described = {"option": "correction" if name == "correction" else "markov", **vars(HEADS[name])}
    module = plugin("vllm", "hyperdflash_heads")
    head = module.build_head(described, heads.hidden_size, heads.config.vocab_size)
    head.load_state_dict(own.state_dict())
    states, anchors = torch.randn(3, NUM_SLOTS, heads.hidden_size, generator=draw), torch.tensor([9, 70, 33])
    logits = module.chained_logits(head, states, anchors, heads.logits, heads.embed)
    assert logits.shape == (3, NUM_SLOTS, heads.config.vocab_size)
    for row in range(3):
        assert logits[row].argmax(-1).tolist() == own_drafts(own, states[row], anchors[row : row + 1], heads)
    assert module.build_head({"option": "lm_head"}, 8, 16) is None
    with pytest.raises(ValueError, match=r"head=tree .*correction, markov"):
        module.build_head({"option": "tree"}, 8, 16)


@pytest.mark.parametrize("method", ["hyperdflash", "gate_markov", "fc"])
def test_vllms_draft_class_gives_our_context_and_our_drafts(method, exported, plugin, stub, target):
    folder, heads = exported(method, "dflash"), target.heads
    config = config_of(folder)

    class Base(torch.nn.Module):  # what vLLM's classes have of what the plug-in touches
        def __init__(self, *, vllm_config, prefix="", start_layer_id=0):
            super().__init__()
            self.config = config
            if start_layer_id:
                self.fc = torch.nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)
            else:
                self.model = self.model_cls(vllm_config=vllm_config, start_layer_id=4)

        def embed_input_ids(self, ids):
            return heads.embed(ids)

        def combine_hidden_states(self, states):
            return self.model.fc(states)

        def forward(self, input_ids, positions, inputs_embeds):
            return positions

        def compute_logits(self, states):
            return heads.logits(states)

    stub("vllm.model_executor.models.qwen3_dflash", DFlashQwen3ForCausalLM=Base, DFlashQwen3Model=Base)
    settings = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=NUM_SLOTS))
    model = plugin("vllm", "hyperdflash_vllm_draft").HyperDFlashForCausalLM(vllm_config=settings)
    load(model, folder, "model.{}")
    assert hasattr(model.model, "fc") == (method == "fc")
    drafter = hyperdflash.load_drafter(folder, target).drafter
    draw = torch.Generator().manual_seed(4)
    residual, states = torch.randn(7, 4, 32, generator=draw), torch.randn(2, NUM_SLOTS, 32, generator=draw)
    anchors, mask = torch.tensor([11, 12]), config.dflash_config["mask_token_id"]
    with torch.no_grad():
        torch.testing.assert_close(model.combine_hidden_states(residual.flatten(1)), drafter.reducer(residual[None])[0])
        queries = torch.tensor([[anchor, *[mask] * NUM_SLOTS] for anchor in anchors]).flatten()
        model(torch.cat([queries, torch.zeros(3, dtype=torch.long)]), torch.arange(10), None)  # padded to a graph's size
        found = model.compute_logits(states.flatten(0, 1)).argmax(-1).view(2, NUM_SLOTS)
        for row in range(2):
            assert found[row].tolist() == own_drafts(drafter.head, states[row], anchors[row : row + 1], heads)


def test_sglangs_draft_class_gives_our_context_and_refuses_what_it_cannot_serve(exported, plugin, stub, target):
    class Base(torch.nn.Module):  # what SGLang's class has of what the package touches
        def __init__(self, *, config, quant_config, prefix):
            super().__init__()
            self.fc, self.hidden_norm = torch.nn.Linear(4, 4), torch.nn.Identity()

        def load_weights(self, weights):
            self.given = dict(weights)

    stub("sglang.srt.models.dflash", DFlashDraftModel=Base)
    module, folder = plugin("sglang", "hyperdflash_sglang.draft"), exported("hyperdflash", "dflash")
    assert module.EntryClass.__name__ == config_of(folder).architectures[0]  # by which SGLang finds it
    model = module.EntryClass(config=config_of(folder))
    load(model, folder)
    residual = torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(4))
    reducer = hyperdflash.load_drafter(folder, target).drafter.reducer
    with torch.no_grad():
        torch.testing.assert_close(model.project_target_hidden(residual.flatten(1)), reducer(residual[None])[0])
    with pytest.raises(ValueError, match="gives 32 numbers per token, wanted 128"):
        model.project_target_hidden(residual[:, 0])
    weights = load_file(folder / "model.safetensors")
    model.load_weights(iter(weights.items()))
    assert model.given.keys() == weights.keys()
    del weights["reducer.hc_fn"]
    with pytest.raises(ValueError, match=r"lacks reducer\.hc_fn"):
        model.load_weights(weights.items())
    with pytest.raises(ValueError, match="head=markov: serve it in vLLM"):
        module.EntryClass(config=config_of(exported("gate_markov", "dflash")))


def test_sglangs_target_class_gives_the_residual_as_auxiliary_states(plugin, stub):
    hidden, residual = torch.randn(3, 2), torch.randn(3, 8)

    class Base:
        pp_group, config = SimpleNamespace(is_last_rank=True), SimpleNamespace(hc_mult=4)

        def __init__(self):
            self.model = SimpleNamespace(forward=lambda rows: (hidden, residual), late_layer_start=None)
            self.capture_aux_hidden_states = False

    stub("sglang.srt.models.deepseek_v4", DeepseekV4ForCausalLM=Base)
    module = plugin("sglang", "hyperdflash_sglang.target")
    assert module.EntryClass.__name__ == "DeepseekV4ForCausalLM"
    model = module.EntryClass()
    with pytest.raises(ValueError, match="3 layers, and the residual 4"):
        model.set_dflash_layers_to_capture([0, 1, 2])
    assert model.model.forward(3) == (hidden, residual) and not model.capture_aux_hidden_states
    for _ in range(2):  # a second call changes nothing
        model.set_dflash_layers_to_capture([0, 1, 2, 3])
        assert model.model.forward(3) == ((hidden, residual), residual) and model.capture_aux_hidden_states
    late = module.EntryClass()
    late.model.late_layer_start = 3
    with pytest.raises(ValueError, match="late layers"):
        late.set_dflash_layers_to_capture([0, 1, 2, 3])
