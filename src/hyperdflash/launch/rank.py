"""python -m hyperdflash.launch.rank RUN: one rank of a training; launch/launcher.py starts it."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from hyperdflash.launch.child import take_job
from hyperdflash.record import write_json


def main(run: Path) -> None:
    ranks, rank = run / "ranks", os.environ["RANK"]
    config = take_job(run)
    try:
        from hyperdflash.training.job import train

        train(config)
    except Exception as error:
        traceback.print_exc(file=None if rank != "0" or os.environ.get("HYDRA_FULL_ERROR") else (ranks / "0.log").open("w"))
        text = str(error).splitlines()[0] if str(error) else ""
        write_json(ranks / f"{rank}.json", {"time_s": time.time(), "error": text or type(error).__name__})
        sys.stdout.flush()
        os._exit(1)  # a thread that waits for other ranks must not keep this process alive


if __name__ == "__main__":
    main(Path(sys.argv[1]))
