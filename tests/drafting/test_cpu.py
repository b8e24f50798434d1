import pytest
import torch

from hyperdflash.numerics import fast_fp32_products


def test_fp32_products_stay_fp32():
    torch.manual_seed(0)
    one, two = torch.randn(64, 300), torch.randn(300, 128)
    exact = one.double() @ two.double()
    with fast_fp32_products():
        error = (one @ two - exact).norm() / exact.norm()
    assert error < 1e-6  # bf16 arithmetic is wrong by 1e-3


def test_amx_would_round_to_bf16_and_is_left_alone(monkeypatch):
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_amx=has_amx: {"amx_bf16": has_amx})
        with fast_fp32_products():
            assert (setting.fp32_precision == before) == has_amx
        assert setting.fp32_precision == before


def test_the_setting_is_restored_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), fast_fp32_products():
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
