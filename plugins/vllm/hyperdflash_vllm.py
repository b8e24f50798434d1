"""vLLM plug-in: auxiliary "layers" that are the paths of DeepSeek-V4's residual before hc_head.

vLLM's own auxiliary states of V4 are the mean over the paths, [T, D] per layer, from which no path can be recovered. Its MTP
block needs the whole residual, so every forward writes it to a buffer [tokens, M * D]. With
HYPERDFLASH_PRE_HC_HEAD=1 the model returns the M paths of that buffer in place of its M auxiliary layers:

    torch.stack(aux, dim=1)  ==  H                cat(aux, dim=-1)  ==  vec(H)                H [T, M, D]

so `extract_hidden_states` with any M layer ids (any) writes H as ``hidden_states`` [T, M, D].
The same switch registers the draft class of this project's exports, which reads those paths.
This module imports nothing of vLLM: strings name the classes, and vLLM loads them when it builds a model.
"""

import os

import torch

SWITCH = "HYPERDFLASH_PRE_HC_HEAD"
CLASSES = {  # architecture -> class
    "DeepseekV4ForCausalLM": "hyperdflash_vllm_model:DeepseekV4WithResidual",
    "DFlashHyperDraftModel": "hyperdflash_vllm_draft:HyperDFlashForCausalLM",
}


def register() -> None:
    """Registers target and draft class in every process of vLLM if the switch is set."""
    if os.environ.get(SWITCH) == "1":
        from vllm import ModelRegistry

        for architecture, place in CLASSES.items():
            ModelRegistry.register_model(architecture, place)


def residual_as_layers(buffer: torch.Tensor, num_tokens: int, num_paths: int, width: int) -> list[torch.Tensor]:
    """Returns M views [T, D] of the buffer [>= T, M * D]: path j has columns j * D to (j + 1) * D. Later rows are stale."""
    if buffer.ndim != 2 or buffer.shape[1] != num_paths * width or len(buffer) < num_tokens:
        raise RuntimeError(
            f"the residual's buffer is {list(buffer.shape)}, wanted at least [{num_tokens}, {num_paths} * {width}]: "
            "use another version of vLLM"
        )
    return list(buffer[:num_tokens].view(num_tokens, num_paths, width).unbind(1))


def with_residual(output, buffer: torch.Tensor | None, num_paths: int):
    """Replaces the auxiliary states in the output of the model's forward, ``(hidden [T, D], aux)``.

    Other outputs (no auxiliary layers, a pipeline stage that is not the last) pass through. RuntimeError where it cannot
    replace them, so that no other states leave silently.
    """
    if not isinstance(output, tuple):
        return output
    hidden, aux = output
    if buffer is None:
        raise RuntimeError(f"{SWITCH}=1, but this vLLM has no residual for its MTP block: use another version of vLLM")
    if len(aux) != num_paths:
        raise RuntimeError(
            f"{SWITCH}=1 needs as many eagle_aux_hidden_state_layer_ids as the model has paths: {num_paths}, got {len(aux)}"
        )
    if wrong := [list(layer.shape) for layer in aux if layer.shape != hidden.shape]:
        raise RuntimeError(f"an auxiliary layer is {wrong[0]} where the hidden states are {list(hidden.shape)}")
    return hidden, residual_as_layers(buffer, hidden.shape[0], num_paths, hidden.shape[1])
