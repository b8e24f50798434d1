"""Pretrains a tiny target and its MTP block together, as DeepSeek does.

1. conversations -> token ids, shuffled, concatenated           [rows, T + 1]
2. model -> pre_hc_head residual H and logits                   [B, T, M, D], [B, T, V]
3. MTP block on (H[i], embed(x[i+1])) -> logits for x[i+2]      [B, T - 1, V]
4. loss = CE(x[i+1]) + mtp_weight * CE(x[i+2])
5. Muon on matrices, AdamW on the rest, linear warm-up, constant, linear decay to zero
6. router biases follow the load, without an auxiliary loss (DeepSeek-V3, section 2.1.2)

Without more, a model of this size answers in loops: a greedy text that repeats itself once does not stop, because every repeat
makes the next one likelier (arXiv 2206.02369). So some rows get a planted loop between steps 1 and 2: a short span of the text
repeats a few times before the text continues. Step 4 lowers the probability of repeats (unlikelihood, -log(1 - p), arXiv
1908.04319, section 4.1); the text behind them teaches the end of a loop.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hyperdflash.files import whole_file
from hyperdflash.optim.muon import MuonWithAdamW
from hyperdflash.targets.deepseek_v4.mtp import MTPBlock
from hyperdflash.targets.taps import tap_residual


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Total ``tokens``; ``context`` T and ``batch_rows`` B of a step; learning rates of the plateau; ``loop_share`` of the rows
    gets a planted loop."""

    tokens: int = 12_288_000
    context: int = 1024
    batch_rows: int = 4
    lr: float = 3e-3
    warmup_share: float = 0.02
    decay_share: float = 0.5
    weight_decay: float = 0.01
    mtp_weight: float = 0.5
    router_bias_rate: float = 0.002
    router_bias_every: int = 20
    clip: float = 1.0
    seed: int = 0
    loop_share: float = 1.0
    bf16: bool = True
    compile: bool = True
    checkpoint_every_s: float = 300.0

    def __post_init__(self):
        if self.tokens < self.context * self.batch_rows:
            raise ValueError(f"tokens must cover one step of {self.context * self.batch_rows}, got {self.tokens}")

    @property
    def steps(self) -> int:
        return self.tokens // (self.context * self.batch_rows)

    def lr_at(self, step: int) -> float:
        """Returns the learning rate at ``step``: warm-up, plateau, linear decay to zero."""
        done = (step + 1) / self.steps
        return self.lr * min(1.0, done / self.warmup_share, (1 - done) / self.decay_share + 1e-8)


def pack(documents: Sequence[Tensor], context: int, seed: int, epoch: int) -> Tensor:
    """Shuffles and concatenates documents [T_i] into [rows, context + 1] int64; drops the remainder."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = torch.cat([documents[i] for i in order])
    rows = (len(stream) - 1) // context
    if rows == 0:
        raise ValueError(f"the corpus has {len(stream)} tokens, fewer than one row of {context}: give it more documents")
    return stream[: rows * context + 1].unfold(0, context + 1, context)


LONGEST_PERIOD, LONGEST_LOOP = 32, 96  # tokens


def plant_loops(rows: Tensor, share: float, never: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Repeats a short span in a ``share`` of the rows [B, T + 1]; returns rows of this shape and copy numbers [B, T + 1] int64.

    The n-th repeat has copy number n, the span itself and all other text 0; the row's end is cut. Periods are log-uniform in
    1..LONGEST_PERIOD; repeats add from 2 periods to LONGEST_LOOP tokens. A row whose span has a token of ``never`` [n] (control
    tokens) does not change.
    """
    rows, copies = rows.clone(), torch.zeros_like(rows)
    for row, copy in zip(rows, copies, strict=True):
        chosen, where, how_short, how_long = torch.rand(4, generator=generator).tolist()
        period = min(int((LONGEST_PERIOD + 1) ** how_short), len(row) - 1)
        end = period + int(where * (len(row) - period))
        span = row[end - period : end].clone()
        if chosen >= share or torch.isin(span, never).any():
            continue
        added = min(int(2 * period + how_long * (LONGEST_LOOP - 2 * period)), len(row) - end)
        row[end + added :] = row[end : len(row) - added].clone()
        row[end : end + added] = span.repeat(added // period + 1)[:added]
        copy[end : end + added] = torch.arange(added) // period + 1
    return rows, copies


def joint_loss(model: PreTrainedModel, mtp: MTPBlock, rows: Tensor, copies: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns mean next-token and mean MTP cross-entropy of rows [B, T + 1] int64, in nats per token.

    With ``copies`` (plant_loops) the first repeat counts in neither; later repeats count as -log(1 - p) in the first only.
    """
    ids, targets = rows[:, :-1], rows[:, 1:]
    with tap_residual(model) as tap:
        hidden = model.model(ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    # T rows, so that windowed attention applies; the last index has no x[i+2] in the row, so the loss omits it.
    states = mtp(tap.residual, model.model.embed_tokens(targets))[:, :-1]
    mtp_logits = model.lm_head(states).float()
    main = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    drafted = F.cross_entropy(mtp_logits.flatten(0, 1), rows[:, 2:].flatten(), reduction="none")
    if copies is None:
        return main.mean(), drafted.mean()
    copy = copies[:, 1:].flatten()
    unlikelihood = -torch.log1p(-torch.exp(-main).clamp(max=1 - 1e-4))
    main = torch.where(copy == 0, main, unlikelihood.masked_fill(copy == 1, 0.0))
    text = (copies[:, 2:].flatten() == 0).float()
    return main.mean(), (drafted * text).sum() / text.sum()


def make_optimizer(model: PreTrainedModel, mtp: MTPBlock, settings: PretrainSettings) -> MuonWithAdamW:
    """Makes the optimizer: Muon on the layers' matrices, AdamW on embeddings, heads, norms, hyper-connections, routers."""
    named = [*model.named_parameters(), *(("mtp." + name, p) for name, p in mtp.named_parameters())]
    return MuonWithAdamW(named, lr=settings.lr, weight_decay=settings.weight_decay)


def train_step(
    model: PreTrainedModel,
    mtp: MTPBlock,
    optimizer: MuonWithAdamW,
    rows: Tensor,
    copies: Tensor,
    settings: PretrainSettings,
) -> tuple[float, float, float]:
    """Runs one optimizer step on rows [B, T + 1]; returns next-token loss, MTP loss, gradient norm before clipping.

    A norm that is not finite leaves the weights unchanged.
    """
    with torch.autocast("cpu", torch.bfloat16) if settings.bf16 else contextlib.nullcontext():
        main, drafted = joint_loss(model, mtp, rows, copies)
    (main + settings.mtp_weight * drafted).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return float(main.detach()), float(drafted.detach()), norm


@torch.no_grad()
def balance_routers(model: PreTrainedModel, mtp: MTPBlock, ids: Tensor, rate: float) -> None:
    """Moves each top-k router's selection bias by ``rate`` against its load on ``ids`` [B, T]."""
    gates = [layer.mlp.gate for layer in [*model.model.layers, mtp.layer] if not layer.mlp.is_hash]

    def adjust(gate, _, output):
        load = torch.bincount(output[2].flatten(), minlength=gate.num_experts).float()
        gate.e_score_correction_bias -= rate * torch.sign(load - load.mean())

    hooks = [gate.register_forward_hook(adjust) for gate in gates]
    with torch.compiler.set_stance("force_eager"):
        joint_loss(model, mtp, ids)
    for hook in hooks:
        hook.remove()


def pretrain(
    model: PreTrainedModel,
    mtp: MTPBlock,
    documents: Sequence[Tensor],
    settings: PretrainSettings,
    checkpoint: Path,
    identity: str,
    control_ids: Sequence[int],
    on_log: Callable[[dict], None] = lambda _: None,
) -> dict:
    """Trains in place; returns the last log record ({} where no step is left).

    A killed run continues from ``checkpoint`` if its ``identity`` is equal: a hash of everything besides the settings that
    decides the result. No planted loop repeats tokens of ``control_ids``. ValueError for a gradient norm that is not finite.
    """
    control = torch.tensor(sorted(control_ids))
    optimizer = make_optimizer(model, mtp, settings)
    trained = {"model": model, "mtp": mtp, "optimiser": optimizer}
    decided_by = {"settings": asdict(settings), "identity": identity}
    step, spent_s = _resume(trained, decided_by, checkpoint)
    started = saved = time.monotonic()

    def elapsed_s() -> float:
        return spent_s + time.monotonic() - started

    def save() -> None:
        state = {name: part.state_dict() for name, part in trained.items()}
        with whole_file(checkpoint) as file:
            torch.save({**state, **decided_by, "step": step, "elapsed_s": elapsed_s()}, file)

    if settings.compile:
        for layer in [*model.model.layers, mtp.layer]:
            layer.compile(dynamic=False)
    model.train(), mtp.train()
    tokens_per_step = settings.batch_rows * settings.context
    # every epoch packs the same number of tokens, so it has the same number of steps
    steps_per_epoch = max(1, (sum(map(len, documents)) - 1) // settings.context // settings.batch_rows)
    packed_epoch, rows, record = None, None, {}
    bar = tqdm(total=settings.steps, initial=step, desc="pretrain", unit="step", mininterval=5, dynamic_ncols=True)
    while step < settings.steps:
        if step // steps_per_epoch != packed_epoch:
            packed_epoch = step // steps_per_epoch
            rows = pack(documents, settings.context, settings.seed, packed_epoch)
        at = (step % steps_per_epoch) * settings.batch_rows
        batch = rows[at : at + settings.batch_rows]
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        planted, copies = plant_loops(batch, settings.loop_share, control, generator)
        main, mtp_loss, norm = train_step(model, mtp, optimizer, planted, copies, settings)
        if not math.isfinite(norm):
            raise ValueError(f"gradient norm is {norm} at step {step}: lower lr (now {settings.lr}) and run again")
        if settings.router_bias_every and step % settings.router_bias_every == 0:
            balance_routers(model, mtp, batch[:1], settings.router_bias_rate * settings.router_bias_every)
        step += 1
        if step % 20 == 0 or step == settings.steps:
            record = {"step": step, "tokens": step * tokens_per_step, "loss": main, "mtp_loss": mtp_loss}
            record |= {"gradient_norm": norm, "elapsed_s": elapsed_s()}
            on_log(record)
            bar.set_postfix(loss=f"{main:.3f}", mtp=f"{mtp_loss:.3f}", refresh=False)
        bar.update()
        if time.monotonic() - saved > settings.checkpoint_every_s:
            save()
            saved = time.monotonic()
    bar.close()
    model.eval(), mtp.eval()
    save()
    return record


def _resume(trained: dict, decided_by: dict, path: Path) -> tuple[int, float]:
    """Loads ``trained`` from ``path`` if it exists; returns the next step and the seconds spent before."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for name, what in (("settings", "settings"), ("identity", "corpus, tokenizer or model")):
        if state[name] != decided_by[name]:
            raise ValueError(f"{path} was written with another {what}: remove it to start again, or run with what it had")
    for name, part in trained.items():
        part.load_state_dict(state[name])
    return state["step"], state["elapsed_s"]
