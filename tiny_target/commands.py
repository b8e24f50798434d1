"""The commands that make and measure a tiny target; each imports its job when it runs."""

from __future__ import annotations

from omegaconf import DictConfig

from hyperdflash.cli import entry_point


@entry_point("pretrain")
def pretrain(config: DictConfig) -> None:
    from tiny_target.pretrain_job import pretrain_target

    pretrain_target(config)


@entry_point("card")
def card(config: DictConfig) -> None:
    from tiny_target.card.measure import make_card

    make_card(config)
