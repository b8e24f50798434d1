"""Where an evaluation by replay computes."""

import pytest
import torch

from hyperdflash.evaluation.evaluation import device_of


def test_the_device_is_the_accelerator_where_there_is_one(monkeypatch, compose_config):
    assert compose_config("evaluate").device == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device here: run with device=cpu"):
        device_of("cuda")
    with pytest.raises(ValueError, match="device must be auto or cpu or cuda"):
        device_of("tpu")
