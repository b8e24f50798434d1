"""The target class that hyperdflash_vllm registers; only vLLM imports it.

`python -m src.check_engine` tells whether your version of vLLM returns the residual.
"""

import torch
from hyperdflash_vllm import with_residual

try:
    from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM
except ImportError:  # older versions
    from vllm.model_executor.models.deepseek_v4 import DeepseekV4ForCausalLM


class DeepseekV4WithResidual(DeepseekV4ForCausalLM):
    """Wraps the compiled part of the model; the buffer's address is constant, so CUDA graphs can replay it."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # V4's layers read their own configuration; a draft's layers would take this window, 128 tokens, for theirs.
        vllm_config.cache_config.sliding_window = None
        if self.get_mtp_target_hidden_states() is None:  # vLLM allocates it for drafters, not for extract_hidden_states
            rows, width = vllm_config.scheduler_config.max_num_batched_tokens, self.config.hc_mult * self.config.hidden_size
            dtype, device = vllm_config.model_config.dtype, self.model.hc_head_fn.device
            self.model._mtp_hidden_buffer = torch.empty(rows, width, dtype=dtype, device=device)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return with_residual(output, self.get_mtp_target_hidden_states(), self.config.hc_mult)
