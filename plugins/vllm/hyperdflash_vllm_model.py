"""The model class that hyperdflash_vllm registers; only vLLM imports it.

Written from vLLM's source and not run here: `python -m src.check_engine` says whether your version gives the residual.
"""

from hyperdflash_vllm import with_residual

try:
    from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM
except ImportError:  # before the models moved
    from vllm.model_executor.models.deepseek_v4 import DeepseekV4ForCausalLM


class DeepseekV4WithResidual(DeepseekV4ForCausalLM):
    """Outside the compiled part of the model; the buffer keeps its address, so CUDA graphs replay it too."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return with_residual(output, self.get_mtp_target_hidden_states(), self.config.hc_mult)
