"""From a checkpoint in DeepSeek's layout to a trained drafter, by the configuration of the real target as it stands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from official_checkpoint import miniature, write_official

from hyperdflash.targets.load import fingerprint, load_heads
from hyperdflash.training.job import train


@pytest.fixture(scope="module")
def official(mini_target, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("official")
    write_official(directory, *miniature(vocab_size=320))
    for path in mini_target.glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


def test_answers_states_and_a_drafter(official, mini_overrides, compose_config, monkeypatch):
    """``target=deepseek_v4_flash``: bf16, grouped experts, spread over the devices there are.

    Once the states are cached, the shards with the heads are enough.
    """
    monkeypatch.setenv("DEEPSEEK_V4_FLASH", str(official))
    overrides = [override for override in mini_overrides if not override.startswith("target.")]
    overrides += ["target=deepseek_v4_flash", "target.mask_token_id=null", "trainer.max_epochs=1"]
    config = compose_config("train", overrides)
    assert (config.target.device_map, config.target.experts, config.target.dtype) == ("even", "grouped_mm", "bf16")
    result = train(config)
    assert result["val_tau"] >= 1 and result["steps"] > 0

    for shard in official.glob("model-0000[234]-*"):
        shard.rename(shard.with_suffix(".away"))  # the layers; the first has the embedding, the last the heads and MTP
    try:
        again = train(compose_config("train", [*overrides, "reducer=fc"]))
    finally:
        for shard in official.glob("*.away"):
            shard.rename(shard.with_suffix(".safetensors"))
    assert again["target"] == result["target"] == fingerprint(load_heads(official))
