"""Every file of these groups instantiates and uses each of its keys (unknown ones are refused by the constructor)."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hyperdflash.identity import CONF as CONF_PATH  # and the resolvers that options use

CONF = Path(CONF_PATH)
GROUPS = ("conditioning", "reducer", "inputs", "lead", "drafter", "head", "kl", "loss", "blocks")
FILES = [path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_instantiates(path):
    group = path.parent.name
    config = OmegaConf.create({"target": {"path": str(CONF.parent / "assets" / "tiny")}, group: OmegaConf.load(path)})[group]
    made = instantiate(config)
    for key, value in config.items():
        if key != "_target_":
            got = getattr(made, key)
            assert (list(got) if isinstance(got, tuple) else got) == value
    with pytest.raises(Exception, match="unknown_key"):
        instantiate(config, unknown_key=1)


def test_paper_settings_are_the_papers():
    kl = instantiate(OmegaConf.load(CONF / "kl" / "paper.yaml"))
    assert 0.1 <= kl.alpha <= 0.2 and kl.positions == 2 and kl.teacher == "mean_pool"
    assert instantiate(OmegaConf.load(CONF / "drafter" / "paper.yaml")).num_slots == 6
