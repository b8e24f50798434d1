"""Decodes the target's own answers in batches, greedily or by sampling. A target's cache has neither ragged rows nor left
padding, so all rows of a batch advance together from position 0: one forward covers the shortest prompt, then every step feeds
each row its next prompt token or the token chosen last. Finished rows leave the batch."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hyperdflash.targets.adapter import PREFILL, adapter_of
from hyperdflash.targets.sampling import Sampler
from hyperdflash.targets.taps import check_finite


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (row, token ids of the answer with any end token) as rows end; prompts can have different lengths. ``names`` stand
    for the prompts in the ValueError of a target that gives NaN or infinity. Steps on the cache run transformers' eager
    attention whatever implementation is set."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt has no tokens: encode it with its chat header first")
    sampler = Sampler(temperature, top_p, generator)
    adapter = adapter_of(model.config.model_type)
    device, cache = adapter.input_device(model), adapter.new_cache(model.config)
    padded = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=eos_id).to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, rows = min(map(len, prompts)), list(range(len(prompts)))
    answers: dict[int, list[int]] = {row: [] for row in rows}

    for start in range(0, shortest, PREFILL):
        logits = adapter.step(model, padded[:, start : min(start + PREFILL, shortest)], cache, start, last_only=True)
    check_finite(model, padded[:, :shortest], logits, names or [f"prompt {row}" for row in rows])
    position = shortest  # of the next token
    while rows:
        chosen, _ = sampler.choose(logits[:, -1])
        forced = lengths > position
        if position < padded.shape[1]:
            chosen = torch.where(forced, padded[:, position], chosen)
        keep = []
        for index, (row, token, is_prompt) in enumerate(zip(rows, chosen.tolist(), forced.tolist(), strict=True)):
            if not is_prompt:
                answers[row].append(token)
                if token == eos_id or len(answers[row]) == max_new_tokens:
                    yield row, answers.pop(row)
                    continue
            keep.append(index)
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            if not rows:
                return
            kept = torch.tensor(keep, device=chosen.device)
            chosen, padded, lengths = chosen[kept], padded[kept], lengths[kept]
            cache.reorder_cache(kept)
        logits = adapter.step(model, chosen[:, None], cache, position)
        position += 1
