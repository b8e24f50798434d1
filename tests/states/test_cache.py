"""Cached states are the live ones, bit for bit, and nothing foreign or half-written is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyperdflash.contracts import Document
from hyperdflash.states.capture import capture
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.readers import CachedStates, LiveStates
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


def documents(count: int = 7) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = 9 + 5 * i
        ids = torch.randint(8, 320, (length,), generator=generator)
        made.append(Document(f"d{i}", "code", ids, torch.arange(length) >= 4))
    return made


def key(target, dtype="bf16") -> CacheKey:
    return CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype=dtype)


def test_cached_states_equal_live_ones(target, tmp_path):
    store = StateStore(tmp_path, key(target))
    shards = make_shards(documents(), 3)
    capture(shards, store, lambda: InProcess(target), layer_ids=(1, 2))
    data = CachedStates(store, shards, (1, 2))
    assert len(data) == 7
    row = 0
    for shard in shards:
        live = InProcess(target).states([d.input_ids for d in shard.documents], (1, 2))
        start = 0
        for document in shard.documents:
            states = data[row]
            end = start + len(document.input_ids)
            assert states.ids == (document.id,) and torch.equal(states.input_ids[0], document.input_ids)
            assert torch.equal(states.loss_mask[0], document.loss_mask)
            assert states.residual.dtype == torch.bfloat16
            assert torch.equal(states.residual[0], live[None][start:end].bfloat16())
            assert torch.equal(states.layers[0, :, 1], live[2][start:end].bfloat16())
            alone = plain_states(target, document)  # unpadded, by itself, transformers' own outputs
            torch.testing.assert_close(states.residual[0].float(), alone[-1], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(states.layers[0, :, 0].float(), alone[2], rtol=2e-2, atol=2e-2)
            start, row = end, row + 1


def plain_states(target, document):
    """transformers' hidden_states of one document, with the residual before hc_head in the place of the normed state."""
    kept = []
    hook = target.model.model.hc_head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        output = target.model(document.input_ids[None], output_hidden_states=True)
    hook.remove()
    return [*(state[0] for state in output.hidden_states[:-1]), kept[0][0]]


def test_full_cache_loads_no_target_and_a_new_tap_is_captured_alone(target, tmp_path):
    store = StateStore(tmp_path, key(target))
    loads = []

    def load():
        loads.append(1)
        return InProcess(target)

    first = make_shards(documents(), 3)
    capture(first, store, load)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.residual.safetensors")}
    again = make_shards(reversed_documents(), 3)
    capture(again, store, load)
    assert [shard.name for shard in again] == [shard.name for shard in first]
    assert len(loads) == 1
    capture(first, store, load, layer_ids=(3,))
    assert len(loads) == 2 and len(list(tmp_path.rglob("*.layer3.safetensors"))) == 3
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.residual.safetensors")}


def reversed_documents() -> list[Document]:
    return list(reversed(documents()))


@pytest.mark.parametrize("dtype", list(CODECS))
@pytest.mark.parametrize("tap", [None, 2])
def test_a_state_that_is_not_finite_reaches_no_cache(target, tmp_path, dtype, tap):
    class Damaged(InProcess):
        def states(self, sequences, layer_ids=()):
            found = super().states(sequences, layer_ids)
            start = sum(len(s) for s in sequences[:1])
            found[tap][start + 3, 1, 5] = float("nan") if dtype == "fp32" else float("inf")
            return found

    store, shards = StateStore(tmp_path, key(target, dtype)), make_shards(documents(), 3)
    where = "the last residual" if tap is None else "layer 2"
    for run in (
        lambda: capture(shards, store, lambda: Damaged(target), layer_ids=(1, 2)),
        lambda: LiveStates(store, shards, lambda: Damaged(target), (1, 2))[0],
    ):
        with pytest.raises(ValueError, match=rf"document {shards[0].documents[1].id} has NaN .*{where}, first at position 3"):
            run()
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_a_producer_of_another_target_is_refused(target, tmp_path):
    store = StateStore(tmp_path, replace(key(target), target="beef"))
    with pytest.raises(ValueError, match="fingerprint"):
        capture(make_shards(documents(), 16), store, lambda: InProcess(target))
