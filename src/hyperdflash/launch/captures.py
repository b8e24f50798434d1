"""The capture processes of one training (``cache=stream cache.captures=N``), which do the work of `python -m src.capture`. The
process that starts the ranks also starts and watches them, and they end with the training, however that ends. When one fails,
the run ends, and its own command resumes it; a failed request to a server was repeated before (``target.attempts``)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from hyperdflash.launch.child import end_child, how_it_ended, start_child, take_job

MODULE = "hyperdflash.launch.captures"
FINISH_S = 10.0  # time in which they finish the current shard
POLL_S = 0.1


class Captures:
    """Runs ``count`` capture processes during a block."""

    def __init__(self, run: Path, count: int):
        self.run, self.logs = run, [run / "captures" / f"{number}.log" for number in range(count)]
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        if self.logs:
            folder = self.logs[0].parent
            folder.mkdir(exist_ok=True)
            print(f"starting {len(self.logs)} capture process(es), which write to {folder}", flush=True)
        try:
            for log in self.logs:
                self._processes.append(start_child(MODULE, self.run, log, os.environ))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_S)
        for process in self._processes:
            end_child(process)

    def failure(self) -> str | None:
        """Returns a sentence about the first one that has ended, or None: a healthy one does not end by itself."""
        for number, (process, log) in enumerate(zip(self._processes, self.logs, strict=True)):
            if (code := process.poll()) is not None:
                what = f"capture process {number} of {len(self.logs)} {how_it_ended(code)}: {last_line(log)}"
                return f"{what}; more in {log}, and the same command goes on from the last checkpoint"
        return None


def last_line(log: Path) -> str:
    """Returns the last line that is not empty; each update of a progress bar counts as a line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return lines[-1] if lines else "it said nothing"


def main(run: Path) -> None:
    config = take_job(run)
    # the exit stores the shard that is being written and releases leases
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from hyperdflash.preparing.dataset import capture_states

    capture_states(config, stay=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
