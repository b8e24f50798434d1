"""Cross-entropy, KL and greedy hits of rows, straight from hidden states and the frozen LM head, without a [rows, V] tensor.

R rows, of which the first E have a teacher; w_v the LM head's row of token v; the rest in src/contracts.py. With
q = softmax(h W^T), q_T = softmax(h W^T / T) and the teacher's p = softmax(g W^T / T),

    CE = log sum_v exp(h w_v) - h w_label              d CE / dh = E_q[w] - w_label
    KL = E_p[log p_v - log q_T,v]                      d KL / dh = (E_q_T[w] - E_p[w]) / T

so a loss and its gradient are expectations under a softmax over the vocabulary. Such an expectation is gathered slice by
slice, as FlashAttention gathers its own (Dao et al. 2022, arXiv 2205.14135), with the LM head as both keys and values:
one pass gives losses and gradients, a slice of W is read once for many rows, and its logits never leave the cache.

``reference_row_losses`` is the formula on whole logits; ``row_losses`` is equal to it and what training runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from src.drafter.cpu import fast_fp32_products

ROWS = {"cpu": 256, "cuda": 4096}  # rows a pass over the LM head
SLICE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # fp32 logits of these rows and one slice: stay in the CPU's cache

RowLosses = tuple[Tensor, Tensor, Tensor]


def reference_row_losses(
    hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float = 1.0
) -> RowLosses:
    """``hidden`` [R, D], ``labels`` [R] int64, ``teacher`` [E, D] states, ``lm_head`` [V, D] -> CE [R], KL [E], hits [R].

    CE and KL(p || q_T) in nats and at least fp32, with gradients for ``hidden`` alone; a hit is a row whose label has the
    largest logit (a tie counts).
    """
    logits = _wide(hidden.to(lm_head.dtype) @ lm_head.T)  # [R, V]
    log_q = F.log_softmax(logits[: len(teacher)] / temperature, dim=-1)  # [E, V]
    log_p = F.log_softmax(_wide(teacher.detach().to(lm_head.dtype) @ lm_head.T) / temperature, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    hits = logits.gather(1, labels[:, None]).squeeze(1) == logits.amax(dim=-1)
    return F.cross_entropy(logits, labels, reduction="none"), kl, hits


def row_losses(hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float = 1.0) -> RowLosses:
    """``reference_row_losses`` in slices of rows and vocabulary. Products in ``lm_head``'s dtype, or autocast's where
    that is on; softmax and sums in fp32."""
    dtype = _product_dtype(lm_head)
    with torch.autocast(hidden.device.type, enabled=False), fast_fp32_products():
        return _RowLosses.apply(hidden.to(dtype), labels, teacher.detach().to(dtype), lm_head.detach(), temperature)


@torch.no_grad()
def is_argmax(hidden: Tensor, labels: Tensor, lm_head: Tensor) -> Tensor:
    """Whether the label has its row's largest logit, as the first of equals: [R, D], int64 [R], [V, D] -> bool [R]."""
    dtype, found = _product_dtype(lm_head), []
    with torch.autocast(hidden.device.type, enabled=False), fast_fp32_products():
        for states, of_rows, _ in _passes(hidden.to(dtype), labels, hidden[:0]):
            top, hits = _wide(states.new_full((len(states),), float("-inf"))), torch.zeros_like(of_rows, dtype=torch.bool)
            for start, rows in _slices(lm_head, len(states)):
                logits = _wide(states @ rows.to(dtype).T)  # a maximum in bf16 takes longer than in fp32
                largest = logits.amax(dim=-1)
                here = ((start <= of_rows) & (of_rows < start + len(rows))).nonzero().squeeze(1)
                here = here[logits[here, of_rows[here] - start] == largest[here]]
                first_here = torch.zeros_like(hits)
                first_here[here] = logits[here].argmax(dim=-1) == of_rows[here] - start
                hits, top = torch.where(largest > top, first_here, hits), torch.maximum(top, largest)
            found.append(hits)
    return torch.cat(found)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float) -> RowLosses:
        parts = [
            _losses_and_gradients(*rows, lm_head, temperature, with_gradients=ctx.needs_input_grad[0])
            for rows in _passes(hidden, labels, teacher)
        ]
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


def _passes(hidden: Tensor, labels: Tensor, teacher: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of one pass over the LM head each; at least one pass, so that no rows at all have losses too."""
    size = ROWS.get(hidden.device.type, ROWS["cpu"])
    starts = range(0, max(1, len(hidden)), size)
    return [(hidden[i : i + size], labels[i : i + size], teacher[i : i + size]) for i in starts]


def _losses_and_gradients(
    hidden: Tensor, labels: Tensor, teacher: Tensor, lm_head: Tensor, temperature: float, *, with_gradients: bool
) -> tuple[Tensor, ...]:
    """One pass: CE [R], KL [E], hits [R] and the gradients of CE [R, D] and KL [E, D] in ``hidden``'s dtype."""
    num_rows, num_taught = len(hidden), len(teacher)
    # One product for all: the students, the teachers, and where T is not 1 the students that have one once more.
    again = hidden[: num_taught if temperature != 1.0 else 0]
    states = torch.cat([hidden, teacher, again])  # [n, D]
    student, target = slice(0, num_rows), slice(num_rows, num_rows + num_taught)
    taught = slice(num_rows + num_taught, None) if len(again) else slice(0, num_taught)

    # Of the softmax over the slices so far: expected row of the LM head, largest logit and log-normaliser. The last one in
    # fp64, since a KL near 0 is a difference of normalisers.
    mean = _wide(torch.zeros_like(states))
    top = mean.new_full((len(states),), float("-inf"))
    log_sum = top.double()
    label_logit, difference = top[student], log_sum.new_zeros(num_taught)
    for start, rows in _slices(lm_head, len(states)):
        rows = rows.to(hidden.dtype)  # [v, D]
        logits = _wide(states @ rows.T)  # [n, v]
        if len(again):
            logits[num_rows:] /= temperature
        column = labels - start  # of labels still to come anything: their own slice puts it right
        at_label = logits.gather(1, column.clamp(0, len(rows) - 1)[:, None]).squeeze(1)
        label_logit = torch.where(column >= 0, at_label, label_logit)
        differences = logits[target] - logits[taught]  # log p - log q_T, but for their normalisers

        largest = logits.amax(dim=-1)
        probability = torch.softmax(logits, dim=-1, out=logits)  # within the slice
        of_slice = largest.double() - probability.amax(dim=-1).double().log()  # the largest probability is exp(largest) / sum
        share = torch.sigmoid(of_slice - log_sum)  # of the slice in all so far
        if with_gradients:
            mean.lerp_(_wide(probability.to(rows.dtype) @ rows), share[:, None].to(mean.dtype))
        expected = differences.mul_(probability[target]).sum(dim=-1)
        difference.lerp_(expected.double(), share[target])
        top, log_sum = torch.maximum(top, largest), torch.logaddexp(log_sum, of_slice)

    ce = log_sum[student] - label_logit
    kl = difference - (log_sum[target] - log_sum[taught])
    d_ce = mean[student] - lm_head[labels].to(hidden.dtype)
    d_kl = (mean[taught] - mean[target]) / temperature
    hits = label_logit == top[student]
    return ce.to(mean.dtype), kl.to(mean.dtype), hits, d_ce.to(hidden.dtype), d_kl.to(hidden.dtype)


def _slices(lm_head: Tensor, num_rows: int) -> Iterator[tuple[int, Tensor]]:
    """The vocabulary in slices of one size as far as it goes (first token, [v, D]): every new shape costs a compilation, and
    a GPU wants rows of whole 16 elements."""
    logits = SLICE_BYTES.get(lm_head.device.type, SLICE_BYTES["cpu"]) // 4
    most = max(256, logits // max(1, num_rows))
    width = -(-len(lm_head) // -(-len(lm_head) // most))
    width = -(-width // 16) * 16
    return ((start, lm_head[start : start + width]) for start in range(0, len(lm_head), width))


def _product_dtype(lm_head: Tensor) -> torch.dtype:
    device = lm_head.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm_head.dtype


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
