"""python -m src.lit.rank RUN: one rank of a training, as src/lit/launcher.py starts it."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from src.entry import quiet_libraries
from src.lit.record import write_json


def main(run: Path) -> None:
    ranks, rank = run / "ranks", os.environ["RANK"]
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    quiet_libraries()
    config = OmegaConf.load(ranks / "config.yaml")
    if (ranks / "hydra.yaml").exists():
        HydraConfig.instance().cfg = OmegaConf.load(ranks / "hydra.yaml")
    try:
        from src.lit.run import train

        train(config)
    except Exception as error:
        traceback.print_exc(file=None if rank != "0" or os.environ.get("HYDRA_FULL_ERROR") else (ranks / "0.log").open("w"))
        text = str(error).splitlines()[0] if str(error) else ""
        write_json(ranks / f"{rank}.json", {"time_s": time.time(), "error": text or type(error).__name__})
        sys.stdout.flush()
        os._exit(1)  # whatever waits for other ranks must not keep this one


def _end_with_the_launcher() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
