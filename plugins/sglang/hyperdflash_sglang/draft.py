"""A DFlash drafter of this project's export to=dflash whose reducer is ``hc_gate``: docs/serving.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sglang.srt.models.dflash import DFlashDraftModel
from torch import nn


class HcGate(nn.Module):
    """``hc_gate``, [N, M * D] -> [N, D] in fp32: the gate reads the raw residual, the sum takes the normed paths."""

    def __init__(self, width: int, num_paths: int, norm_eps: float, hc_eps: float, path_norm: bool):
        super().__init__()
        self.norm_eps, self.hc_eps = norm_eps, hc_eps
        self.hc_fn, self.hc_base, self.hc_scale = parameter(num_paths, num_paths * width), parameter(num_paths), parameter(1)
        self.path_norm = nn.ParameterDict({"weight": parameter(num_paths, width)}) if path_norm else None

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        flat = residual.float()
        unit = flat * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + self.norm_eps)
        alpha = torch.sigmoid(F.linear(unit, self.hc_fn) * self.hc_scale + self.hc_base) + self.hc_eps  # [N, M]
        paths = flat.unflatten(-1, (alpha.shape[-1], -1))
        if self.path_norm is not None:
            paths = paths * torch.rsqrt(paths.square().mean(dim=-1, keepdim=True) + self.norm_eps) * self.path_norm["weight"]
        return (alpha[..., None] * paths).sum(dim=-2).to(residual.dtype)


class DFlashHyperDraftModel(DFlashDraftModel):
    """SGLang's loader passes over tensors that it does not know, so this class counts what it got."""

    def __init__(self, config, quant_config=None, prefix: str = "") -> None:
        super().__init__(config=config, quant_config=quant_config, prefix=prefix)
        head = config.hyperdflash["groups"]["head"]["option"]
        gate = getattr(config, "hyperdflash_config", None)
        if head != "lm_head" or gate is None:
            raise ValueError(
                f"this class serves reducer=hc_gate with the target's LM head alone, and the export has head={head}"
                f"{'' if gate else ' and no gate'}: serve it in vLLM with plugins/vllm"
            )
        del self.fc
        self.reducer = HcGate(width=config.hidden_size, **gate)

    @torch.no_grad()
    def project_target_hidden(self, target_hidden: torch.Tensor) -> torch.Tensor:
        """[N, M * D] -> [N, D]"""
        if target_hidden.shape[-1] != self.reducer.hc_fn.shape[-1]:
            raise ValueError(
                f"the target gives {target_hidden.shape[-1]} numbers per token, wanted {self.reducer.hc_fn.shape[-1]}, "
                "its residual before hc_head: start SGLang with SGLANG_EXTERNAL_MODEL_PACKAGE=hyperdflash_sglang"
            )
        return self.hidden_norm(self.reducer(target_hidden))

    def load_weights(self, weights):
        weights = dict(weights)
        if missing := {f"reducer.{name}" for name, _ in self.reducer.named_parameters()} - weights.keys():
            raise ValueError(f"the export lacks {min(missing)}: export the run again with to=dflash")
        return super().load_weights(weights.items())


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)


EntryClass = DFlashHyperDraftModel
