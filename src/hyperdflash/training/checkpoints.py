"""Checkpoints of a running training: when it writes them, and which one a resumed run starts from.

    checkpoints/step00000120.ckpt    all state of the run after 120 steps, from which it continues bit for bit; KEEP of them
    checkpoints/best.ckpt            the drafter alone, at the best validation tau so far
    validation.json                  counts per prompt of that validation, for paired comparisons of runs:
        {"tau", "step", "prompts": [{"id", "domain", "emitted", "accepted", "rounds", "survived" [S], "reached" [S]}, ...]}

A file appears under its name only when complete. A checkpoint is a zip archive with a checksum per entry, so damage is found
without loading it. Every use of Lightning's internals stands in this file.
"""

import math
import re
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.files import reading, whole_file
from hyperdflash.record import write_json

KEEP = 2
BEST = "best.ckpt"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME = {  # what a resumed run shares with the run that wrote the checkpoint
    "target": "the target",
    "engine": "the engine (target.engine; none is the target in process)",
    "data": "the data (documents, cache.documents_per_shard and the cache's key, as a digest)",
    "steps": "this number of steps:",
}


class Stopped(SystemExit):
    """Ends a run that got signal ``signum`` and has saved a checkpoint."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.code - 128).name}"


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sends SIGTERM and SIGINT to ``handler`` during the block, in the main thread alone: Python allows no others."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS} if in_main else {}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's reader and writer, but files appear whole."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        with whole_file(Path(path), sync=True) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args, **options) -> dict:
        with reading(Path(path), "remove it, and the same command goes on from the one before"):
            found = super().load_checkpoint(path, *args, **options)
            return found | {"run": found["run"]}


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step{step:08d}.ckpt"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step"))


def saved(directory: Path) -> list[Path]:
    """Returns the checkpoints that `checkpoint_path` names, first step first; a copy under another name is none of them."""
    return sorted(
        path for path in directory.glob("step*.ckpt") if re.fullmatch(r"step\d{8,}\.ckpt", path.name) and path.is_file()
    )


def damage(path: Path) -> str | None:
    """Returns what is wrong with the bytes of a checkpoint, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{wrong} has another checksum" if (wrong := archive.testzip()) else None
    except Exception as error:  # a damaged archive fails in many ways
        return str(error) or type(error).__name__


def read_checkpoint(path: Path) -> dict:
    """Returns the content of a run's checkpoint, tensors on the CPU; ValueError unless every byte of it is what was written."""
    with reading(path, f"fetch it again, or remove {path.parents[1]} and train the run again"):
        if wrong := damage(path):
            raise ValueError(wrong)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: found[name] for name in ("run", "state_dict")}


def newest_checkpoint(directory: Path) -> Path | None:
    """Returns the last undamaged checkpoint of a run; prints and renames each damaged one after it."""
    for path in reversed(saved(directory)):
        wrong = damage(path)
        if wrong is None:
            return path
        print(f"{path} is damaged ({wrong}): using the one before it", flush=True)
        path.replace(path.with_suffix(".damaged"))
    return None


def check_same_run(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Raises ValueError when ``found``, the run that wrote checkpoint ``path``, is not the run ``wanted``."""
    found = {"engine": wanted["engine"], **found}  # a checkpoint without it: the data's digest covers the engine
    for name, what in SAME.items():
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{path} is of a run with {what} {found.get(name)}, this one has {wanted[name]}: restore what has changed, or "
                f"remove {path.parent} and run the command again to start anew"
            )


class Checkpoints(L.Callback):
    """Saves every ``every_steps`` steps and ``every_s`` seconds (None: never), at the best tau, and on SIGTERM or SIGINT. It
    saves before a step, when everything of the previous step is done, validation included. All ranks save and stop at the same
    step: in every step they exchange requests on the CPU, while the step computes. ``command`` continues a stopped run."""

    def __init__(self, run: Path, *, every_steps: int | None, every_s: float | None, command: str):
        self.run, self.directory = run, run / "checkpoints"
        self.every_steps, self.every_s, self.command = every_steps, every_s, command
        self.best_tau, self.validation_s = -math.inf, 0.0
        self._signal = 0
        self._requests: tuple[dist.Work, torch.Tensor] | None = None
        self._handlers = ExitStack()
        self._prompts: dict[str, dict] = {}

    def state_dict(self) -> dict:
        return {"best_tau": self.best_tau}

    def load_state_dict(self, state: dict) -> None:
        self.best_tau = state["best_tau"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step
        # Lightning's own agreement about SIGTERM waits for the device in every step; `_agreed` takes its place.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if trainer.world_size > 1 else None
        self._handlers.enter_context(handled_by(self._on_signal))

    def _on_signal(self, signum: int, frame) -> None:
        if self._signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signal = signum

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        step = trainer.global_step
        save, signum = self._agreed(step)
        if (save or signum) and step > self._saved_step:
            self._save(trainer, module)
        if signum:
            if trainer.is_global_zero:
                saved = f"saved {module.last_checkpoint}" if module.last_checkpoint else "nothing to save yet"
                print(f"\n{Stopped(signum)} after step {step}, {saved}; to go on: {self.command}", flush=True)
            raise Stopped(signum)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step == trainer.estimated_stepping_batches:
            trainer.should_stop = True  # validates after the last step, whatever the interval

    def _agreed(self, step: int) -> tuple[bool, int]:
        """Returns (whether to save, the signal that any rank got); several ranks act on their requests of the previous step."""
        due_s = self.every_s is not None and time.monotonic() - self._saved_s >= self.every_s
        wanted = torch.tensor([int(due_s), self._signal])
        if self._group is not None:
            before = self._requests
            self._requests = (dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._group, async_op=True), wanted)
            if before is None:
                return False, 0
            before[0].wait()
            wanted = before[1]
            if step - 1 <= self._saved_step:
                wanted[0] = 0  # requested before the last save, which fulfilled it
        due = self.every_steps is not None and step % self.every_steps == 0
        return bool(wanted[0]) or due, int(wanted[1])

    def _save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.check_finite()
        path = checkpoint_path(self.directory, trainer.global_step)
        trainer.save_checkpoint(path)
        module.last_checkpoint = path
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            for old in saved(self.directory)[:-KEEP]:
                old.unlink()

    def on_validation_start(self, trainer, module) -> None:
        self._validation_began, self._prompts = time.monotonic(), {}

    def on_validation_batch_end(self, trainer, module, outputs: dict, batch: TargetStates, batch_idx, dataloader_idx=0) -> None:
        counts = document_counts(outputs["rounds"], len(batch.ids))
        for row, (name, domain) in enumerate(zip(batch.ids, batch.domains, strict=True)):
            if batch.loss_mask[row].any():  # a rank without a document replays an unsupervised text
                sums = {field: values[row].tolist() for field, values in vars(counts).items()}
                self._prompts[name] = {"id": name, "domain": domain, **sums}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validation_s += time.monotonic() - self._validation_began
        tau = float(trainer.callback_metrics["val/tau"])
        if tau <= self.best_tau:
            return
        module.check_finite()
        self.best_tau = tau
        trainer.save_checkpoint(self.directory / BEST, weights_only=True)
        found = [self._prompts]
        if trainer.world_size > 1:
            found = [{}] * trainer.world_size
            dist.all_gather_object(found, self._prompts)
        if trainer.is_global_zero:
            prompts = {name: row for part in found for name, row in part.items()}
            record = {"tau": tau, "step": trainer.global_step, "prompts": [prompts[name] for name in sorted(prompts)]}
            write_json(self.run / "validation.json", record)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._requests is not None:
            self._requests[0].wait()
        module.check_finite()
        if trainer.global_step > self._saved_step:
            self._save(trainer, module)
        self._handlers.close()

    def on_exception(self, trainer, module, exception) -> None:
        self._handlers.close()
