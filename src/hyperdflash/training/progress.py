"""One bar over all steps of a run, with rate, ETA, loss and the last validation tau."""

from __future__ import annotations

import lightning as L
from tqdm import tqdm


class StepBar(L.Callback):
    """Lightning's own bar restarts every epoch, so its ETA is never the run's."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar = tqdm(
            total=int(trainer.estimated_stepping_batches),
            initial=trainer.global_step,
            desc="train",
            unit="step",
            mininterval=2,
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # reading a metric waits for the device
            metrics = trainer.callback_metrics
            shown = {name.split("/")[-1]: f"{float(metrics[name]):.3f}" for name in ("loss", "val/tau") if name in metrics}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer, module) -> None:
        self.bar.close()

    def on_exception(self, trainer, module, exception) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
