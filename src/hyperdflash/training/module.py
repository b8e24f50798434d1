"""The LightningModule: a frozen target's heads, a trainable drafter, one objective, replayed tau as validation.

1. micro-batch   drafted slots -> logits -> sums, divided by the counts of the global batch -> gradients
2. step          gradients summed over ranks -> clipped -> one optimizer step
3. validation    replay at T = 0 over the target's own answers -> tau; survival and conditional acceptance per slot

It optimizes ``drafter.parameters()`` and saves nothing of the target.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from hyperdflash.contracts import Rounds, TargetStates
from hyperdflash.decoding.metrics import AcceptanceMetrics
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.anchors import coverage
from hyperdflash.numerics import fast_fp32_products, keep_freed_memory
from hyperdflash.objectives.objective import LossSums, Objective
from hyperdflash.objectives.term import SumCount
from hyperdflash.optim.muon import MuonWithAdamW
from hyperdflash.settings import number_between, one_of, positive_int, positive_number
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.training.checkpoints import check_same_run
from hyperdflash.training.datamodule import StepBatch


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """``name``: adamw, or muon for matrices with AdamW for the rest. The learning rate warms up linearly over ``warmup_share``
    of all steps and falls to zero as a cosine. ``batch_size`` counts documents per device and micro-batch."""

    name: str
    lr: float
    weight_decay: float
    warmup_share: float
    batch_size: int

    def __post_init__(self):
        one_of("optim.name", self.name, ("adamw", "muon"))
        positive_number("optim.lr", self.lr)
        number_between("optim.weight_decay", self.weight_decay, 0.0, 1.0)
        number_between("optim.warmup_share", self.warmup_share, 0.0, 1.0)
        positive_int("optim.batch_size", self.batch_size)

    def factor(self, step: int, total: int) -> float:
        """Returns the learning rate at ``step`` of ``total`` as a share of ``lr``."""
        warmup = max(1, round(total * self.warmup_share))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class DraftingModule(L.LightningModule):
    """``drafter`` is a ``DraftModel``; ``clip``, the largest gradient norm, or None; ``meta`` describes the run in checkpoints.
    A step runs its own backward passes and update (Lightning's manual optimization), so one division serves all micro-batches.
    """

    def __init__(
        self,
        drafter: nn.Module,
        heads: TargetHeads,
        objective: Objective,
        optim: OptimSettings,
        *,
        clip: float | None,
        meta: dict,
        last_checkpoint: Path | None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.drafter, self.target_heads = drafter, heads.requires_grad_(False).eval()
        self.objective, self.optim, self.clip = objective, optim, clip
        self.meta, self.last_checkpoint = meta, last_checkpoint
        self.acceptance = AcceptanceMetrics(drafter.num_slots)

    def on_fit_start(self) -> None:
        keep_freed_memory()
        # the first step whose loss or gradient is not finite, or -1; on the device, and read only when a wait costs nothing
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)

    def on_validation_end(self) -> None:
        self.trainer.datamodule.validation_states.release()
        self.on_train_start()

    def on_train_start(self) -> None:
        """Starts to count the tokens and seconds of `train/tokens_per_s`."""
        self._tokens, self._since = torch.zeros((), dtype=torch.int64, device=self.device), time.monotonic()

    def training_step(self, batch: StepBatch, batch_index: int) -> None:
        """Waits for an accelerator only in steps that log."""
        step, optimizer = self.global_step, self.optimizers()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        losses, sums = [], []
        for number, micro in enumerate(batch.micro, start=1):
            blocks = micro.blocks
            # ranks exchange gradients only with the last micro-batch
            local = getattr(self.trainer.strategy.model, "no_sync", nullcontext) if number < len(batch.micro) else nullcontext
            with local(), fast_fp32_products():
                slots = self.drafter.slots(micro.states, self.target_heads, blocks.anchors, blocks.anchor_mask)
                logits = self.drafter.head.logits(slots, self.target_heads)
                part = self.objective.sums(logits, blocks, micro.states.residual, self.target_heads)
                loss = self.objective.loss(part, batch.counts, step / self.total_steps)
                self.manual_backward(loss * self.trainer.world_size)  # DDP averages over ranks; this makes it a sum
            losses.append(loss.detach())
            sums.append(part)
            self._tokens = self._tokens + micro.states.lengths.sum() * blocks.anchor_mask.any()
        loss = torch.stack(losses).sum()
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.clip or math.inf)
        bad = ~torch.isfinite(norm + loss) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)
        if self.device.type == "cpu":
            self.check_finite()
        optimizer.step()
        self.lr_schedulers().step()
        if (step + 1) % self.trainer.log_every_n_steps == 0:
            self._log_step(step, batch, loss, {"train/lr": lr, "train/grad_norm": float(norm)}, sums)

    def check_finite(self) -> None:
        """Raises ValueError when the loss or gradient of any step so far is not finite; waits for the device."""
        if (step := int(self.first_bad)) >= 0:
            ids = self.trainer.datamodule.ids(step)
            raise ValueError(
                f"the loss or the gradient of step {step} is not finite; its documents are {', '.join(ids)}; the last good "
                f"checkpoint is {self.last_checkpoint or 'none, the run had just begun'}: lower optim.lr or check the documents"
            )

    def _log_step(self, step: int, batch: StepBatch, loss: Tensor, others: dict[str, float], parts: list[LossSums]) -> None:
        """Logs ``others`` and sums of all ranks, from one all-reduce, divided by the counts of the global batch."""
        coverages = [torch.stack(coverage(m.blocks, m.states.loss_mask, m.states.lengths)) for m in batch.micro]
        own = torch.stack([torch.stack([part.slot_ce_sum.sum(), part.top1.sum().double()]) for part in parts]).sum(0)
        own = [loss[None], own, torch.stack(coverages).sum(0), self._tokens[None]]
        terms = range(len(self.objective.active))
        own += [torch.stack([part.term_sums[place].detach() for part in parts]).sum(0).flatten() for place in terms]
        sums = self.trainer.strategy.reduce(torch.cat([value.double() for value in own]), reduce_op="sum").tolist()
        loss, ce_sum, top1, covered, supervised, tokens, *rest = sums
        slots = max(1, int(batch.counts.slot_count.sum()))
        logged = {
            "train/loss": loss,
            "train/ce": ce_sum / slots,
            "train/accuracy": top1 / slots,
            "train/coverage": covered / max(1, supervised),
            "train/tokens_per_s": tokens / max(time.monotonic() - self._since, 1e-9),
            **others,
        }
        for term, term_counts in zip(self.objective.active, batch.counts.term_counts, strict=True):
            own, rest = rest[: term_counts.numel()], rest[term_counts.numel() :]
            total = torch.tensor(own, dtype=torch.float64).view(term_counts.shape)
            logged[f"train/{term.metric}"] = float(term.mean(SumCount(total, term_counts.cpu())))
        self.check_finite()
        self._write(logged, step)
        self.on_train_start()

    def _write(self, values: dict[str, float], step: int) -> None:
        """Passes values to the loggers, under the number of the last step, and to Lightning's callback metrics."""
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.trainer.datamodule.order.epoch_of(step)}, step=step)
        for name, value in values.items():
            self.log(name, value, logger=False, batch_size=1, rank_zero_only=False)

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        with fast_fp32_products():
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: TargetStates, batch_index: int) -> dict[str, Rounds]:
        rounds = replay(self.drafter, batch, self.target_heads, temperature=0.0)
        self.acceptance.update(rounds)
        return {"rounds": rounds}

    def on_validation_epoch_end(self) -> None:
        measured = self.acceptance.compute()
        self.acceptance.reset()
        values = {"val/tau": float(measured.tau), "val/accepted": float(measured.accepted)}
        for slot in range(self.drafter.num_slots):
            values[f"val/survival_{slot + 1}"] = float(measured.survival[slot])
            if not torch.isnan(measured.conditional[slot]):
                values[f"val/conditional_{slot + 1}"] = float(measured.conditional[slot])
        self._write(values, self.global_step - 1)

    def configure_optimizers(self):
        shared = {"lr": self.optim.lr, "weight_decay": self.optim.weight_decay}
        if self.optim.name == "adamw":
            optimizer = torch.optim.AdamW(self.drafter.parameters(), fused=True, **shared)
        else:
            tables = [module.weight for module in self.drafter.modules() if isinstance(module, nn.Embedding)]
            optimizer = MuonWithAdamW(self.drafter.named_parameters(), tables=tables, **shared)
        self.total_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, self.total_steps))
        return [optimizer], [schedule]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Drops the weights of the target's heads and of a frozen lead, which come from the target."""
        given = self._given_by_target()
        checkpoint["state_dict"] = {name: own for name, own in checkpoint["state_dict"].items() if name not in given}
        checkpoint["run"] = self.meta

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        check_same_run(self.last_checkpoint, checkpoint["run"], self.meta)
        checkpoint["state_dict"] |= self._given_by_target()

    def _given_by_target(self) -> dict[str, Tensor]:
        """Returns the state that the target gives: its heads, and weights of the drafter that no step changes."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {n: own for n, own in self.state_dict().items() if n.startswith("target_heads.") or n in frozen}
