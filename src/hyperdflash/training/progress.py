"""One bar over all steps of a run: rate, ETA, loss, learning rate and the last validation tau."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm


class StepBar(TQDMProgressBar):
    """Lightning's bar, over the run's steps in place of an epoch's batches, so that a resumed run's ETA is right."""

    def init_train_tqdm(self) -> tqdm:
        trainer = self.trainer
        return tqdm(
            total=int(trainer.estimated_stepping_batches),
            initial=trainer.global_step,
            desc="train",
            unit="step",
            mininterval=2,
            dynamic_ncols=True,
            disable=self.is_disabled,
        )

    def init_validation_tqdm(self) -> tqdm:
        return tqdm(disable=True)

    def on_train_epoch_start(self, trainer: L.Trainer, *_) -> None:
        """The run is one epoch: `on_train_start` has made the bar."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # reading a metric waits for the device
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)

    def on_exception(self, trainer: L.Trainer, pl_module, exception: BaseException) -> None:
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()

    def get_metrics(self, trainer: L.Trainer, pl_module) -> dict[str, str]:
        metrics = trainer.callback_metrics
        shown = {"loss": "train/loss", "tau": "val/tau"}
        values = {key: f"{float(metrics[name]):.3f}" for key, name in shown.items() if name in metrics}
        return values | {"lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}"}
