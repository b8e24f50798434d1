"""Do training, replay and decoding give a drafter the same logits on the same prompts, and the same tau?

python -m src.parity                             every method that `python -m src.evaluate` measures
python -m src.parity run=runs/train/<run>        one trained drafter

Exit code 1 and one sentence where they do not: what differs first, in which path, and where.
"""

from __future__ import annotations

from omegaconf import DictConfig

from hyperdflash.cli import entry_point


@entry_point("parity")
def main(config: DictConfig) -> None:
    from hyperdflash.checks.parity_job import check_parity

    check_parity(config)


if __name__ == "__main__":
    main()
