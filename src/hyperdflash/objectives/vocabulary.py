"""Cross-entropy, KL and greedy hits of rows, straight from hidden states and the frozen LM head, without a [rows, V] tensor.

R rows, of which the first E have a teacher; w_v the LM head's row of token v; the rest in contracts.py. With
q = softmax(h W^T), q_T = softmax(h W^T / T) and the teacher's p = softmax(g W^T / T),

    CE = log sum_v exp(h w_v) - h w_label              d CE / dh = E_q[w] - w_label
    KL = E_p[log p_v - log q_T,v]                      d KL / dh = (E_q_T[w] - E_p[w]) / T

so a loss and its gradient are expectations under a softmax over the vocabulary. Such an expectation is gathered slice by
slice, as FlashAttention gathers its own (Dao et al. 2022, arXiv 2205.14135), with the LM head as both keys and values:
one pass gives losses and gradients, a slice of W is read once for all rows, and logits never leave the cache.

``reference_row_losses`` is the formula on whole logits; ``row_losses`` is equal to it and what training runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.numerics import fast_fp32_products

ROWS = {"cpu": 512, "cuda": 4096}  # states whose logits are made together
SLICE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # fp32 logits of these rows and one slice: stay in the CPU's cache
ROUND = 32  # numbers of rows are multiples of it: every new shape costs oneDNN a compilation and half a megabyte

RowLosses = tuple[Tensor, Tensor, Tensor]


def reference_row_losses(
    hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float = 1.0
) -> RowLosses:
    """``hidden`` [R, D], ``labels`` [R] int64, ``teacher`` [E, D] states, ``lm_head`` [V, D] -> CE [R], KL [E], hits [R].

    CE and KL(p || q_T) in nats and at least fp32, with gradients for ``hidden`` alone; a hit is a row whose label has the
    largest logit (a tie counts). Products in ``hidden``'s dtype: an LM head kept in fewer bytes is widened.
    """
    lm_head = lm_head.to(hidden.dtype)
    logits = _wide(hidden @ lm_head.T)  # [R, V]
    log_q = F.log_softmax(logits[: len(teacher)] / temperature, dim=-1)  # [E, V]
    log_p = F.log_softmax(_wide(teacher.detach().to(hidden.dtype) @ lm_head.T) / temperature, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    hits = logits.gather(1, labels[:, None]).squeeze(1) == logits.amax(dim=-1)
    return F.cross_entropy(logits, labels, reduction="none"), kl, hits


def row_losses(hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float = 1.0) -> RowLosses:
    """``reference_row_losses`` in slices of rows and vocabulary. Products in ``hidden``'s dtype, or autocast's where that is
    on; softmax and sums in fp32."""
    dtype = _product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False), fast_fp32_products():
        return _RowLosses.apply(hidden.to(dtype), labels, teacher.detach().to(dtype), lm_head.detach(), temperature)


@torch.no_grad()
def is_argmax(hidden: Tensor, labels: Tensor, lm_head: Tensor) -> Tensor:
    """Whether the label has its row's largest logit, as the first of equals: [R, D], int64 [R], [V, D] -> bool [R]. Products as
    in ``row_losses``."""
    num_rows, padding = len(hidden), -len(hidden) % ROUND
    hidden, labels = F.pad(hidden.to(_product_dtype(hidden)), (0, 0, 0, padding)), F.pad(labels, (0, padding))
    top = _wide(hidden.new_full((len(hidden),), float("-inf")))
    hits = torch.zeros_like(labels, dtype=torch.bool)
    size = _rows_together(hidden)
    with torch.autocast(hidden.device.type, enabled=False), fast_fp32_products():
        for start, head_rows in _slices(lm_head, hidden, min(size, len(hidden))):
            for states, of_rows, best, hit in zip(*(x.split(size) for x in (hidden, labels, top, hits)), strict=True):
                logits = _wide(states @ head_rows.T)  # a maximum in bf16 takes longer than in fp32
                largest = logits.amax(dim=-1)
                here = ((start <= of_rows) & (of_rows < start + len(head_rows))).nonzero().squeeze(1)
                here = here[logits[here, of_rows[here] - start] == largest[here]]
                first_here = torch.zeros_like(hit)
                first_here[here] = logits[here].argmax(dim=-1) == of_rows[here] - start
                torch.where(largest > best, first_here, hit, out=hit)
                torch.maximum(best, largest, out=best)
    return hits[:num_rows]


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float) -> RowLosses:
        size = _rows_together(hidden)
        groups = [
            _Softmax(*rows, temperature, with_gradients=ctx.needs_input_grad[0])
            for rows in _groups(hidden, labels, teacher, size, copies=2 if temperature == 1.0 else 3)
        ]
        for start, head_rows in _slices(lm_head, hidden, max(len(group.states) for group in groups)):
            for group in groups:
                group.add(start, head_rows)
        parts = [group.losses_and_gradients(lm_head) for group in groups]
        ce, kl, hits, *gradients = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(hits)
        return ce, kl, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ce_gradient: Tensor, kl_gradient: Tensor, _):
        d_ce, d_kl = ctx.saved_tensors
        gradient = ce_gradient[:, None] * d_ce
        gradient[: len(d_kl)] += kl_gradient[:, None] * d_kl
        return gradient.to(d_ce.dtype), None, None, None, None


def _groups(hidden: Tensor, labels: Tensor, teacher: Tensor, size: int, copies: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows with at most ``size`` states together, of which one that has a teacher takes ``copies``; at least one group, so that
    no rows at all have losses too."""
    taught, first = len(teacher), 0
    while first < max(1, len(hidden)):
        pairs = min(max(0, taught - first), max(1, size // copies))
        alone = max(0, size - copies * pairs) if first + pairs >= taught else 0
        last = first + pairs + alone
        yield hidden[first:last], labels[first:last], teacher[first:last]
        first = last


class _Softmax:
    """Rows, and what the slices so far gave of the softmax over their logits: the expected row of the LM head, the largest
    logit and the log-normaliser. The last one in fp64, since a KL near 0 is a difference of normalisers."""

    def __init__(self, hidden: Tensor, labels: Tensor, teacher: Tensor, temperature: float, *, with_gradients: bool):
        num_rows, num_taught = len(hidden), len(teacher)
        # One product for all: the students, the teachers, and where T is not 1 the students that have one once more.
        again = hidden[: num_taught if temperature != 1.0 else 0]
        self.states = torch.cat([hidden, teacher, again])  # [n, D]
        self.student, self.target = slice(0, num_rows), slice(num_rows, num_rows + num_taught)
        self.taught = slice(num_rows + num_taught, None) if len(again) else slice(0, num_taught)
        self.labels, self.temperature, self.with_gradients = labels, temperature, with_gradients
        self.mean = _wide(torch.zeros_like(self.states))
        self.top = self.mean.new_full((len(self.states),), float("-inf"))
        self.log_sum = self.top.to(torch.float64, copy=True)
        self.label_logit = self.top[self.student].clone()
        self.difference = self.log_sum.new_zeros(num_taught)  # E_p of the logits of p less those of q_T

    def add(self, start: int, head_rows: Tensor) -> None:
        """The LM head's rows [v, D] from token ``start`` on."""
        logits = _wide(self.states @ head_rows.T)  # [n, v]
        if self.temperature != 1.0:
            logits[self.target.start :] /= self.temperature
        column = self.labels - start  # of labels still to come anything: their own slice puts it right
        at_label = logits.gather(1, column.clamp(0, len(head_rows) - 1)[:, None]).squeeze(1)
        torch.where(column >= 0, at_label, self.label_logit, out=self.label_logit)
        differences = logits[self.target] - logits[self.taught]

        largest = logits.amax(dim=-1)
        probability = torch.softmax(logits, dim=-1, out=logits)  # within the slice
        of_slice = largest.double() - probability.amax(dim=-1).double().log()  # the largest probability is exp(largest) / sum
        share = torch.sigmoid(of_slice - self.log_sum)  # of the slice in all so far
        if self.with_gradients:
            expected = _wide(probability.to(head_rows.dtype) @ head_rows)
            self.mean.lerp_(expected, share[:, None].to(expected.dtype))
        of_difference = differences.mul_(probability[self.target]).sum(dim=-1)
        self.difference.lerp_(of_difference.double(), share[self.target])
        torch.maximum(self.top, largest, out=self.top)
        torch.logaddexp(self.log_sum, of_slice, out=self.log_sum)

    def losses_and_gradients(self, lm_head: Tensor) -> tuple[Tensor, ...]:
        """CE [R], KL [E], hits [R] and the gradients of CE [R, D] and KL [E, D] in the states' dtype."""
        mean, log_sum, dtype = self.mean, self.log_sum, self.states.dtype
        ce = log_sum[self.student] - self.label_logit
        kl = self.difference - (log_sum[self.target] - log_sum[self.taught])
        d_ce = mean[self.student] - lm_head[self.labels].to(dtype)
        d_kl = (mean[self.taught] - mean[self.target]) / self.temperature
        hits = self.label_logit == self.top[self.student]
        return ce.to(mean.dtype), kl.to(mean.dtype), hits, d_ce.to(dtype), d_kl.to(dtype)


def _slices(lm_head: Tensor, states: Tensor, num_rows: int) -> Iterator[tuple[int, Tensor]]:
    """The vocabulary in slices of one size as far as it goes: first token, [v, D] in the dtype of ``states``, for products with
    ``num_rows`` states at most. Every new shape costs a compilation, and a GPU wants rows of whole 16 elements."""
    logits = SLICE_BYTES.get(lm_head.device.type, SLICE_BYTES["cpu"]) // 4
    most = max(256, logits // max(1, num_rows))
    width = -(-len(lm_head) // -(-len(lm_head) // most))
    width = -(-width // 16) * 16
    return ((start, lm_head[start : start + width].to(states.dtype)) for start in range(0, len(lm_head), width))


def _rows_together(states: Tensor) -> int:
    return ROWS.get(states.device.type, ROWS["cpu"])


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
