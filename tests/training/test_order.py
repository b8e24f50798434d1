"""The training order: every document once an epoch, a function of the step, cut evenly."""

from __future__ import annotations

import pytest

from hyperdflash.training.epoch_plan import TrainingOrder, part

SHARDS = [[10 + s + d for d in range(4)] for s in range(40)] + [[90, 91, 92]]  # 163 documents, the last shard short


def order(batch_size: int = 6, **kwargs) -> TrainingOrder:
    return TrainingOrder(SHARDS, batch_size=batch_size, epochs=3, **{"seed": 0, **kwargs})


@pytest.mark.parametrize("batch_size", [1, 6, 64, 1000])
def test_every_document_comes_once_per_epoch_in_batches_whose_sizes_differ_by_one(batch_size):
    made = order(batch_size)
    for epoch in range(3):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        batches = [made.batch(step) for step in steps]
        assert sorted(d for batch in batches for d in batch) == list(range(163))
        assert all(made.epoch_of(step) == epoch for step in steps)
        assert max(map(len, batches)) <= batch_size
        assert all(batch == sorted(batch, key=made.lengths.__getitem__) for batch in batches)
    assert len(made) == 3 * made.steps_per_epoch


def test_a_step_is_a_function_of_seed_and_step():
    steps = [0, 40, 7, 83, 28]  # any order: nothing is carried from step to step
    made = order()
    assert [made.batch(s) for s in steps] == [order().batch(s) for s in steps]
    epochs = [made.batch(s) for s in range(len(made))]
    assert epochs[: made.steps_per_epoch] != epochs[made.steps_per_epoch : 2 * made.steps_per_epoch]
    assert order(seed=1).batch(0) != made.batch(0)


def test_shards_are_announced_before_they_are_read_window_by_window():
    made = order()
    shard_of = [s for s, lengths in enumerate(SHARDS) for _ in lengths]
    told: list[int] = []
    for step in range(len(made)):
        if made.opens_window(step):
            told = made.shards_from(step)
        assert {shard_of[d] for d in made.batch(step)} <= set(told[: made.window])
    assert sum(made.opens_window(step) for step in range(made.steps_per_epoch)) == 3
    assert len(made.shards_from(0)) == 2 * 41 and len(made.shards_from(len(made) - 1)) <= 16


def test_max_steps_ends_the_order_and_lies_within_the_epochs():
    made, whole = order(max_steps=30), order()
    assert len(made) == 30 and made.batch(29) == whole.batch(29)
    assert len(made.shards_from(0)) == 2 * 41
    assert len(order(max_steps=whole.steps_per_epoch).shards_from(0)) == 41  # nothing of an epoch that is not trained
    with pytest.raises(
        ValueError, match=rf"max_steps={len(whole) + 1} lies behind the {len(whole)} steps of trainer\.max_epochs=3"
    ):
        order(max_steps=len(whole) + 1)


def test_parts_are_equal_to_one():
    for count in (1, 3, 8):
        parts = [part(list(range(7)), i, count) for i in range(count)]
        assert [x for p in parts for x in p] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
