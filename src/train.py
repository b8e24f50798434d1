"""Train a drafter.

python -m src.train experiment=stage1
python -m src.train experiment=stage2 reducer=hc_gate kl.alpha=0.15
python -m src.train -m experiment=stage1 reducer=hc_gate,fc kl.alpha=0,0.15
python -m src.train -m experiment=stage1 reducer=hc_gate,fc kl.alpha=0,0.15 trainer=ddp_cpu trainer.devices=2
python -m src.train experiment=stage1 conditioning=layers reducer=fc kl=off        vanilla DFlash
python -m src.train experiment=stage1 drafter=mtp kl=off                           the native MTP block, fine-tuned
"""

from __future__ import annotations

from omegaconf import DictConfig

from hyperdflash.cli import entry_point


@entry_point("train")
def main(config: DictConfig) -> float:
    """The best validation tau, which a sweeper such as Optuna maximises."""
    from hyperdflash.training.job import train

    return train(config)["val_tau"]


if __name__ == "__main__":
    main()
