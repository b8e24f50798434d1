"""Models a round on DeepSeek-V4: the bytes, FLOPs and least time of verifying n tokens and of drafting.

Legend: n tokens of a row verified in one forward (the anchor and n - 1 drafts), b rows, C tokens of context in the cache;
D, E, H, F, V, m as in ``V4Sizes``. A forward counts:

    matrices         every weight once, whatever n and b, in the checkpoint's format; 2 FLOPs per weight and token
    routed experts   the distinct ones: with k of N experts per token, t tokens that draw uniformly and independently touch
                     N (1 - (1 - k/N)^t) per layer, in hash-routed layers too (Flash: 6, 39, 81 of 256 for t = 1, 7, 16)
    cache            a row's window, its compressed entries (at most ``index_topk`` per query in sparse layers, without overlap
                     between queries) and the indexer's keys; scores and weighted sums 4 H E FLOPs per query and entry
    time             max(bytes / bandwidth, FLOPs / peak) of each part; parts one after the other

It leaves out activations, sampling, traffic between GPUs, kernel launches and scheduling. So every time is a lower bound, and
ratios hold where a forward waits for weights. Real texts route neighboring tokens alike: ``same_experts`` is the other
extreme, where all tokens of a row share the same k experts. A new kind of drafter is one more function in ``DRAFTING``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.layers import CHANNELS
from hyperdflash.planning.v4_sizes import BYTES, SPARSE_RATIO, V4Sizes, Weights, mtp_weights, target_weights
from hyperdflash.settings import natural_int, one_of, positive_int, positive_number

HEADS = ("lm_head", "markov", "correction", "domino", "selector", "xpress")
FP8_RATE = ("fp4", "fp8")  # formats multiplied at the FP8 rate; activations are FP8 beside FP4 weights


@dataclass(frozen=True, kw_only=True)
class GPU:
    """``count`` GPUs that divide every part evenly, without traffic; peaks are dense, not those with structured sparsity."""

    name: str
    bandwidth_tb_s: float
    fp8_tflops: float
    bf16_tflops: float
    count: int = 1

    def __post_init__(self):
        for name in ("bandwidth_tb_s", "fp8_tflops", "bf16_tflops"):
            positive_number(f"gpu {self.name}: {name}", getattr(self, name))
        positive_int("num_gpus", self.count)


@dataclass(frozen=True)
class Work:
    """Bytes read and FLOPs of one part of a forward."""

    part: str
    bytes: float
    fp8_flops: float = 0.0
    bf16_flops: float = 0.0

    def __add__(self, other: Self) -> Self:
        fp8, bf16 = self.fp8_flops + other.fp8_flops, self.bf16_flops + other.bf16_flops
        return Work(self.part, self.bytes + other.bytes, fp8, bf16)

    def seconds(self, gpu: GPU) -> float:
        compute_s = (self.fp8_flops / gpu.fp8_tflops + self.bf16_flops / gpu.bf16_tflops) / (1e12 * gpu.count)
        return max(self.bytes / (gpu.bandwidth_tb_s * 1e12 * gpu.count), compute_s)


def total_seconds(works: Sequence[Work], gpu: GPU) -> float:
    """Adds the times of all parts, which run one after the other."""
    return sum(work.seconds(gpu) for work in works)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A result to predict: ``drafter`` is a key of ``DRAFTING``, ``speedup`` the published one if there is one. ``reducer`` and
    ``lead`` (chained MTP steps) are a block drafter's; ``head`` has its ``rank``, ``expansion`` or ``state``. ``drafted``:
    share of rounds per number of drafts, where a rule ends drafts early; else every round drafts ``slots``."""

    name: str
    drafter: str
    slots: int
    tau: float
    speedup: float | None = None
    reducer: str | None = None
    lead: int = 0
    head: str = "lm_head"
    rank: int = 256
    expansion: int = 2
    state: int = 256
    drafted: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        one_of(f"{self.name}: drafter", self.drafter, tuple(DRAFTING))
        positive_int(f"{self.name}: slots", self.slots)
        one_of(f"{self.name}: head", self.head, HEADS)
        for name in ("tau", "speedup"):
            if name == "tau" or self.speedup is not None:
                positive_number(f"{self.name}: {name}", getattr(self, name))

    @property
    def rounds(self) -> list[tuple[float, int, int]]:
        """Share, number of drafts and number of computed slots: the slot before which a draft ends is computed too."""
        return [(share, count, min(count + 1, self.slots)) for count, share in (self.drafted or {self.slots: 1.0}).items()]

    @property
    def passes(self) -> float:
        """Sequential forwards of a round's drafting: chained steps, then the block's pass unless they draft every slot."""
        chained = self.slots if self.drafter == "mtp" else self.lead
        return sum(share * (min(chained, computed) + (computed > chained)) for share, _, computed in self.rounds)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the roofline compares: ``batches`` rows per forward, ``context`` tokens per row, up to ``max_tokens`` verified."""

    model: str
    sizes: V4Sizes
    drafter: DrafterConfig
    gpu: GPU
    methods: Sequence[Method]
    source: str
    batches: Sequence[int]
    context: int
    max_tokens: int

    def __post_init__(self):
        for batch in self.batches:
            positive_int("batch", batch)
        if not self.batches or not self.methods:
            raise ValueError(f"batch and methods need an entry each, got {list(self.batches)}, {len(self.methods)} methods")
        natural_int("context", self.context)
        positive_int("max_tokens", self.max_tokens)

    def verify_s(self, n: int, batch: int, same_experts: bool = False) -> float:
        return total_seconds(verification(self.sizes, n, batch, self.context, same_experts), self.gpu)

    def ratio(self, n: int, batch: int, same_experts: bool = False) -> float:
        """Time of verifying n tokens per row over that of one."""
        return self.verify_s(n, batch, same_experts) / self.verify_s(1, batch, same_experts)

    def round(self, method: Method, batch: int, same_experts: bool = False) -> dict[str, float]:
        """Returns the least seconds of one round of ``method`` (drafting, then verification of its drafts and the anchor; all
        rows alike) and of one plain step, the drafter's share, and the speedup tau * T_ar / (T_draft + T_verify)."""
        draft = verify = 0.0
        for share, count, computed in method.rounds:
            works = DRAFTING[method.drafter](self.sizes, self.drafter, method, batch, self.context, computed)
            draft += share * total_seconds(works, self.gpu)
            verify += share * self.verify_s(count + 1, batch, same_experts)
        plain, total = self.verify_s(1, batch, same_experts), draft + verify
        return {
            "draft_s": draft,
            "verify_s": verify,
            "ar_s": plain,
            "drafter_share": draft / total,
            "speedup": method.tau * plain / total,
        }

    def __str__(self) -> str:
        gpus = f"{self.gpu.count} x {self.gpu.name.upper()}"
        rates = f"{self.gpu.bandwidth_tb_s:g} TB/s, {self.gpu.fp8_tflops:g} FP8 and {self.gpu.bf16_tflops:g} BF16 TFLOP/s each"
        return f"{self.model} on {gpus} ({rates}), {self.context:,} tokens of context per row"


def verification(sizes: V4Sizes, n: int, batch: int, context: int, same_experts: bool = False) -> list[Work]:
    """Returns the parts of one target forward over ``n`` tokens of each of ``batch`` rows with ``context`` tokens cached.
    ``same_experts``: the tokens of a row share one draw of experts instead of each drawing its own."""
    tokens = n * batch
    works = [_multiplied(w, tokens) for w in target_weights(sizes)]
    works += [_experts(sizes, tokens, batch if same_experts else tokens)] * len(sizes.layer_ratios)
    works += [_cache(sizes, ratio, n, batch, context) for ratio in sizes.layer_ratios]
    return _by_part(works)


def mtp_drafting(
    sizes: V4Sizes, drafter: DrafterConfig, method: Method, batch: int, context: int, slots: int | None = None
) -> list[Work]:
    """Returns the parts of ``slots`` chained MTP steps, by default all of ``method``; the first reads the ``tau`` tokens that
    the last round added per row. Every step reads the whole block, a draw of experts and the LM head again, which computes
    logits of one token per row."""
    slots = method.slots if slots is None else slots
    D, m = sizes.hidden_size, sizes.hc_mult
    works = []
    for step in range(slots):
        tokens = (method.tau if step == 0 else 1.0) * batch
        works += [_multiplied(w, batch if w.part == "LM head" else tokens) for w in mtp_weights(sizes)]
        works.append(Work("attention", 0.0, fp8_flops=2 * (m - 1) * D * D * tokens))  # h_proj acts on each path
        works.append(_experts(sizes, tokens, tokens))
        works.append(_cache(sizes, sizes.compress_ratios[-1], tokens / batch, batch, context))
    return _by_part([*works, *_head(sizes, method, batch, slots)])


def _head(sizes: V4Sizes, method: Method, batch: int, slots: int) -> list[Work]:
    """Returns what the draft head adds for ``slots`` slots to the LM head, in BF16: a table [V, r], and matrices."""
    recurrent = 3 * method.state * (sizes.hidden_size + method.state) + (sizes.hidden_size + method.state) * method.rank
    extra = {
        "lm_head": 0,
        "markov": sizes.vocab_size * method.rank,
        "correction": 3 * method.expansion * sizes.hidden_size**2,
        "domino": sizes.vocab_size * method.rank + recurrent,
        "selector": sizes.hidden_size * method.rank,
        "xpress": (sizes.vocab_size + 2 * sizes.hidden_size + 9 * method.rank) * method.rank,  # as many passes as slots
    }[method.head]
    return [_multiplied(Weights("draft head", extra, "bf16"), batch)] * slots if extra else []


def block_drafting(
    sizes: V4Sizes, drafter: DrafterConfig, method: Method, batch: int, context: int, slots: int | None = None
) -> list[Work]:
    """Returns the parts of one block drafter pass in BF16: K slots per row through all layers, ``slots`` through the LM head.

    Before it, the ``tau`` states per row that the last round added go through the reducer and every layer's key and value
    projections. Attention over ``context``, or the drafter's window of it. A lead's MTP steps come first and draft their slots
    themselves, and no pass follows where they draft every slot; head=correction reads the LM head once per other slot.
    """
    one_of("reducer", method.reducer, ("hc_gate", "fc"))
    if method.slots != drafter.num_slots:
        raise ValueError(
            f"{method.name} drafts {method.slots} slots, drafter.block_size={drafter.block_size} has "
            f"{drafter.num_slots}: set drafter.block_size={method.slots + 1}"
        )
    D, m = sizes.hidden_size, sizes.hc_mult
    width = drafter.hidden_size or D
    keys = drafter.num_kv_heads * drafter.head_dim
    queries = drafter.num_heads * drafter.head_dim
    per_layer = 2 * width * queries + 2 * width * keys + 3 * width * drafter.intermediate_size
    per_layer += 4 * drafter.convolution * width * (width // CHANNELS + 1)
    reducing = m * D * width if method.reducer == "fc" else m * m * D + m + 1 + m * D  # Eq. 1 with its per-path norm
    resize = 0 if width == D else 2 * D * width
    slots = method.slots if slots is None else slots
    block, new, left = drafter.block_size * batch, method.tau * batch, slots - method.lead
    lead = mtp_drafting(sizes, drafter, replace(method, head="lm_head"), batch, context, min(method.lead, slots))
    if left <= 0:
        return _by_part([*lead, *_head(sizes, method, batch, slots)])
    reads = left if method.head == "correction" else 1
    seen = min(context, drafter.context_window or context)
    attended = drafter.num_layers * (seen + drafter.block_size)
    works = [
        _multiplied(Weights("reducer and new keys", reducing + drafter.num_layers * 2 * width * keys, "bf16"), new),
        _multiplied(Weights("draft layers", drafter.num_layers * per_layer + resize, "bf16"), block),
        Work("cache", batch * drafter.num_layers * seen * 2 * keys * BYTES["bf16"], 0.0, 4 * queries * attended * block),
        *[_multiplied(Weights("LM head", sizes.vocab_size * D, "bf16"), left * batch / reads)] * reads,
    ]
    return _by_part([*lead, *works, *_head(sizes, method, batch, slots)])


# Kind of drafter -> parts of one round's drafting (sizes, drafter, method, batch, context, slots that are computed)
DRAFTING: dict[str, Callable[[V4Sizes, DrafterConfig, Method, int, int, int], list[Work]]] = {
    "mtp": mtp_drafting,
    "block": block_drafting,
}


def _multiplied(weights: Weights, tokens: float) -> Work:
    flops = 2 * weights.count * tokens
    return Work(weights.part, weights.bytes, *((flops, 0.0) if weights.format in FP8_RATE else (0.0, flops)))


def _experts(sizes: V4Sizes, tokens: float, draws: float) -> Work:
    """Returns one layer's routed experts, of which ``draws`` tokens choose their own."""
    weights = sizes.expert_weights
    read = sizes.distinct_experts(draws) * weights * BYTES["fp4"]
    return Work("routed experts", read, fp8_flops=2 * sizes.num_experts_per_tok * weights * tokens)


def _cache(sizes: V4Sizes, ratio: int, n: float, batch: int, context: int) -> Work:
    """Returns one layer's cache, which n queries of each row read."""
    window = min(context, sizes.sliding_window)
    compressed = context // ratio if ratio else 0
    sparse = ratio == SPARSE_RATIO
    chosen = min(compressed, sizes.index_topk) if sparse else compressed
    read = min(compressed, n * chosen) if sparse else compressed
    index_keys = sparse * compressed * (sizes.index_head_dim + 4)  # FP8 and a scale
    num_bytes = (window + read) * sizes.entry_bytes + index_keys
    scores = 4 * sizes.num_attention_heads * sizes.head_dim * (window + chosen)
    index = 2 * sizes.index_n_heads * sizes.index_head_dim * compressed if sparse else 0
    return Work("cache", batch * num_bytes, fp8_flops=index * n * batch, bf16_flops=scores * n * batch)


def _by_part(works: Sequence[Work]) -> list[Work]:
    found: dict[str, Work] = {}
    for work in works:
        found[work.part] = found[work.part] + work if work.part in found else work
    return list(found.values())
