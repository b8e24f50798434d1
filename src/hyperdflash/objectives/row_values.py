"""The results of a sweep over the vocabulary per row, and a reference that computes them from whole logits. R rows, of which
the first E have a teacher; shapes otherwise as in contracts.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Against:
    """A teacher for the first E rows: ``teacher`` [E, F] features, the ``temperature``, and the divergences to compute."""

    teacher: Tensor | None = None
    temperature: float = 1.0
    kl: bool = False
    overlap: bool = False

    @property
    def copies(self) -> int:
        """Additional states per row: the teacher's, and if T is not 1 the student's at T."""
        return 1 if self.temperature == 1.0 else 2


@dataclass(frozen=True)
class Divergences:
    """``kl`` (nats) and ``overlap`` [E], each None unless requested."""

    kl: Tensor | None
    overlap: Tensor | None


@dataclass(frozen=True)
class RowValues:
    """``cross_entropy`` [R] nats; ``top1`` [R] bool, the label has the largest logit (or a tie); ``against`` as requested."""

    cross_entropy: Tensor
    top1: Tensor
    against: tuple[Divergences, ...]


def reference_values(features: Tensor, labels: Tensor, tables: Sequence[Tensor], against: Sequence[Against] = ()) -> RowValues:
    """Computes what ``sweep`` computes, from whole logits [R, V]: for tests and small inputs."""
    table = torch.cat([t.to(features.dtype) for t in tables], dim=1)
    logits = wide(features @ table.T)
    top1 = logits.gather(1, labels[:, None]).squeeze(1) == logits.amax(dim=-1)
    divergences = []
    for a in against:
        log_q = F.log_softmax(logits[: len(a.teacher)] / a.temperature, dim=-1)  # [E, V]
        teacher = wide(a.teacher.detach().to(features.dtype) @ table.detach().T)
        log_p = F.log_softmax(teacher / a.temperature, dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(dim=-1)
        divergences.append(Divergences(kl if a.kl else None, overlap if a.overlap else None))
    return RowValues(F.cross_entropy(logits, labels, reduction="none"), top1, tuple(divergences))


def wide(x: Tensor) -> Tensor:
    """Returns ``x`` in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
