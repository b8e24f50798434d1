"""The draft class that hyperdflash_vllm registers, for parts that vLLM's own DFlash class lacks; only vLLM imports it.

vLLM's method dflash asks a drafter twice per round: `combine_hidden_states` for the context, [T, M * D] -> [T, D], and, after
the forward pass over anchor and masks, `compute_logits` for the K slots of every request. The gate stands in the first; in the
second a head reads the tokens that it has just drafted, slot by slot.
"""

import torch
from hyperdflash_heads import HcGate, build_head, chained_logits
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model


class HyperDFlashModel(DFlashQwen3Model):
    def __init__(self, *, vllm_config, start_layer_id: int = 0, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, start_layer_id=start_layer_id, prefix=prefix)
        width = self.config.hidden_size
        gate = getattr(self.config, "hyperdflash_config", None)
        if gate is not None:
            del self.fc
        self.reducer = None if gate is None else HcGate(width=width, **gate)
        self.head = build_head(self.config.hyperdflash["groups"]["head"], width, self.config.vocab_size)


class HyperDFlashForCausalLM(DFlashQwen3ForCausalLM):
    model_cls = HyperDFlashModel

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.num_slots = vllm_config.speculative_config.num_speculative_tokens

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.model.reducer is None:
            return super().combine_hidden_states(hidden_states)
        return self.model.reducer(hidden_states)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None):
        self.query_ids = input_ids  # of every request the anchor and K masks
        return super().forward(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B * K, D] -> [B * K, V], a request's slots one after another."""
        if self.model.head is None:
            return super().compute_logits(hidden_states)
        states = hidden_states.unflatten(0, (-1, self.num_slots))
        anchors = self.query_ids[: len(states) * (self.num_slots + 1) : self.num_slots + 1]
        logits = chained_logits(self.model.head, states, anchors, super().compute_logits, self.model.embed_input_ids)
        return logits.flatten(0, 1)
