"""A target in two placements, its head elsewhere than its embedding, gives the states and the text of one that is whole."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.targets.deepseek_v4.adapter import checked_device_map, even_device_map
from hyperdflash.targets.deepseek_v4.compat import input_device
from hyperdflash.targets.generate import generate_batch
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, forward_batches
from hyperdflash.targets.session import TargetSession

OPTIONS = {"dtype": "fp32", "attention": "windowed", "experts": "dense"}
# memory for one half, weights that are only brought in for a forward for the other: accelerate's own dispatch, as with GPUs
HEAD_AWAY = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.hc_head": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}
EMBEDDING_AWAY = HEAD_AWAY | {"model.embed_tokens": "disk", "model.hc_head": "cpu", "model.norm": "cpu"}


def ids(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 320, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def whole(mini_target):
    return load_target(path=mini_target, **OPTIONS)


@pytest.fixture(scope="module", params=[HEAD_AWAY, EMBEDDING_AWAY], ids=["head", "embedding"])
def spread(request, mini_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    target = load_target(path=mini_target, **OPTIONS, device_map=request.param, offload_folder=folder)
    away = {name for name, p in target.model.named_parameters() if p.device.type == "meta"}
    assert any("layers.3" in name for name in away) and not any("layers.2" in name for name in away)
    assert ("model.hc_head.hc_fn" in away) != ("model.embed_tokens.weight" in away)
    return target


def test_states_and_fingerprint_are_those_of_the_whole(whole, spread):
    sequences = ids(40, 23)
    one, two = (InProcess(target).states(sequences, layer_ids=[1, 2]) for target in (whole, spread))
    assert all(torch.equal(one[tap], two[tap]) for tap in (None, 1, 2))
    assert spread.fingerprint == whole.fingerprint
    assert input_device(spread.model).type == "cpu"


def test_heads_work_apart_from_the_model(whole, spread):
    residual = torch.randn(1, 5, 4, 32, generator=torch.Generator().manual_seed(1))
    one, two = (target.heads.logits(target.heads.collapse(residual)) for target in (whole, spread))
    assert torch.equal(one, two)


def test_decoding_works(whole, spread):
    texts = [dict(generate_batch(t.model, [[9, 10, 11], [12] * 5], eos_id=1, max_new_tokens=2)) for t in (whole, spread)]
    assert texts[0] == texts[1]
    steps = []
    for target in (whole, spread):
        with TargetSession(target.model) as session:
            session.prefill(ids(18)[0][None])
            session.extend(ids(4)[0][None])
            session.rollback(2)
            steps.append(session.extend(ids(3)[0][None]))
    assert torch.equal(steps[0].logits, steps[1].logits) and torch.equal(steps[0].residual, steps[1].residual)


@pytest.mark.parametrize("device_map", ["auto", "even"])
def test_one_device_for_all_is_the_plain_model(whole, mini_target, device_map):
    target = load_target(path=mini_target, **OPTIONS, device_map=device_map)
    assert {p.device.type for p in target.model.parameters()} == {"cpu" if not torch.cuda.is_available() else "cuda"}
    assert target.fingerprint == whole.fingerprint


def test_even_runs_of_layers():
    placed = even_device_map(43, 8)
    runs = [[i for i in range(43) if placed[f"model.layers.{i}"] == gpu] for gpu in range(8)]
    assert [len(run) for run in runs] == [5, 6, 6, 6, 5, 5, 5, 5] and [i for run in runs for i in run] == list(range(43))
    assert (placed["model.embed_tokens"], placed["model.hc_head"], placed["lm_head"]) == (0, 7, 7)
    assert even_device_map(43, 0) == {"": "cpu"} and even_device_map(43, 1) == {"": 0}
    assert [even_device_map(5, 2)[f"model.layers.{i}"] for i in range(5)] == [0, 0, 0, 1, 1]


def test_a_training_rank_does_not_spread_a_target(mini_target, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"device_map=auto .* one of 2 training ranks.*run `python -m src\.capture") as caught:
        load_target(path=mini_target, **OPTIONS, device_map="auto")
    assert "\n" not in str(caught.value)
    assert checked_device_map(None, 4) is None  # a target that fits a rank may live in it
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert checked_device_map("auto", 4) == "auto"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="one of 4 training ranks"):
        checked_device_map("auto", 4)


def test_a_capture_is_cut_into_forwards(whole, mini_target):
    sequences = ids(16, 20, 40, 9, 33)  # padded to whole windows of 16
    cut = [[len(s) for s in batch] for batch in forward_batches(sequences, 16, 64)]
    assert cut == [[16, 20], [40], [9], [33]] and len(list(forward_batches(sequences, 16, None))) == 1
    limited = load_target(path=mini_target, **OPTIONS, tokens_per_forward=64)
    one, two = (InProcess(target).states(sequences, [1]) for target in (whole, limited))
    assert all(one[tap].shape == two[tap].shape == (118, 4, 32) for tap in (None, 1))
    torch.testing.assert_close(one[None], two[None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[1], two[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"target\.tokens_per_forward must be a positive integer"):
        load_target(path=mini_target, **OPTIONS, tokens_per_forward=0)


def test_a_misspelt_setting_is_refused(mini_target):
    with pytest.raises(ValueError, match=r"target\.devicemap is no setting of a target"):
        load_target(path=mini_target, **OPTIONS, devicemap="auto")


def test_what_does_not_fit_is_one_sentence(mini_target, tmp_path):
    with pytest.raises(ValueError, match="does not fit these devices") as caught:
        load_target(path=mini_target, **OPTIONS, device_map=HEAD_AWAY)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"offload_folder wants target\.dtype=fp32, got bf16"):
        load_target(path=mini_target, **(OPTIONS | {"dtype": "bf16"}), device_map=HEAD_AWAY, offload_folder=tmp_path)
