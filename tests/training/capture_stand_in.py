"""python -m tests.training.capture_stand_in RUN: what RUN/captures/script says, in the place of a capture process."""

import sys
from pathlib import Path

from hyperdflash.launch.child import take_job

run = Path(sys.argv[1])
config = take_job(run)
exec((run / "captures" / "script").read_text())
