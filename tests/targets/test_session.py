"""A session's cache, taken back to any token, holds what a forward of the kept text alone would have left."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import DynamicCache

from hyperdflash.targets.deepseek_v4.compat import with_cache
from hyperdflash.targets.generate import generate_batch
from hyperdflash.targets.load import load_target
from hyperdflash.targets.session import TargetSession
from hyperdflash.targets.taps import tap_residual

BOUNDARIES = (4, 8, 12, 16, 32)  # compression every 4 and 8 tokens, a window of 16
LENGTHS = sorted({n + d for n in BOUNDARIES for d in (-1, 0, 1)})
DRAFTED, PROBE = 7, 8  # a probe of 8 tokens closes a window of either rate, so that it reads every buffer and overlap


@pytest.fixture(scope="module")
def model(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense").model


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def fresh(model, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, residual) of one forward of the whole text, without a cache."""
    with tap_residual(model) as taps, torch.inference_mode():
        return model(input_ids, use_cache=False).logits, taps.residual


def fork(session: TargetSession) -> TargetSession:
    """The same state once more, so that one forward serves every acceptance count."""
    twin = copy.copy(session)
    twin._cache = copy.deepcopy(session._cache)
    return twin


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to fp32 rounding: 1e-5 of the largest value."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("piece", [5, 16, 20])
def test_a_prompt_read_in_pieces_gives_the_states_of_the_whole(model, monkeypatch, piece):
    text, layer_ids = ids(2, 61, seed=7), (1, 3)
    with TargetSession(model, layer_ids) as session:
        whole, after = session.prefill(text), session.extend(ids(2, 9, seed=8))
    monkeypatch.setattr("hyperdflash.targets.session.PREFILL", piece)
    with TargetSession(model, layer_ids) as session:
        pieces, then = session.prefill(text), session.extend(ids(2, 9, seed=8))
    for got, wanted in ((pieces, whole), (then, after)):
        close(got.logits, wanted.logits)
        close(got.residual, wanted.residual)
        close(got.layers, wanted.layers)
    monkeypatch.setattr("hyperdflash.targets.generate.PREFILL", piece)
    first, later = (dict(generate_batch(model, text.tolist(), eos_id=1, max_new_tokens=4)) for _ in range(2))
    assert first == later == dict(enumerate(greedy(model, text, 4)))


def greedy(model, text: torch.Tensor, count: int) -> list[list[int]]:
    """The next tokens of each row by whole forwards."""
    for _ in range(count):
        text = torch.cat([text, fresh(model, text)[0][:, -1:].argmax(dim=-1)], dim=1)
    return text[:, -count:].tolist()


def test_a_damaged_layer_is_named_before_the_first_token(mini_target):
    model = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense").model
    model.model.layers[2].input_layernorm.weight.data[5] = float("nan")
    with TargetSession(model) as session, pytest.raises(ValueError, match=r"the prompt gives NaN .* layer 2"):
        session.prefill(ids(1, 20))
    with pytest.raises(ValueError, match=r"b/7 gives NaN .* layer 2"):
        list(generate_batch(model, ids(1, 20).tolist(), eos_id=1, max_new_tokens=4, names=["b/7"]))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_rollback_leaves_what_the_kept_text_leaves(model, length):
    """Every draft length and acceptance count, from a prompt that ends on, before and after each boundary."""
    text, probe = ids(1, length + DRAFTED, seed=length), ids(1, PROBE, seed=100)
    wanted = torch.full((DRAFTED + 1, length + DRAFTED + PROBE), 1)  # right padding is exact
    for keep, row in enumerate(wanted):
        kept = torch.cat([text[0, : length + keep], probe[0]])
        row[: len(kept)] = kept
    logits, residual = fresh(model, wanted)
    with TargetSession(model) as prompt:
        prompt.prefill(text[:, :length])
        for drafted in range(1, DRAFTED + 1):
            verified = fork(prompt)
            verified.extend(text[:, length : length + drafted])
            for keep in range(drafted + 1):
                session = fork(verified)
                session.rollback(keep)
                assert session.length == length + keep
                step = session.extend(probe)
                where = slice(length + keep, length + keep + PROBE)
                close(step.logits[0], logits[keep, where])
                close(step.residual[0], residual[keep, where])


def walk(session: TargetSession, rounds: int, seed: int = 0) -> tuple[torch.Tensor, list, list]:
    """Random drafts of random length, randomly accepted: the kept text, and its logits and residuals of each piece."""
    rng = random.Random(seed)
    texts, logits, residuals = [ids(2, 5, seed=seed)], [], []
    step = session.prefill(texts[0])
    logits.append(step.logits)
    residuals.append(step.residual)
    for index in range(rounds):
        drafted = rng.randint(1, 8)
        keep = rng.randint(0, drafted)
        draft = ids(2, drafted, seed=1000 + index)
        step = session.extend(draft)
        session.rollback(keep)
        texts.append(draft[:, :keep])
        logits.append(step.logits[:, :keep])
        residuals.append(step.residual[:, :keep])
    return torch.cat(texts, dim=1), logits, residuals


def test_two_hundred_rounds_do_not_drift(model):
    """Two rows; every kept token's logits and states are those of one forward of the text that came out."""
    with TargetSession(model) as session:
        text, logits, residuals = walk(session, rounds=200)
    assert text.shape[1] == session.length > 300
    wanted_logits, wanted_residual = fresh(model, text)
    close(torch.cat(logits, dim=1), wanted_logits[:, 4:])  # a prefill gives its last token's
    close(torch.cat(residuals, dim=1), wanted_residual)


class Reforward(TargetSession):
    """The definition of a rollback: the cache before the extend, then a forward of the kept tokens."""

    def rollback(self, keep: int) -> None:
        kept = self._extended[:, :keep]
        super().rollback(0)
        if keep:
            self._forward(kept)


def test_a_rollback_leaves_the_cache_of_a_forward_of_the_kept_tokens(model):
    with TargetSession(model) as analytic, Reforward(model) as reforward:
        one, two = walk(analytic, rounds=30)[0], walk(reforward, rounds=30)[0]
        assert torch.equal(one, two) and analytic.length == reforward.length
        for layer, other in zip(analytic._cache.layers, reforward._cache.layers, strict=True):
            torch.testing.assert_close(state(layer), state(other), rtol=0, atol=1e-5)


def state(layer) -> dict:
    """All that a cache layer holds, by name: tensors and counts, the recording left out."""
    return {name: value for name, value in vars(layer).items() if name not in ("tape", "dtype", "device")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_extending_is_plain_cached_decoding_bit_for_bit(mini_target, dtype):
    """Also around the window's end, where the mask that is made here changes its form."""
    model = load_target(path=mini_target, dtype=dtype, attention="windowed", experts="dense").model
    text, cache, start = ids(2, 40), DynamicCache(config=model.config), 11
    with TargetSession(model) as session, torch.inference_mode():
        session.prefill(text[:, :start])
        model(text[:, :start], **with_cache(cache))
        for num_new in (1, 2, 1, 1, 3, 8, 1, 8):
            new = text[:, start : start + num_new]
            step = session.extend(new)
            assert torch.equal(step.logits, model(new, **with_cache(cache)).logits.float())
            assert step.logits.dtype == torch.float32 and step.residual.dtype == model.dtype
            start += num_new


def test_a_step_has_the_layers_asked_for(model):
    text = ids(2, 20)
    with TargetSession(model, layer_ids=(3, 0)) as session, torch.inference_mode():
        first, step = session.prefill(text[:, :17]), session.extend(text[:, 17:])
        hidden = model(text, output_hidden_states=True).hidden_states
    assert first.logits.shape == (2, 1, 320) and first.layers.shape == (2, 17, 2, 4, 32)
    assert torch.equal(step.layers[:, :, 0], step.residual)  # layer 3 is the last one
    close(torch.cat([first.layers, step.layers], dim=1)[:, :, 1], hidden[1])
    with TargetSession(model) as plain:
        assert plain.prefill(text).layers is None


def test_a_rollback_runs_no_forward_and_copies_no_entry(model, monkeypatch):
    with TargetSession(model) as session:
        session.prefill(ids(1, 39))
        session.extend(ids(1, 7))  # closes two CSA windows and one HCA window
        entries = [(layer.compressed_kv, layer) for layer in session._cache.layers[2:]]
        entries = [(layer, name, kept) for held, layer in entries for name, kept in held.items()]
        monkeypatch.setattr(model, "forward", None)
        session.rollback(3)
    assert [layer.entry_count[name] for layer, name, _ in entries] == [10, 10, 5]
    for layer, name, before in entries:
        assert layer.compressed_kv[name].data_ptr() == before.data_ptr()
        assert layer.compressed_kv[name].shape[1] == layer.entry_count[name]


def test_no_hook_outlives_its_session(model):
    def hooks() -> int:
        return len(model.model.hc_head._forward_pre_hooks) + len(model.model.layers[1]._forward_hooks)

    before = hooks()  # transformers' own stay after an output_hidden_states
    with TargetSession(model, layer_ids=[1]) as session:
        assert hooks() == before + 2
    assert hooks() == before
    dropped = TargetSession(model, layer_ids=[1])
    assert hooks() == before + 2
    del dropped
    assert hooks() == before
    with pytest.raises(ValueError, match=r"closed.*new TargetSession"):
        session.prefill(ids(1, 3))


def test_transformers_caches_stay_its_own(model):
    modules = {type(layer).__module__.split(".")[0] for layer in DynamicCache(config=model.config).layers}
    assert modules == {"transformers"}


def test_calls_out_of_turn_say_what_to_do(model):
    with pytest.raises(ValueError, match=r"0\.\.3.*\[4\]"):
        TargetSession(model, layer_ids=[4])
    with TargetSession(model) as session:
        for empty in (ids(1, 0), ids(0, 3), ids(1, 3)[0]):
            with pytest.raises(ValueError, match="one token or more, got"):
                session.prefill(empty)
        with pytest.raises(ValueError, match="prefill it first"):
            session.extend(ids(1, 3))
        with pytest.raises(ValueError, match="extend first"):
            session.rollback(0)
        session.prefill(ids(1, 3))
        with pytest.raises(ValueError, match="extend first"):
            session.rollback(1)
        with pytest.raises(ValueError, match="holds 3 tokens"):
            session.prefill(ids(1, 3))
        with pytest.raises(ValueError, match="one token or more, got"):
            session.extend(ids(1, 0))
        with pytest.raises(ValueError, match="1 rows of the prefill, got 2"):
            session.extend(ids(2, 3))
        session.extend(ids(1, 3))
        for keep in (-1, 4):
            with pytest.raises(ValueError, match=rf"0\.\.3.*got {keep}"):
                session.rollback(keep)
        session.rollback(3)  # what was refused has changed nothing
        assert session.length == 6
        with pytest.raises(ValueError, match="extend first"):
            session.rollback(3)
