"""The interface between a target, wherever it runs, and the code that stores its states or trains on them.

    sequences, each [T_i] int64   ->   tap -> states [N, M, D], N = sum of T_i, the sequences concatenated

A tap is None for the residual (``pre_hc_head``) or a layer id. The caller groups the sequences; equal lists give equal
states bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperdflash.contracts import Document
from hyperdflash.targets.adapter import adapter_of
from hyperdflash.targets.load import Target
from hyperdflash.targets.taps import tap_residual


class Producer(Protocol):
    """``fingerprint`` identifies the weights (hyperdflash.targets.load.fingerprint); ``where`` names the target in messages."""

    fingerprint: str
    where: str

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """Returns states [N, M, D] by tap, on the CPU, in the type of the target's computation."""
        ...


@dataclass(frozen=True)
class InProcess:
    """The target in this process."""

    target: Target

    @property
    def fingerprint(self) -> str:
        return self.target.fingerprint

    @property
    def where(self) -> str:
        return str(self.target.path)

    @torch.no_grad()  # no inference mode: a cache without rounding passes these tensors to training
    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """Runs a forward per batch, padded on the right to whole windows, which is exact for V4 (left padding is not)."""
        model, window = self.target.model, self.target.model.config.sliding_window
        device = adapter_of(model.config.model_type).input_device(model)
        parts: dict[int | None, list[Tensor]] = {tap: [] for tap in (None, *layer_ids)}
        for batch in forward_batches(sequences, window, self.target.tokens_per_forward):
            lengths = [len(sequence) for sequence in batch]
            input_ids = torch.zeros(len(batch), padded_length(lengths, window), dtype=torch.long)
            for row, sequence in zip(input_ids, batch, strict=True):
                row[: len(sequence)] = sequence
            with tap_residual(model, layer_ids) as taps:
                model.base_model(input_ids.to(device), use_cache=False)
            for tap, found in parts.items():
                states = taps.residual if tap is None else taps.layers[tap]
                found.append(torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)]).cpu())
        return {tap: torch.cat(found) for tap, found in parts.items()}


def finite_states(producer: Producer, documents: Sequence[Document], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
    """Returns ``producer.states`` of ``documents``; ValueError with the place of the first state that is not finite in bf16."""
    states = producer.states([document.input_ids for document in documents], layer_ids)
    lengths = [len(document.input_ids) for document in documents]
    for tap in (*layer_ids, None):
        for document, own in zip(documents, states[tap].split(lengths), strict=True):
            wrong = (~(own.flatten(1).abs().amax(dim=1) <= torch.finfo(torch.bfloat16).max)).nonzero()  # NaN compares as False
            if len(wrong):
                where = "the last residual" if tap is None else f"the output of layer {tap}"
                raise ValueError(
                    f"document {document.id} has NaN or infinity in {where}, first at position {int(wrong[0])}: the target at "
                    f"{producer.where} has damaged weights, or numbers too large for target.dtype"
                )
    return states


def padded_length(lengths: Sequence[int], window: int) -> int:
    """Returns the longest length, rounded up to whole windows."""
    return -(-max(lengths) // window) * window


def forward_batches(sequences: Sequence[Tensor], window: int, tokens: int | None) -> Iterator[list[Tensor]]:
    """Yields as many neighboring sequences as fit into ``tokens`` with padding, at least one; None: all together."""
    batch: list[Tensor] = []
    for sequence in sequences:
        grown = [*batch, sequence]
        if batch and tokens is not None and len(grown) * padded_length([len(s) for s in grown], window) > tokens:
            yield batch
            grown = [sequence]
        batch = grown
    yield batch
