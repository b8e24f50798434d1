"""Generates in vLLM, in its own environment and this process: python worker.py JOB, a JSON file.

JOB has model, draft (or null), num_slots, prompts (token ids), max_tokens, temperature, out. One prompt at a time, then, at
temperature 0, four. A text is a list of pairs: the token, and the log-probabilities of the likeliest ones there by token id.
With a draft the first pass records what the drafter was given and what it drafted, round by round.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HYPERDFLASH_PRE_HC_HEAD": "1"}

import torch


def main(job: dict) -> None:
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": 1024, "max_num_batched_tokens": 4096, "max_num_seqs": 4, "enable_prefix_caching": False}
    if job["draft"]:
        draft = {"method": "dflash", "model": job["draft"], "num_speculative_tokens": job["num_slots"]}
        draft |= {"draft_sample_method": "probabilistic"} if job["temperature"] else {}
        settings["speculative_config"] = draft | {"kv_cache_dtype": "bfloat16"}
    llm = LLM(job["model"], dtype="bfloat16", enforce_eager=True, seed=0, disable_log_stats=False, **settings)
    rounds = record(llm) if job["draft"] else []
    settings = {"max_tokens": job["max_tokens"], "detokenize": False, "ignore_eos": True, "logprobs": 8}
    sampling = [SamplingParams(temperature=job["temperature"], seed=i, **settings) for i in range(len(job["prompts"]))]
    result = {"alone": [], "rounds": [], "batched": []}
    for prompt, one in zip(job["prompts"], sampling, strict=True):
        rounds.clear()
        result["alone"] += generate(llm, [prompt], [one])
        result["rounds"].append(list(rounds))
    result["counters"] = counters(llm)
    for start in range(0, len(job["prompts"]) if job["temperature"] == 0 else 0, 4):
        part = slice(start, start + 4)
        result["batched"] += generate(llm, job["prompts"][part], sampling[part])
    torch.save(result, job["out"])


def generate(llm, prompts: list[list[int]], sampling: list) -> list[list[tuple[int, dict[int, float]]]]:
    texts = [answer.outputs[0] for answer in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)]
    ranked = [[{token: float(found.logprob) for token, found in place.items()} for place in text.logprobs] for text in texts]
    return [list(zip(text.token_ids, places, strict=True)) for text, places in zip(texts, ranked, strict=True)]


def record(llm) -> list[dict]:
    """Returns the list that every round of the drafter is appended to."""
    proposer = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    combine, propose, rounds, given = proposer.model.combine_hidden_states, proposer.propose, [], {}
    names = ("num_speculative_tokens", "target_token_ids", "target_positions", "target_hidden_states", "next_token_ids")

    def combined(states):
        given["states"] = states.clone()
        return combine(states)

    def proposed(*args, **kwargs):
        drafts = propose(*args, **kwargs)
        named = dict(zip(names, args, strict=False)) | kwargs
        positions, anchor_id = named["target_positions"].clone(), int(named["next_token_ids"][0])
        rounds.append({"positions": positions, "states": given["states"], "anchor_id": anchor_id, "drafts": drafts[0].tolist()})
        return drafts

    proposer.model.combine_hidden_states, proposer.propose = combined, proposed
    return rounds


def counters(llm) -> dict:
    """Returns vLLM's own counters of speculation: drafts, and accepted tokens per drafted position."""
    found = {metric.name: getattr(metric, "value", getattr(metric, "values", None)) for metric in llm.get_metrics()}
    return {name.removeprefix("vllm:spec_decode_"): value for name, value in found.items() if "spec_decode" in name}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
