"""Runs the DFlash training step of the speculators library (PyPI, 0.9.0) in its own process, and answers as own_step.py does.

.venv-peers/bin/python runs it as a plain file: it imports nothing of this project.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import os
import resource
import sys
import time
import warnings

import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.dflash import core as dflash_core
from transformers import Qwen3Config

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSSES = {"own": "ce", "kl": "kl_div"}
GAMMA = 4.0  # the library's default, and this project's: w_k = exp(-(k - 1) / gamma)


class PeerStep:
    """Builds a case once, with the same document as the other side, and runs many steps."""

    def __init__(self, request: dict):
        torch.set_num_threads(request["threads"])
        shape, dtype = request["shape"], TORCH_DTYPES[request["dtype"]]
        self.num_anchors, self.loss_config = shape["num_anchors"], resolve_loss_config(LOSSES[request["objective"]], "eager")
        generator = torch.Generator().manual_seed(0)
        tokens, width, streams = shape["num_tokens"], shape["hidden_size"], shape["num_streams"]
        self.input_ids = torch.randint(0, shape["vocab_size"] - 1, (1, tokens), generator=generator)
        self.hidden_states = torch.randn(1, tokens, streams * width, generator=generator).to(dtype)
        self.last_hidden_states = self.hidden_states.unflatten(-1, (streams, width)).mean(dim=-2)
        self.loss_mask = torch.ones(1, tokens, dtype=torch.bool)
        self.document_ids = torch.zeros(1, tokens, dtype=torch.long)
        self.model = build_model(shape, dtype, generator)
        self.anchors = GivenAnchors()
        gc.freeze()  # so that the collection before every step is fast

    def step(self, anchors: list[int]) -> dict:
        self.anchors.positions = torch.tensor(anchors)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        started = time.perf_counter()
        _, loss, metrics = self.model(
            self.hidden_states,
            self.input_ids,
            self.loss_mask,
            self.last_hidden_states,
            self.document_ids,
            loss_config=self.loss_config,
            gamma=GAMMA,
            max_anchors=self.num_anchors,
        )
        loss.backward()
        return {
            "seconds": time.perf_counter() - started,
            "loss": float(loss.detach()),
            "anchors": int(metrics["eal_total"]),  # blocks with a supervised slot
            "slots": int(metrics["full_acc_total"]),  # supervised slots
        }


def build_model(shape: dict, dtype: torch.dtype, generator: torch.Generator) -> DFlashDraftModel:
    layers = Qwen3Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"],
        head_dim=shape["hidden_size"] // shape["num_heads"],
        tie_word_embeddings=False,
    )
    layers._attn_implementation = "sdpa"  # the default, FlexAttention, has no backward pass on a CPU
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layers,
        draft_vocab_size=shape["vocab_size"],
        block_size=shape["block_size"],
        aux_hidden_state_layer_ids=list(range(shape["num_streams"])),
        mask_token_id=shape["vocab_size"] - 1,
    )
    torch.set_default_dtype(dtype)
    model = DFlashDraftModel(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model.to(dtype).train()


class GivenAnchors:
    """Lets the library draw its anchors, then gives it ``positions`` [A], so that both sides draft from the same ones."""

    def __init__(self):
        self.drawing, self.positions = dflash_core.select_anchors, None
        dflash_core.select_anchors = self.select

    def select(self, *arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
        _, valid = self.drawing(*arguments, **options)
        return self.positions, torch.ones_like(valid)


def process_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    imports_bytes, built = process_bytes("VmRSS"), None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                limit = process_bytes("VmSize") + request["memory_bytes"]
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                built = PeerStep(request)
                names = ("torch", "transformers", "speculators")
                answer = {"versions": {name: importlib.metadata.version(name) for name in names}}
            elif request["do"] == "memory":
                answer = {"peak_bytes": process_bytes("VmHWM"), "imports_bytes": imports_bytes}
            else:
                answer = built.step(request["anchors"])
        except (MemoryError, RuntimeError) as error:
            answer = {"error": (str(error) or type(error).__name__).splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
