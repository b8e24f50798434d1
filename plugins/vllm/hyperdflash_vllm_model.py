"""The model class that hyperdflash_vllm registers; only vLLM imports it.

It follows vLLM's source and has no test run: `python -m src.check_engine` tells whether your version returns the residual.
"""

from hyperdflash_vllm import with_residual

try:
    from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM
except ImportError:  # older versions
    from vllm.model_executor.models.deepseek_v4 import DeepseekV4ForCausalLM


class DeepseekV4WithResidual(DeepseekV4ForCausalLM):
    """Wraps the compiled part of the model; the buffer's address is constant, so CUDA graphs can replay it."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return with_residual(output, self.get_mtp_target_hidden_states(), self.config.hc_mult)
