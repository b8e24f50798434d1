"""Lightning's progress bar, with a bounded refresh so that a log file stays readable."""

from __future__ import annotations

import sys

from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Rate and ETA of an epoch; refreshes rarely where nobody watches a terminal."""

    def __init__(self):
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)

    def get_metrics(self, trainer, module) -> dict:
        return {k: v for k, v in super().get_metrics(trainer, module).items() if k != "v_num"}
