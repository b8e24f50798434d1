import pytest
import torch

from hyperdflash.drafting.anchors import BlockSampler, all_anchors, coverage, make_blocks, sample_anchors
from hyperdflash.drafting.attention import context_mask


def rows(*patterns: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ "..xx--": prompt, supervised, padding -> loss_mask [B, T], lengths [B]. Padding is marked supervised on purpose."""
    loss_mask = torch.tensor([[c != "." for c in p] for p in patterns])
    return loss_mask, torch.tensor([len(p.rstrip("-")) for p in patterns])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_anchors_by_hand():
    loss_mask, lengths = rows("..xxx.xx", "....xx--", ".x.x.x--", "........")
    anchors, mask = all_anchors(loss_mask, lengths)
    # Row 0: 2 and 3 (4 is followed by a prompt token), 6 (7 is the last token). Row 1: 4. Rows 2, 3: no pair.
    assert anchors.tolist() == [[2, 3, 6], [4, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3, [False] * 3]


def test_sampled_anchors_are_all_if_there_are_fewer():
    loss_mask, lengths = rows("..xxx.xx", "....xx--")
    anchors, mask = sample_anchors(loss_mask, lengths, 4, generator())
    assert anchors.tolist() == [[2, 3, 6, 0], [4, 0, 0, 0]]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    anchors, mask = sample_anchors(loss_mask, lengths, 512, generator())
    assert anchors.shape == (2, 8) and mask.sum() == 4


def test_sampled_anchors_are_a_sorted_subset_without_repetition():
    draw = generator(1)
    for trial in range(200):
        torch.manual_seed(trial)
        loss_mask = torch.rand(3, 20) < 0.7
        lengths = torch.randint(1, 21, (3,))
        every, every_mask = all_anchors(loss_mask, lengths)
        anchors, mask = sample_anchors(loss_mask, lengths, 5, draw)
        for row in range(3):
            eligible = set(every[row][every_mask[row]].tolist())
            chosen = anchors[row][mask[row]].tolist()
            assert chosen == sorted(set(chosen)) and set(chosen) <= eligible
            assert len(chosen) == min(5, len(eligible))
            assert not anchors[row][~mask[row]].any()


def test_sampling_is_uniform_and_follows_its_generator():
    loss_mask, lengths = rows(".xxxxxx")  # five eligible positions
    draw, hits = generator(2), torch.zeros(7)
    for _ in range(2000):
        anchors, _ = sample_anchors(loss_mask, lengths, 2, draw)
        hits[anchors[0]] += 1
    assert hits[[0, 6]].sum() == 0
    assert (hits[1:6] / 2000 - 2 / 5).abs().max() < 0.05  # 4.5 standard deviations
    long = torch.ones(2, 100, dtype=torch.bool), torch.tensor([100, 60])
    assert torch.equal(sample_anchors(*long, 9, generator(3))[0], sample_anchors(*long, 9, generator(3))[0])
    state = torch.get_rng_state()
    sample_anchors(*long, 9, generator(3))
    assert torch.equal(state, torch.get_rng_state())


def test_labels_by_hand():
    loss_mask, lengths = rows(".xxxx.xx", ".xxx----")
    ids = torch.arange(10, 26).view(2, 8)
    anchors, mask = torch.tensor([[1, 6], [2, 0]]), torch.tensor([[True, True], [True, False]])
    blocks = make_blocks(ids, loss_mask, lengths, anchors, mask, block_size=5)
    # Row 0, anchor 1: x2 x3 x4, then the prompt token x5. Anchor 6: x7, then past the end. Row 1, anchor 2: x3 only.
    assert blocks.labels.tolist() == [[[12, 13, 14, 0], [17, 0, 0, 0]], [[21, 0, 0, 0], [0, 0, 0, 0]]]
    assert blocks.label_mask.int().tolist() == [[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]


def test_end_token_is_a_label_of_every_slot():
    loss_mask, lengths = rows("..xxxxxxxxx--")
    ids = torch.arange(13)[None]
    blocks = make_blocks(ids, loss_mask, lengths, *all_anchors(loss_mask, lengths), block_size=7)
    slots = ((blocks.labels == 10) & blocks.label_mask).any(dim=1)
    assert slots.tolist() == [[True] * 6]


def test_coverage_by_hand():
    loss_mask, lengths = rows(".xxxxxxxxx", ".x.x.x----")
    ids = torch.zeros(2, 10, dtype=torch.int64)

    def covered(anchors, mask, block_size):
        blocks = make_blocks(ids, loss_mask, lengths, torch.tensor(anchors), torch.tensor(mask), block_size)
        return tuple(int(x) for x in coverage(blocks, loss_mask, lengths))

    # Row 0 has 9 supervised tokens, of which the first can be no label; row 1 has no pair at all.
    assert covered([[1, 2], [0, 0]], [[True, True], [False, False]], 4) == (4, 8)  # 2..4 and 3..5
    assert covered([[7, 0], [0, 0]], [[True, False], [False, False]], 4) == (2, 8)  # 8, 9
    assert covered([[0, 0], [0, 0]], [[False, False], [False, False]], 4) == (0, 8)
    for block_size in (2, 4, 7):
        blocks = make_blocks(ids, loss_mask, lengths, *all_anchors(loss_mask, lengths), block_size)
        assert [int(x) for x in coverage(blocks, loss_mask, lengths)] == [8, 8]


def test_documents_without_a_pair_are_well_defined():
    loss_mask, lengths = rows("....", ".x..")
    for anchors, mask in (all_anchors(loss_mask, lengths), sample_anchors(loss_mask, lengths, 3, generator())):
        blocks = make_blocks(torch.ones(2, 4, dtype=torch.int64), loss_mask, lengths, anchors, mask, 7)
        assert not mask.any() and not blocks.label_mask.any()
        assert [int(x) for x in coverage(blocks, loss_mask, lengths)] == [0, 0]


def test_sampler_and_its_error():
    loss_mask, lengths = rows(".xxxx")
    blocks = BlockSampler(num_anchors=2).sample(torch.arange(5)[None], loss_mask, lengths, 3, generator())
    assert blocks.labels.shape == (1, 2, 2)
    for wrong in (0, -1, 2.5, True, "8"):
        with pytest.raises(ValueError, match=r"blocks\.num_anchors must be a positive integer, got"):
            BlockSampler(num_anchors=wrong)


def test_context_mask_is_strictly_before_the_anchor():
    mask = context_mask(torch.tensor([[2, 0]]), torch.arange(4))
    assert mask.int().tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]]]
    shifted = context_mask(torch.tensor([[7]]), torch.tensor([[5, 6, 7, 8]]))
    assert shifted.int().tolist() == [[[1, 1, 0, 0]]]


def test_a_window_shows_only_the_newest_states():
    anchors, positions = torch.tensor([[4, 1, 0]]), torch.arange(6)
    mask = context_mask(anchors, positions, window=2)
    assert mask.int().tolist() == [[[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]]
    assert torch.equal(context_mask(anchors, positions, window=4), context_mask(anchors, positions))
