"""The capture processes of one training (``cache=stream cache.captures=N``), started and watched by the process that starts its
ranks, so that a target that serves and a training that lives on its states are one command.

    python -m hyperdflash.launch.captures RUN   `python -m src.capture` as the run has it; writes to RUN/captures/<n>.log

One that fails ends the run, which its own command resumes: what can be tried again (a request to a server) was tried again
before (``target.attempts``). They end with the training, however that ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from omegaconf import DictConfig

from hyperdflash.launch.child import end_child, how_it_ended, start_child, take_job

MODULE = "hyperdflash.launch.captures"
PUT_AWAY_S = 10.0  # what they have to finish the shard at hand
POLL_S = 0.1


def num_captures(config: DictConfig) -> int:
    """Capture processes that a training starts; other modes than stream have none."""
    return config.cache.get("captures", 0)


class Captures:
    """A context manager around the ranks' lives. ``gpus``: CUDA_VISIBLE_DEVICES of the captures, None for this process's."""

    def __init__(self, run: Path, count: int, gpus: str | None = None):
        self.count, self.folder = count, run / "captures"
        environment = {**os.environ, **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})}
        self._start = [(MODULE, run, self._log(number), environment) for number in range(count)]
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        if self.count:
            self.folder.mkdir(exist_ok=True)
            print(
                f"starting {self.count} capture process{'es' * (self.count > 1)}; the log of each is in {self.folder}",
                flush=True,
            )
        try:
            for start in self._start:
                self._processes.append(start_child(*start))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + PUT_AWAY_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_S)
        for process in self._processes:
            end_child(process)

    def failure(self) -> str | None:
        """Of the first one that is no longer there, in one sentence: none ends by itself."""
        for number, process in enumerate(self._processes):
            if (code := process.poll()) is not None:
                log = self._log(number)
                return (
                    f"capture process {number} of {self.count} {how_it_ended(code)}: {last_line(log)}; more in {log}, and the "
                    "same command goes on from the last checkpoint"
                )
        return None

    def _log(self, number: int) -> Path:
        return self.folder / f"{number}.log"


def last_line(log: Path) -> str:
    """The last one that is not empty; a progress bar's states are lines too."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return lines[-1] if lines else "it said nothing"


def split_gpus(capture_gpus: list[int | str] | None, wanted: int) -> tuple[str | None, str | None]:
    """CUDA_VISIBLE_DEVICES of the captures and of the ranks, which get the others; (None, None): they see what we see.

    ``capture_gpus`` as CUDA_VISIBLE_DEVICES names them; ``wanted`` ranks on this machine. ValueError where they do not add up.
    """
    if capture_gpus is None:
        return None, None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    named, there = [str(gpu) for gpu in capture_gpus], [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    if absent := [gpu for gpu in named if gpu not in there]:
        raise ValueError(f"cache.capture_gpus names GPU {absent[0]}, and there are {', '.join(there) or 'none'}")
    rest = [gpu for gpu in there if gpu not in named]
    if len(rest) < wanted:
        fewer = "name fewer of them" if len(named) > 1 else "leave cache.capture_gpus out"
        advice = f"trainer.devices={len(rest)}" if rest else fewer
        raise ValueError(
            f"cache.capture_gpus=[{','.join(named)}] leaves {len(rest)} of {len(there)} GPUs and the training wants {wanted}: "
            f"{advice}"
        )
    return ",".join(named), ",".join(rest)


def main(run: Path) -> None:
    config = take_job(run)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leases go, the shard being written is stored
    from hyperdflash.preparing.dataset import capture_states

    capture_states(config, stay=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
