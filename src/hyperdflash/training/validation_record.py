"""Writes validation.json: counts per validation prompt at the best checkpoint, for paired comparisons of runs."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.record import write_json


class ValidationRecord(L.Callback):
    """Collects the counts of every prompt of a validation; ``write`` saves them as ``run``/validation.json:

    {"tau", "step", "prompts": [{"id", "domain", "emitted", "accepted", "rounds", "survived" [S], "reached" [S]}, ...]}

    Checkpoints calls ``write`` whenever it saves best.ckpt, so both are of the same step.
    """

    def __init__(self, run: Path):
        self.path = Path(run) / "validation.json"
        self._prompts: dict[str, dict] = {}

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._prompts = {}

    def on_validation_batch_end(self, trainer, module, outputs: dict, batch: TargetStates, batch_idx, dataloader_idx=0) -> None:
        counts = document_counts(outputs["rounds"], len(batch.ids))
        for row, (name, domain) in enumerate(zip(batch.ids, batch.domains, strict=True)):
            if not batch.loss_mask[row].any():
                continue  # a rank without a document replays an unsupervised text
            sums = {field: values[row].tolist() for field, values in counts._asdict().items()}
            self._prompts[name] = {"id": name, "domain": domain, **sums}

    def write(self, trainer: L.Trainer, tau: float) -> None:
        """Writes the prompts of all ranks in rank 0; every rank must call it."""
        prompts = self._prompts
        if trainer.world_size > 1:
            prompts = {name: row for part in _gathered(prompts, trainer) for name, row in part.items()}
        if trainer.is_global_zero:
            record = {"tau": tau, "step": trainer.global_step, "prompts": [prompts[name] for name in sorted(prompts)]}
            write_json(self.path, record)


def _gathered(part: dict, trainer: L.Trainer) -> list[dict]:
    """Gathers ``part`` from every rank, as JSON in bytes."""
    device = trainer.strategy.root_device
    text = torch.tensor(list(json.dumps(part).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(trainer.world_size)]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device))
    longest = int(max(sizes))
    texts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(texts, pad(text, (0, longest - len(text))))
    return [json.loads(bytes(one[: int(size)].tolist())) for one, size in zip(texts, sizes, strict=True)]
