"""Measure a target: model_card.md and model_card.json beside its weights, and the bars on the terminal.

python -m src.card
python -m src.card target=deep
python -m src.card benchmarks.per_domain=10 text_bytes=20000 out=runs/quick-card
"""

from __future__ import annotations

from omegaconf import DictConfig

from hyperdflash.cli import entry_point


@entry_point("card")
def main(config: DictConfig) -> None:
    from tiny_target.card.measure import make_card

    make_card(config)


if __name__ == "__main__":
    main()
