"""A DFlash drafter of this project's export to=dflash whose reducer is ``hc_gate``: docs/serving.md."""

from __future__ import annotations

import torch
from hyperdflash_heads import HcGate
from sglang.srt.models.dflash import DFlashDraftModel


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


EntryClass = DFlashHyperDraftModel
