"""Sizes of the draft model, checked before any target is loaded."""

from dataclasses import dataclass

import torch

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.drafter import Drafter
from hyperdflash.drafting.mtp_chain import MTPChain, new_chain
from hyperdflash.settings import boolean, natural_int, positive_int, positive_number


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Sizes are explicit: a drafter with DeepSeek-V4's own 64 heads of width 512 would have two billion parameters.

    ``hidden_size`` null is the target's width; ``block_size`` K = 1 anchor + S draft slots;
    ``context_window`` W limits a block to the W newest states before its anchor, null shows it all of them;
    ``rms_norm_eps`` applies to every norm of the drafter; ``initializer_range`` is the standard deviation of new weights;
    ``convolution`` is the number of taps of DFlash 2's convolutions around attention and MLP, 0 without them;
    ``gradient_checkpointing`` recomputes each layer's activations in the backward pass; ``compile`` compiles the layers.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    block_size: int
    hidden_size: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    context_window: int | None = None
    convolution: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "block_size"):
            positive_int(f"drafter.{name}", getattr(self, name))
        for name in ("hidden_size", "context_window"):
            if getattr(self, name) is not None:
                positive_int(f"drafter.{name}", getattr(self, name))
        natural_int("drafter.convolution", self.convolution)
        for name in ("gradient_checkpointing", "compile"):
            boolean(f"drafter.{name}", getattr(self, name))
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            positive_number(f"drafter.{name}", getattr(self, name))
        if self.block_size < 2:
            raise ValueError("drafter.block_size must be at least 2 (the anchor and one draft slot), got 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"drafter.num_heads must be a multiple of drafter.num_kv_heads ({self.num_kv_heads}), got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"drafter.head_dim must be even (RoPE turns pairs), got {self.head_dim}")

    reads_conditioning = True  # conditioning and reducer decide what the drafter sees

    def layer_ids(self, conditioning: Conditioning) -> tuple[int, ...]:
        return tuple(conditioning.layer_ids)

    def build(self, parts: DrafterParts, generator: torch.Generator | None = None) -> Drafter | MTPChain:
        """Returns a new drafter, or the MTP chain if a lead drafts every slot: fp32 on the CPU, with weights drawn from
        ``generator`` alone, never from the global state.

        With heads on the meta device the result has shapes but no memory, which checks a configuration in milliseconds:
        ``with torch.device("meta"): heads = TargetHeads(config)``.
        """
        if parts.lead is not None:
            parts.lead.check(self.num_slots)
            if parts.lead.steps == self.num_slots:
                return new_chain(parts, self.num_slots, generator, trainable=parts.lead.trainable)
        with torch.device("meta"):
            module = Drafter(self, parts)
        if not parts.on_meta:
            if generator is None:
                raise ValueError("a new drafter needs a torch.Generator to draw its first weights from")
            module = module.to_empty(device="cpu")
            module.reset_parameters(parts.heads, generator)
        if parts.lead is not None:
            module.lead = MTPChain(parts.mtp(), parts.lead.steps, trainable=parts.lead.trainable)
        return module

    @property
    def num_slots(self) -> int:
        return self.block_size - 1
