"""Pretraining learns, stops and goes on where it stopped, and knows what its checkpoint was made from."""

from __future__ import annotations

import math

import pytest
import torch

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.targets.load import load_target
from tiny_target import pretrain_job
from tiny_target.build import build_target, tiny_config
from tiny_target.pretraining import (
    LONGEST_LOOP,
    LONGEST_PERIOD,
    PretrainSettings,
    joint_loss,
    pack,
    plant_loops,
    pretrain,
    train_step,
)


def settings(steps: int, **more) -> PretrainSettings:
    return PretrainSettings(**{"tokens": steps * 64, "context": 32, "batch_rows": 2, "bf16": False, "compile": False, **more})


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(8, 20, (40,), generator=generator)
    return [torch.arange(int(s), int(s) + 12) for s in start]  # counting upwards


def test_rows_overlap_by_one_and_every_epoch_has_another_order():
    texts = documents()
    rows = pack(texts, 32, seed=0, epoch=0)
    assert rows.shape == (14, 33) and torch.equal(rows[0, -1], rows[1, 0])
    assert not torch.equal(rows, pack(texts, 32, seed=0, epoch=1))
    assert torch.equal(rows, pack(texts, 32, seed=0, epoch=0))
    with pytest.raises(ValueError, match="fewer than one row"):
        pack(texts[:1], 32, seed=0, epoch=0)


def test_a_planted_loop_repeats_a_span_and_the_text_goes_on():
    text = torch.arange(400).repeat(50, 1)
    rows, copies = plant_loops(text, 1.0, torch.tensor([]), torch.Generator().manual_seed(0))
    again, _ = plant_loops(text, 1.0, torch.tensor([]), torch.Generator().manual_seed(0))
    assert rows.shape == text.shape and torch.equal(rows, again)
    periods = set()
    for row, copy in zip(rows, copies, strict=True):
        assert torch.equal(row[copy == 0], torch.arange(int((copy == 0).sum())))  # without the repeats it is the text
        planted = copy.nonzero()[:, 0]
        start, added = int(planted[0]), len(planted)
        assert added <= LONGEST_LOOP
        if start + added == 400:  # cut at the row's end
            continue
        period = int((copy == 1).sum())
        periods.add(period)
        assert torch.equal(row[start : start + added], row[start - period : start + added - period])
        assert 2 * period <= added and period <= LONGEST_PERIOD
        assert copy[start : start + added].tolist() == [1 + i // period for i in range(added)]
    assert min(periods) == 1 and len(periods) > 8
    rows, copies = plant_loops(text, 1.0, torch.arange(400), torch.Generator().manual_seed(0))
    assert torch.equal(rows, text) and not copies.any()
    _, copies = plant_loops(text.repeat(10, 1), 0.3, torch.tensor([]), torch.Generator().manual_seed(0))
    assert 100 < int(copies.any(dim=1).sum()) < 200  # of 500


def test_repeats_are_trained_down_and_count_nowhere_else(tiny_sizes):
    model, mtp = build_target(tiny_config(**tiny_sizes))
    rows = torch.randint(0, 40, (1, 33), generator=torch.Generator().manual_seed(3))
    copies = torch.zeros_like(rows)
    copies[0, 10:14], copies[0, 14:18] = 1, 2
    logits = model(rows[:, :-1]).logits.log_softmax(-1)
    log_p = logits[0, torch.arange(32), rows[0, 1:]]
    kept = torch.ones(32, dtype=torch.bool)
    kept[9:17] = False
    expected = (-log_p[kept].sum() - torch.log1p(-log_p[13:17].exp()).sum()) / 32
    main, drafted = joint_loss(model, mtp, rows, copies)
    assert torch.allclose(main, expected, atol=1e-5)
    plain, plain_drafted = joint_loss(model, mtp, rows, torch.zeros_like(rows))
    assert torch.allclose(torch.stack(joint_loss(model, mtp, rows)), torch.stack([plain, plain_drafted]))
    assert not torch.allclose(drafted, plain_drafted)


def test_the_schedule_rises_holds_and_falls_to_zero():
    s = settings(100, warmup_share=0.1, decay_share=0.5, lr=1.0)
    assert s.lr_at(0) == pytest.approx(0.1) and s.lr_at(9) == s.lr_at(40) == 1.0
    assert s.lr_at(74) == pytest.approx(0.5) and s.lr_at(99) < 1e-6


def test_it_learns_both_heads_and_moves_the_router_biases(tmp_path, tiny_sizes):
    model, mtp = build_target(tiny_config(**tiny_sizes))
    records = []
    last = pretrain(model, mtp, documents(), settings(40, router_bias_every=5), tmp_path / "c.pt", "id", (), records.append)
    assert records[0]["step"] == 20 and last["step"] == 40
    assert last["loss"] < 2.6 and last["mtp_loss"] < 3.2  # ln 40 = 3.69
    assert model.model.layers[3].mlp.gate.e_score_correction_bias.abs().sum() > 0


def test_a_stopped_run_ends_like_an_undisturbed_one(tmp_path, tiny_sizes):
    whole = build_target(tiny_config(**tiny_sizes))
    pretrain(*whole, documents(), settings(12), tmp_path / "whole.pt", "id", ())

    class Stop(Exception):
        pass

    broken = build_target(tiny_config(**tiny_sizes))
    every = settings(12, checkpoint_every_s=0.0)
    step = type(every).lr_at

    def stop_at_seven(self, index):
        if index == 7:
            raise Stop
        return step(self, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(PretrainSettings, "lr_at", stop_at_seven)
        pretrain(*broken, documents(), every, tmp_path / "broken.pt", "id", ())
    again = build_target(tiny_config(**tiny_sizes), seed=5)
    pretrain(*again, documents(), every, tmp_path / "broken.pt", "id", ())
    for one, two in zip(whole, again, strict=True):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_step_clips_and_leaves_the_weights_where_the_gradient_is_not_finite(tiny_sizes):
    model, mtp = build_target(tiny_config(**tiny_sizes))
    rows = torch.randint(0, 40, (2, 33), generator=torch.Generator().manual_seed(0))
    clipped = []

    class Optimizer(torch.optim.SGD):
        def step(self):
            clipped.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]))
            super().step()

    optimizer = Optimizer([*model.parameters(), *mtp.parameters()], lr=0.1)
    settings_ = settings(1, clip=0.25)
    main, drafted, norm = train_step(model, mtp, optimizer, rows, torch.zeros_like(rows), settings_)
    assert main > 0 and drafted > 0 and norm > 0.25
    assert float(clipped[0].norm()) == pytest.approx(0.25, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = model.model.norm.weight.clone()
    assert not math.isfinite(train_step(model, mtp, optimizer, rows, torch.zeros_like(rows), settings_)[2])
    assert torch.equal(model.model.norm.weight, before) and len(clipped) == 1


def test_a_gradient_that_is_not_finite_ends_the_run(tiny_sizes, tmp_path):
    model, mtp = build_target(tiny_config(**tiny_sizes))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gradient norm is nan at step 0: lower lr \(now 0.003\) and run again"):
        pretrain(model, mtp, documents(), settings(2), tmp_path / "c.pt", "id", ())


def test_a_checkpoint_of_something_else_is_refused(tmp_path, tiny_sizes):
    model, mtp = build_target(tiny_config(**tiny_sizes))
    pretrain(model, mtp, documents(), settings(2), tmp_path / "c.pt", "id", ())
    with pytest.raises(ValueError, match="another settings"):
        pretrain(model, mtp, documents(), settings(3), tmp_path / "c.pt", "id", ())
    with pytest.raises(ValueError, match="another corpus, tokenizer or model"):
        pretrain(model, mtp, documents(), settings(2), tmp_path / "c.pt", "other", ())


@pytest.mark.parametrize("recipe", ["tiny", "engine"])
def test_the_command_writes_a_target_of_its_recipe(recipe, compose_config, tmp_path, monkeypatch):
    said = [Turn("user", "Count."), Turn("assistant", "one two three four five six seven")]
    monkeypatch.setattr(pretrain_job, "load_embedded", lambda *_, **__: [Conversation("a", "chat", said)] * 8)
    small = ["tokens=64", "context=32", "batch_rows=2", "bf16=false", "compile=false"]
    words = [f"recipe={recipe}", "recipe.vocab_size=280", *(f"settings.{word}" for word in small)]
    config = compose_config("pretrain", words)
    pretrain_job.pretrain_target(config)
    made = load_target(path=tmp_path / "targets" / recipe, dtype="fp32", attention="eager", experts="dense").model.config
    assert made.vocab_size == 280
    for name in {"head_dim", "n_routed_experts", "layer_types"} & set(config.recipe.model):
        assert getattr(made, name) == config.recipe.model[name]
