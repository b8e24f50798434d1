"""Do training, replay and decoding give a drafter the same logits on the same prompts, and the same tau?

python -m src.parity                             every method that `python -m src.evaluate` measures
python -m src.parity run=runs/train/<run>        one trained drafter

Exit code 1 and one sentence where they do not: what differs first, in which path, and where.
"""

from __future__ import annotations

from hyperdflash.commands import parity as main

if __name__ == "__main__":
    main()
