"""The LightningModule: a frozen target's heads, a trainable drafter, one objective, replayed tau as validation.

    batch TargetStates -> anchors -> blocks -> drafted hidden -> sums and counts -> one division -> loss
    validation: replay at T = 0 over the target's own answers -> tau, survival and conditional acceptance a slot

Wiring only. It optimises ``drafter.parameters()`` and saves nothing of the target (tests/lit/test_training.py).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from src.blocks.anchors import BlockSampler, coverage
from src.contracts import TargetStates
from src.decode.metrics import AcceptanceMetrics
from src.decode.replay import replay
from src.drafter.cpu import fast_fp32_products, keep_freed_memory
from src.loss.cross_entropy import PositionWeighted
from src.loss.distillation import KLConfig
from src.loss.objective import loss_terms, total_loss
from src.muon import MuonWithAdamW
from src.settings import natural_int, number_between, one_of, positive_int, positive_number
from src.target.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """``name`` adamw, or muon for matrices with AdamW for the rest; linear warm-up over ``warmup_share`` of all steps, cosine
    to zero; ``batch_size`` documents a device."""

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
        """Learning rate at ``step`` of ``total`` as a share of ``lr``."""
        warmup = max(1, round(total * self.warmup_share))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class DraftingModule(L.LightningModule):
    """``drafter`` has ``score(states, heads, anchors, anchor_mask) -> [B, A, S, D]`` and ``num_slots``."""

    def __init__(
        self,
        *,
        drafter: nn.Module,
        heads: TargetHeads,
        blocks: BlockSampler,
        weights: PositionWeighted,
        kl: KLConfig,
        optim: OptimSettings,
        seed: int,
        meta: dict | None = None,
    ):
        super().__init__()
        natural_int("seed", seed)
        kl.check_slots(drafter.num_slots)
        self.drafter = drafter
        self.target_heads = heads.requires_grad_(False).eval()
        self.blocks, self.kl, self.optim, self.seed = blocks, kl, optim, seed
        self.register_buffer("weights", weights.weights(drafter.num_slots), persistent=False)  # moves with the module
        self.meta = meta or {}
        self.acceptance = AcceptanceMetrics(drafter.num_slots)
        self._tokens, self._since = torch.zeros((), dtype=torch.int64), time.monotonic()

    def on_fit_start(self) -> None:
        keep_freed_memory()

    def on_train_epoch_start(self) -> None:
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._tokens, self._since = torch.zeros((), dtype=torch.int64, device=self.device), time.monotonic()

    def training_step(self, batch: TargetStates, batch_index: int) -> Tensor:
        """Nothing here waits for an accelerator but the steps that log."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step * 1009 + self.global_rank)
        num_slots = self.drafter.num_slots
        blocks = self.blocks.sample(batch.input_ids, batch.loss_mask, batch.lengths, num_slots + 1, generator)
        with fast_fp32_products():
            hidden = self.drafter.score(batch, self.target_heads, blocks.anchors, blocks.anchor_mask)
            terms = loss_terms(hidden, blocks, batch.final, self.target_heads, weights=self.weights, kl=self.kl)
        loss = total_loss(terms, alpha=self.kl.alpha, temperature=self.kl.temperature)
        self._tokens = self._tokens + batch.lengths.sum()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # when Lightning writes its logs
            covered, supervised = coverage(blocks, batch.loss_mask, batch.lengths)
            logged = {
                "train/loss": loss.detach(),
                "train/ce": terms.slot_ce_sum.sum() / terms.slot_count.sum().clamp(min=1),
                "train/accuracy": terms.correct.sum() / terms.slot_count.sum().clamp(min=1),
                "train/coverage": covered / supervised.clamp(min=1),
                "train/tokens_per_s": self._tokens / max(time.monotonic() - self._since, 1e-9),
            }
            if self.kl.alpha > 0:
                logged["train/kl"] = (terms.kl_sum.detach() / terms.kl_count.clamp(min=1)).mean()
            self.log_dict({name: float(value) for name, value in logged.items()}, batch_size=len(batch.ids))
            self._restart_clock()
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch.ids))
        return loss

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        with fast_fp32_products():
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: TargetStates, batch_index: int) -> None:
        self.acceptance.update(replay(self.drafter, batch, self.target_heads, temperature=0.0))

    def on_validation_epoch_end(self) -> None:
        measured = self.acceptance.compute()
        self.acceptance.reset()
        self.log("val/tau", measured.tau.float(), prog_bar=True)
        self.log("val/accepted", measured.accepted.float())
        for slot in range(self.drafter.num_slots):
            self.log(f"val/survival_{slot + 1}", measured.survival[slot].float())
            if not torch.isnan(measured.conditional[slot]):
                self.log(f"val/conditional_{slot + 1}", measured.conditional[slot].float())

    def configure_optimizers(self):
        shared = {"lr": self.optim.lr, "weight_decay": self.optim.weight_decay}
        if self.optim.name == "adamw":
            optimiser = torch.optim.AdamW(self.drafter.parameters(), fused=True, **shared)
        else:
            optimiser = MuonWithAdamW(self.drafter.named_parameters(), **shared)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: self.optim.factor(step, total))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the drafter alone: the target's heads come from the target."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("drafter.")}
        checkpoint["run"] = self.meta

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint["run"]["target"] != self.meta["target"]:
            raise ValueError(
                f"this run's last checkpoint was made on the target {checkpoint['run']['target']}, this one is "
                f"{self.meta['target']}: remove the run's directory to start again"
            )
        heads = {f"target_heads.{k}": v for k, v in self.target_heads.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **heads}
