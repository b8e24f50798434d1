"""The rungs of pretraining's benchmark train the same model, and its table compares them."""

from __future__ import annotations

from itertools import pairwise

import torch

from benchmarks.pretraining import Trainer, blocks, ladder, largest_logit_difference
from tiny_target.pretraining import PretrainSettings


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 40, (int(n),), generator=generator) for n in torch.randint(5, 30, (60,), generator=generator)]


def test_rungs_without_compilation_make_a_step(tiny_sizes):
    settings = PretrainSettings(tokens=64, context=32, batch_rows=2)
    for rung in [rung for rung in ladder().values() if not rung.compile]:
        trainer = Trainer(rung, settings, documents(), tiny_sizes)
        before = trainer.model.lm_head.weight.clone()
        assert trainer.step() > 0
        assert not torch.equal(before, trainer.model.lm_head.weight)
        rows, tokens = trainer.batches[0]
        assert rows.numel() - 2 == tokens if rung.packed else tokens == int((rows != 0).sum()) < rows.numel()


def test_rungs_differ_by_one_option_each():
    rungs = list(ladder().values())
    for one, two in pairwise(rungs):
        assert len([name for name in vars(one) if getattr(one, name) != getattr(two, name)]) == 1


def test_the_model_is_the_same_by_our_functions(tiny_sizes):
    rows = torch.randint(0, 40, (2, 33), generator=torch.Generator().manual_seed(0))
    assert 0 < largest_logit_difference(rows, tiny_sizes) < 1e-4


def test_the_table_compares_round_by_round():
    rates = {"plain": [100.0, 200.0, 300.0], "fast": [200.0, 400.0, 1500.0]}
    table, note = blocks({"tokens_per_s": rates, "largest_logit_difference": 1e-6})
    assert table.rows[1] == ["fast", "400", "200 to 1,500", "2.00", "2.00"] and "1.0e-06" in note
