"""Losses of logits z = features tables^T, computed in slices of the vocabulary without a [rows, V] tensor.

R rows, F the width of all factors side by side, w_v row v of the tables, h a row's features, g a teacher's. With
q = softmax(h W^T), q_T = softmax(h W^T / T) and the teacher's p_T = softmax(g W^T / T), for the first E rows,

    CE      = log sum_v exp(h w_v) - h w_label         d CE / dh      = E_q[w] - w_label
    KL      = E_p[log p_v - log q_v]                   d KL / dh      = (E_q[w] - E_p[w]) / T
    overlap = sum_v min(p_v, q_v)                      d overlap / dh = (E_q[m w] - E_q[m] E_q[w]) / T,  m_v = 1 where q_v < p_v

so losses and gradients are expectations under a softmax over the vocabulary. Such an expectation accumulates slice by slice, as
in FlashAttention (Dao et al. 2022, arXiv 2205.14135), with the tables as both keys and values:

    first sweep     normalizers, CE, KL and their gradients for the features; a slice of W is read once for all rows
    second sweep    overlaps and their gradients, which need the normalizers; runs only if an overlap is requested
    backward        d L / d table = (d L / dz)^T features, which needs the normalizers too; runs only if a table trains
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.numerics import fast_fp32_products
from hyperdflash.objectives.row_values import Against, Divergences, RowValues, wide

ROWS = {"cpu": 512, "cuda": 4096}  # states whose logits are computed together
SLICE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # fp32 logits of these rows and one slice; on a CPU they fit in its cache
SHAPE_MULTIPLE = 32  # of row counts: oneDNN compiles half a megabyte of code per new shape


def sweep(features: Tensor, labels: Tensor, tables: Sequence[Tensor], against: Sequence[Against] = ()) -> RowValues:
    """Computes ``RowValues`` of ``features`` [R, F], ``labels`` [R] int64 and ``tables`` [V, F_t], whose widths add up to F.

    Values have at least fp32; features and trainable tables get gradients. Products are computed in the features' dtype, or in
    autocast's if that is on; slices of narrower tables are widened. ``reference_values`` computes the same from whole logits.
    """
    dtype = product_dtype(features)
    against = tuple(Against(a.teacher.detach().to(dtype), a.temperature, a.kl, a.overlap) for a in against)
    with torch.autocast(features.device.type, enabled=False), fast_fp32_products():
        ce, top1, *parts = _Sweep.apply(features.to(dtype), labels, against, *tables)
    parts = iter(parts)
    divergences = [Divergences(next(parts) if a.kl else None, next(parts) if a.overlap else None) for a in against]
    return RowValues(ce, top1, tuple(divergences))


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, labels: Tensor, against: tuple[Against, ...], *tables: Tensor) -> tuple[Tensor, ...]:
        trains = any(ctx.needs_input_grad[3:])
        groups = [
            _Softmax(features[rows], labels[rows], [(a, a.teacher[rows]) for a in against], ctx.needs_input_grad[0] or trains)
            for rows in _groups(len(features), against, rows_together(features))
        ]
        num_states = max(len(group.states) for group in groups)
        for start, table_rows in vocab_slices(tables, features, num_states):
            for group in groups:
                group.add(start, table_rows)
        if any(a.overlap for a in against):
            for _, table_rows in vocab_slices(tables, features, num_states):
                for group in groups:
                    group.add_overlap(table_rows)
        values, gradients = zip(*(group.values_and_gradients(tables) for group in groups), strict=True)
        values, gradients = ([torch.cat(parts) for parts in zip(*rows, strict=True)] for rows in (values, gradients))
        ctx.save_for_backward(*gradients, *(tables if trains else ()))
        ctx.num_gradients, ctx.groups = len(gradients), groups if trains else []
        for group in groups:
            group.mean, group.pairs = None, [replace(pair, mean_below=None) for pair in group.pairs]
        ctx.mark_non_differentiable(values[1])
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_ce: Tensor, _, *d_divergences: Tensor):
        of_ce, *of_divergences = ctx.saved_tensors[: ctx.num_gradients]
        gradient = d_ce[:, None] * of_ce
        for d, of_divergence in zip(d_divergences, of_divergences, strict=True):
            gradient[: len(d)] += d[:, None] * of_divergence
        d_tables = [None] * (len(ctx.needs_input_grad) - 3)
        if ctx.groups:
            tables = ctx.saved_tensors[ctx.num_gradients :]
            d_tables = _table_gradients(ctx.groups, tables, ctx.needs_input_grad[3:], d_ce, d_divergences)
        return gradient.to(of_ce.dtype), None, None, *d_tables


def _groups(num_rows: int, against: Sequence[Against], size: int) -> Iterator[slice]:
    """Yields groups of rows with at most ``size`` states each; at least one group, so that an empty batch has losses too."""
    edges = sorted({min(len(a.teacher), num_rows) for a in against})
    first = 0
    while first < max(1, num_rows):
        last, room = first, size
        for edge in [edge for edge in edges if edge > first] + [max(1, num_rows)]:
            states = 1 + sum(a.copies for a in against if len(a.teacher) > last)
            taken = min(edge - last, max(room // states, int(last == first)))
            last, room = last + taken, max(0, room - taken * states)
            if last < edge:
                break
        yield slice(first, last)
        first = last


@dataclass
class _Pair:
    """One teacher of a group: the places of its states (``target``) and of the student's (``taught``), and sums over slices."""

    request: Against
    target: slice
    taught: slice
    difference: Tensor  # [E] fp64: E_p of the logits of p minus those of q
    overlap: Tensor  # [E]
    below: Tensor  # [E]: E_q[m]
    mean_below: Tensor | None  # [E, F]: E_q[m w]


class _Softmax:
    """A group of rows and its running softmax over the slices so far: the expected row of the tables, the largest logit and
    the log-normalizer. The normalizer is fp64, since a KL near 0 is a difference of two of them."""

    def __init__(self, features: Tensor, labels: Tensor, taught: list[tuple[Against, Tensor]], with_gradients: bool):
        # One product serves all: students, teachers, and if T is not 1 the students that have a teacher once more.
        parts, self.student, self.pairs, places = [features], slice(0, len(features)), [], []
        end = len(features)
        for request, teacher in taught:
            target = own = slice(end, end + len(teacher))
            parts.append(teacher)
            own = slice(0, len(teacher))
            if request.temperature != 1.0:
                own = slice(target.stop, target.stop + len(teacher))
                parts.append(features[: len(teacher)])
            end = max(target.stop, own.stop)
            places.append((request, target, own))
        self.states = torch.cat(parts)  # [n, F]
        self.labels, self.with_gradients = labels, with_gradients
        self.mean = wide(torch.zeros_like(self.states))
        self.top = self.mean.new_full((len(self.states),), float("-inf"))
        self.log_sum = self.top.to(torch.float64, copy=True)
        self.label_logit = self.top[self.student].clone()
        for request, target, own in places:
            zeros = self.log_sum.new_zeros(target.stop - target.start)
            mean = torch.zeros_like(self.mean[target]) if request.overlap and with_gradients else None
            overlap, below = (zeros.to(self.mean.dtype, copy=True) for _ in range(2))
            self.pairs.append(_Pair(request, target, own, zeros, overlap, below, mean))

    def logits(self, table_rows: Tensor) -> Tensor:
        """Returns the logits [n, v] of a slice [v, F], each state at its own temperature."""
        logits = wide(self.states @ table_rows.T)
        for pair in self.pairs:
            if pair.request.temperature != 1.0:
                logits[pair.target.start : pair.taught.stop] /= pair.request.temperature
        return logits

    def add(self, start: int, table_rows: Tensor) -> None:
        """Accumulates the slice ``table_rows`` [v, F], which begins at token ``start``."""
        logits = self.logits(table_rows)
        column = self.labels - start  # labels of later slices get a value here that their own slice overwrites
        at_label = logits[self.student].gather(1, column.clamp(0, len(table_rows) - 1)[:, None]).squeeze(1)
        torch.where(column >= 0, at_label, self.label_logit, out=self.label_logit)
        differences = [logits[pair.target] - logits[pair.taught] if pair.request.kl else None for pair in self.pairs]

        largest = logits.amax(dim=-1)
        probability = torch.softmax(logits, dim=-1, out=logits)  # within the slice
        of_slice = largest.double() - probability.amax(dim=-1).double().log()  # the largest probability is exp(largest) / sum
        share = torch.sigmoid(of_slice - self.log_sum)  # of this slice in the softmax so far
        if self.with_gradients:
            expected = wide(probability.to(table_rows.dtype) @ table_rows)
            self.mean.lerp_(expected, share[:, None].to(expected.dtype))
        for pair, difference in zip(self.pairs, differences, strict=True):
            if difference is not None:
                of_difference = difference.mul_(probability[pair.target]).sum(dim=-1)
                pair.difference.lerp_(of_difference.double(), share[pair.target])
        torch.maximum(self.top, largest, out=self.top)
        torch.logaddexp(self.log_sum, of_slice, out=self.log_sum)

    def probabilities(self, table_rows: Tensor) -> Tensor:
        """Returns the probabilities [n, v] of a slice, once the normalizers are final."""
        logits = self.logits(table_rows)
        return logits.sub_(self.log_sum.to(logits.dtype)[:, None]).exp_()

    def add_overlap(self, table_rows: Tensor) -> None:
        """Accumulates overlaps over the slice ``table_rows`` [v, F], once the normalizers are final."""
        probability = self.probabilities(table_rows)
        for pair in self.pairs:
            if pair.request.overlap:
                p, q = probability[pair.target], probability[pair.taught]
                pair.overlap += torch.minimum(p, q).sum(dim=-1)
                below = q * (q < p)
                pair.below += below.sum(dim=-1)
                if pair.mean_below is not None:
                    pair.mean_below += wide(below.to(table_rows.dtype) @ table_rows)

    def values_and_gradients(self, tables: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns CE [R], top-1 [R] and the divergences [E]; then the gradients of all but top-1, [R, F] and [E, F]."""
        mean, log_sum, dtype = self.mean, self.log_sum, self.states.dtype
        at_label = joined([table[self.labels].to(dtype) for table in tables])
        values = [(log_sum[self.student] - self.label_logit).to(mean.dtype), self.label_logit == self.top[self.student]]
        gradients = [(mean[self.student] - at_label).to(dtype)]
        for pair in self.pairs:
            temperature = pair.request.temperature
            if pair.request.kl:
                kl = pair.difference - (log_sum[pair.target] - log_sum[pair.taught])
                values.append(kl.to(mean.dtype))
                gradients.append(((mean[pair.taught] - mean[pair.target]) / temperature).to(dtype))
            if pair.request.overlap:
                values.append(pair.overlap)
                moved = 0.0 * mean[pair.taught] if pair.mean_below is None else pair.mean_below
                gradients.append(((moved - pair.below[:, None] * mean[pair.taught]) / temperature).to(dtype))
        return values, gradients


def _table_gradients(
    groups: Sequence[_Softmax], tables: Sequence[Tensor], train: Sequence[bool], d_ce: Tensor, d_divergences: Sequence[Tensor]
) -> list[Tensor | None]:
    """Returns d L / d table [V, F_t] = (d L / dz)^T features for each table that ``train`` selects, None for the others."""
    widths = [table.shape[1] for table in tables]
    gradients = [wide(torch.zeros_like(t)) if trains else None for t, trains in zip(tables, train, strict=True)]
    first = [sum(len(group.labels) for group in groups[:number]) for number in range(len(groups))]
    for start, table_rows in vocab_slices(tables, groups[0].states, max(len(group.states) for group in groups)):
        for group, begin in zip(groups, first, strict=True):
            probability, rows = group.probabilities(table_rows), group.states[group.student]
            d_logits = d_ce[begin : begin + len(rows), None] * probability[group.student]
            remaining = iter(d_divergences)
            for pair in group.pairs:
                p, q = probability[pair.target], probability[pair.taught]
                own = slice(begin, begin + len(p))
                if pair.request.kl:
                    d_logits[: len(p)] += next(remaining)[own, None] / pair.request.temperature * (q - p)
                if pair.request.overlap:
                    of_logits = q * ((q < p).to(q.dtype) - pair.below[:, None])
                    d_logits[: len(p)] += next(remaining)[own, None] / pair.request.temperature * of_logits
            for gradient, factor in zip(gradients, rows.split(widths, dim=1), strict=True):
                if gradient is not None:
                    gradient[start : start + len(table_rows)] += wide(d_logits.to(rows.dtype).T @ factor)
    for group, begin in zip(groups, first, strict=True):
        rows = group.states[group.student]
        for gradient, factor in zip(gradients, rows.split(widths, dim=1), strict=True):
            if gradient is not None:
                at_label = d_ce[begin : begin + len(rows), None].to(gradient.dtype) * factor.to(gradient.dtype)
                gradient.index_add_(0, group.labels, at_label, alpha=-1)
    return [None if g is None else g.to(table.dtype) for g, table in zip(gradients, tables, strict=True)]


def vocab_slices(tables: Sequence[Tensor], states: Tensor, num_rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yields slices of the vocabulary: the first token, and rows [v, F] of all tables side by side, in the dtype of ``states``.

    Slices are sized for products with at most ``num_rows`` states and have equal sizes but for the last, since every new shape
    costs a compilation. Sizes are multiples of 16, as GPUs prefer."""
    vocab_size = len(tables[0])
    logits = SLICE_BYTES.get(states.device.type, SLICE_BYTES["cpu"]) // 4
    most = max(256, logits // max(1, num_rows))
    width = -(-vocab_size // -(-vocab_size // most))
    width = -(-width // 16) * 16
    for start in range(0, vocab_size, width):
        yield start, joined([table[start : start + width].to(states.dtype) for table in tables])


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def rows_together(states: Tensor) -> int:
    return ROWS.get(states.device.type, ROWS["cpu"])


def product_dtype(features: Tensor) -> torch.dtype:
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


@torch.no_grad()
def is_largest(features: Tensor, labels: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Returns whether the label has its row's largest logit, as the first of equals: [R, F], int64 [R], [V, F_t] -> bool [R].
    Products are computed as in ``sweep``."""
    num_rows, padding = len(features), -len(features) % SHAPE_MULTIPLE
    features, labels = F.pad(features.to(product_dtype(features)), (0, 0, 0, padding)), F.pad(labels, (0, padding))
    top = wide(features.new_full((len(features),), float("-inf")))
    hits = torch.zeros_like(labels, dtype=torch.bool)
    size = rows_together(features)
    first = first_largest_on_host if features.device.type == "cpu" else first_largest
    with torch.autocast(features.device.type, enabled=False), fast_fp32_products():
        for start, table_rows in vocab_slices(tables, features, min(size, len(features))):
            for states, of_rows, best, hit in zip(*(x.split(size) for x in (features, labels, top, hits)), strict=True):
                logits = wide(states @ table_rows.T)  # a maximum takes longer in bf16 than in fp32
                largest = logits.amax(dim=-1)
                first_here = first(logits, largest, of_rows - start)
                torch.where(largest > best, first_here, hit, out=hit)
                torch.maximum(best, largest, out=best)
    return hits[:num_rows]


def first_largest_on_host(logits: Tensor, largest: Tensor, column: Tensor) -> Tensor:
    """``first_largest`` with a second look at the few rows that need one, which an accelerator would be waited for."""
    here = ((column >= 0) & (column < logits.shape[1])).nonzero().squeeze(1)
    here = here[logits[here, column[here]] == largest[here]]
    first = torch.zeros_like(column, dtype=torch.bool)
    first[here] = logits[here].argmax(dim=-1) == column[here]
    return first


def first_largest(logits: Tensor, largest: Tensor, column: Tensor) -> Tensor:
    """Returns whether ``column`` [R] is the first one of ``logits`` [R, V] equal to ``largest`` [R]; False outside [0, V)."""
    inside, at = (column >= 0) & (column < logits.shape[1]), column.clamp(0, logits.shape[1] - 1)[:, None]
    equal = logits == largest[:, None]
    earlier = torch.arange(logits.shape[1], device=logits.device) < at
    return inside & equal.gather(1, at).squeeze(1) & ~(equal & earlier).any(dim=1)
