"""validation.json of a run: what every validation prompt accepted at the best checkpoint, for paired comparisons of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import torch.distributed as dist

from src.contracts import TargetStates
from src.decode.metrics import document_counts
from src.lit.record import write_json


class ValidationRecord(L.Callback):
    """Writes ``run``/validation.json at every validation whose tau is the best so far:

    {"tau", "step", "prompts": [{"id", "domain", "emitted", "accepted", "rounds", "survived" [S], "reached" [S]}, ...]}

    A resumed run goes on from the file.
    """

    def __init__(self, run: Path):
        self.path = Path(run) / "validation.json"
        self._prompts: dict[str, dict] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        goes_on = trainer.ckpt_path is not None and self.path.exists()
        self.best_tau = json.loads(self.path.read_text())["tau"] if goes_on else -math.inf

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._prompts = {}

    def on_validation_batch_end(self, trainer, module, outputs: dict, batch: TargetStates, batch_idx, dataloader_idx=0) -> None:
        counts = document_counts(outputs["rounds"], len(batch.ids))
        for row, (name, domain) in enumerate(zip(batch.ids, batch.domains, strict=True)):
            if not batch.loss_mask[row].any():
                continue  # what a rank without a document replays
            sums = {field: values[row].tolist() for field, values in counts._asdict().items()}
            self._prompts[name] = {"id": name, "domain": domain, **sums}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        prompts = self._prompts
        if trainer.world_size > 1:
            parts: list[dict] = [{}] * trainer.world_size
            dist.all_gather_object(parts, prompts)
            prompts = {name: row for part in parts for name, row in part.items()}
        tau = float(trainer.callback_metrics["val/tau"])
        if trainer.is_global_zero and tau > self.best_tau:
            record = {"tau": tau, "step": trainer.global_step, "prompts": [prompts[name] for name in sorted(prompts)]}
            write_json(self.path, record)
        self.best_tau = max(tau, self.best_tau)
