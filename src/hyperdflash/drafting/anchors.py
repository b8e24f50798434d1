"""Selects the positions of a document that become draft blocks, and the label of each slot.

Steps and shapes (legend: contracts.py)
    1. eligible_anchors   [B, T]     positions whose token and successor are both supervised
    2. sample_anchors     [B, A]     a random subset per document (training); all_anchors: every one (replay)
    3. make_blocks        [B, A, S]  labels of slots 1..S = block_size - 1

A block may reach past the document: its late slots are masked, the block stays. If blocks had to be whole, the end token would
never be the label of an early slot.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.contracts import BlockLayout, Blocks
from hyperdflash.settings import one_of, positive_int


@dataclass(frozen=True, kw_only=True)
class BlockSampler:
    """Draws the blocks of a training step, at most ``num_anchors`` per document. With ``layout`` full a slot sees its whole
    block (DFlash), with causal itself and earlier positions (JetSpec)."""

    num_anchors: int
    layout: str = "full"

    def __post_init__(self):
        positive_int("blocks.num_anchors", self.num_anchors)
        one_of("blocks.layout", self.layout, ("full", "causal"))

    def sample(
        self, input_ids: Tensor, loss_mask: Tensor, lengths: Tensor, block_size: int, generator: torch.Generator
    ) -> Blocks:
        """[B, T] ids and mask, [B] lengths -> Blocks with A = min(num_anchors, T)."""
        anchors, anchor_mask = sample_anchors(loss_mask, lengths, self.num_anchors, generator)
        return make_blocks(input_ids, loss_mask, lengths, anchors, anchor_mask, block_size)


def supervised(loss_mask: Tensor, lengths: Tensor) -> Tensor:
    """Returns [B, T] bool: supervised tokens that are not padding."""
    positions = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    return loss_mask & (positions < lengths[:, None])


def eligible_anchors(loss_mask: Tensor, lengths: Tensor) -> Tensor:
    """Returns [B, T] bool: positions a with x[a] and x[a + 1] both supervised, so that slot 1 always has a label."""
    mask = supervised(loss_mask, lengths)
    return mask & F.pad(mask[:, 1:], (0, 1))


def sample_anchors(loss_mask: Tensor, lengths: Tensor, num_anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples anchors uniformly without replacement per document, or takes all if there are fewer. Returns ascending
    ``anchors`` [B, A] int64 and ``anchor_mask`` [B, A] bool with A = min(num_anchors, T), padded with position 0 and False. A
    depends on shapes alone, so nothing waits for an accelerator."""
    eligible = eligible_anchors(loss_mask, lengths)
    # The num_anchors largest of independent uniform keys are a uniform subset; float64 makes ties negligible.
    keys = torch.rand(eligible.shape, generator=generator, device=generator.device, dtype=torch.float64)
    keys = keys.to(eligible.device).masked_fill(~eligible, -1.0)
    drawn = keys.topk(min(num_anchors, eligible.shape[1]), dim=1)
    return _sorted_and_padded(drawn.indices, drawn.values >= 0, eligible.shape[1])


def all_anchors(loss_mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns every eligible position in the form of ``sample_anchors``; A is the largest number in any document (>= 1)."""
    eligible = eligible_anchors(loss_mask, lengths)
    num_anchors = max(1, int(eligible.sum(dim=1).max()))
    first = eligible.to(torch.int8).topk(num_anchors, dim=1)
    return _sorted_and_padded(first.indices, first.values > 0, eligible.shape[1])


def make_blocks(
    input_ids: Tensor, loss_mask: Tensor, lengths: Tensor, anchors: Tensor, anchor_mask: Tensor, block_size: int
) -> Blocks:
    """Returns blocks with ``labels[b, i, k - 1] = x[anchors[b, i] + k]`` for k = 1..block_size - 1; 0 where they are masked. A
    slot is masked past the end of the anchor's own answer, even where a later answer starts within the block."""
    offsets = torch.arange(1, block_size, device=anchors.device)
    positions = anchors[..., None] + offsets  # [B, A, S]
    inside = positions.clamp(max=input_ids.shape[1] - 1).flatten(1)  # [B, A * S]
    label_mask = supervised(loss_mask, lengths).gather(1, inside).view_as(positions)
    label_mask = label_mask & (positions < lengths[:, None, None]) & anchor_mask[..., None]
    label_mask = label_mask.to(torch.int8).cumprod(dim=-1).bool()  # decoding never drafts past the answer's end
    labels = input_ids.gather(1, inside).view_as(positions).masked_fill(~label_mask, 0)
    return Blocks(anchors=anchors, anchor_mask=anchor_mask, labels=labels, label_mask=label_mask)


def previous_ids(input_ids: Tensor, anchors: Tensor, layout: BlockLayout) -> Tensor:
    """Returns the token before each slot, x[a + parent of slot k]: [B, T] ids, [B, A] anchors -> [B, A, S] int64. Values past
    the end of the text are arbitrary."""
    if layout.parents == tuple(range(layout.num_slots)):  # computed on the device, because a copy to it would wait
        parents = torch.arange(layout.num_slots, device=anchors.device)
    else:
        parents = torch.tensor(layout.parents, device=anchors.device)
    positions = (anchors[..., None] + parents).clamp(max=input_ids.shape[1] - 1)  # [B, A, S]
    return input_ids.gather(1, positions.flatten(1)).view_as(positions)


def coverage(blocks: Blocks, loss_mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the share of supervised tokens that are labels in these blocks, as (sum, count), both int64 scalars.

    ``sum`` counts tokens that are the label of at least one (anchor, slot), ``count`` those that would be with every eligible
    anchor; the first token of an answer never is, since no supervised token precedes it. All eligible anchors therefore give
    sum == count.
    """
    num_slots = blocks.labels.shape[-1]
    offsets = torch.arange(1, num_slots + 1, device=blocks.anchors.device)
    inside = (blocks.anchors[..., None] + offsets).clamp(max=loss_mask.shape[1] - 1).flatten(1)  # [B, A * S]
    times_taught = torch.zeros(loss_mask.shape, dtype=torch.int64, device=loss_mask.device)
    times_taught.scatter_add_(1, inside, blocks.label_mask.flatten(1).long())

    within_reach = reached = eligible_anchors(loss_mask, lengths)
    for slot in range(num_slots):
        reached = F.pad(reached[:, :-1], (1, 0))
        within_reach = reached if slot == 0 else within_reach | reached
    return (times_taught > 0).sum(), (within_reach & supervised(loss_mask, lengths)).sum()


def _sorted_and_padded(positions: Tensor, mask: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    anchors = positions.masked_fill(~mask, num_tokens).sort(dim=1).values
    anchor_mask = anchors < num_tokens
    return anchors.masked_fill(~anchor_mask, 0), anchor_mask
