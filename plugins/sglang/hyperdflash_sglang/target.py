"""DeepSeek-V4 as a target of SGLang's method DFLASH, which asks the model for `set_dflash_layers_to_capture`.

SGLang's model returns ``(hidden, residual)``, and with captured layers ``((hidden, residual), aux)``. Here aux is the residual.
"""

from __future__ import annotations

from sglang.srt.models import deepseek_v4


class DeepseekV4ForCausalLM(deepseek_v4.DeepseekV4ForCausalLM):
    """Bears SGLang's name for the architecture, by which the registry finds it in place of SGLang's own."""

    def set_dflash_layers_to_capture(self, layer_ids: list[int]) -> None:
        """Returns the M paths in the place of as many layers; which ids are given does not matter."""
        if not self.pp_group.is_last_rank or self.capture_aux_hidden_states:
            return
        if len(layer_ids) != self.config.hc_mult:
            raise ValueError(
                f"dflash_config.target_layer_ids has {len(layer_ids)} layers, and the residual {self.config.hc_mult} paths: "
                "serve an export with conditioning=pre_hc_head"
            )
        if getattr(self.model, "late_layer_start", None) is not None:
            raise ValueError("this target computes its late layers for a part of the rows: rows of its residual are missing")
        self.capture_aux_hidden_states = True
        forward = self.model.forward
        self.model.forward = lambda *args, **kwargs: with_residual(forward(*args, **kwargs))


def with_residual(output):
    """``(hidden [N, D], residual [N, M * D])`` -> ``((hidden, residual), residual)``."""
    _, residual = output
    return output, residual


EntryClass = DeepseekV4ForCausalLM
