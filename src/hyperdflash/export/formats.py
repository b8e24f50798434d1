"""Describes what each format of an exported drafter holds, and which engine serves it (docs/serving.md has the table).

    dflash         the layout of z-lab's dflash, vLLM, SGLang and NeMo; tap i is transformers' hidden_states[i + 1]
    speculators    the configuration of the speculators library; its tap i is transformers' hidden_states[i]
    transformers   any drafter of this project, for its own loader

In the first two a drafter holds no embedding and no LM head: the engine takes the target's. Where the residual's M paths are
the context, they take the place of M tapped layers, and the tap ids 0..M-1 are only counted.
"""

from collections.abc import Mapping
from typing import Any

GROUPS = ("conditioning", "reducer", "inputs", "lead", "drafter", "head", "blocks")  # of a configuration, as data
STOCK, PLUGIN, OWN = "DFlashDraftModel", "DFlashHyperDraftModel", "HyperDFlashDrafter"  # architectures
NAMES = {  # tensor names that differ: this project's prefix -> the format's
    "dflash": {"reducer.fc.": "fc."},
    "speculators": {"reducer.fc.": "fc.", "head.confidence_proj.": "confidence_head.proj.", "head.": "markov_head."},
    "transformers": {},
}
FORMATS = tuple(NAMES)
KEEPS = "to=transformers keeps it for this project's own loop"

Groups = Mapping[str, Any]  # group -> {"option": name, setting: value} or None


def check_servable(to: str, groups: Groups, hidden_size: int) -> None:
    """Raises ValueError, which names the engine that serves the drafter if there is one, where ``to`` cannot hold it.
    ``hidden_size`` is the target's. Every option must be one of this project's own, which the loader knows by name."""
    for name in GROUPS:
        if groups[name] is not None and "." in groups[name]["option"]:
            raise ValueError(
                f"{name} is {groups[name]['option']}, a part of your own, which no engine and no exported folder can name: "
                "decode with the run itself"
            )
    if to != "transformers" and (reason := _unserved(to, groups, hidden_size)):
        raise ValueError(f"to={to} cannot hold this drafter: {reason}")


def _unserved(to: str, groups: Groups, hidden_size: int) -> str | None:
    """Returns why no class of the format serves the drafter, and which engine does; None where one serves it."""
    drafter, head, reducer, taps = (groups[name] for name in ("drafter", "head", "reducer", "conditioning"))
    if drafter["option"] != "drafter":
        return f"engines read an MTP block from the target's own checkpoint (vLLM and SGLang, method mtp); {KEEPS}"
    inputs = groups["inputs"] or {}
    unknown = {
        "lead=mtp": groups["lead"] is not None,
        "inputs.anchor_state": inputs.get("anchor_state"),
        "inputs.next_token": inputs.get("next_token"),
        "drafter.context_window": drafter["context_window"] is not None,
        "drafter.hidden_size": drafter["hidden_size"] not in (None, hidden_size),
        f"conditioning={taps['option']}": taps["option"] not in ("layers", "pre_hc_head"),
        "conditioning.paths=flat": taps.get("paths") == "flat",
        f"reducer={reducer['option']}": reducer["option"] not in ("fc", "hc_gate"),
        f"head={head['option']}": head["option"] not in ("lm_head", "markov", "correction"),
        "drafter.convolution": drafter.get("convolution"),
    }
    if found := [name for name, wrong in unknown.items() if wrong]:
        return f"no engine serves {', '.join(found)}; {KEEPS}"
    if reducer["option"] == "fc" and head.get("kind", "vanilla") != "vanilla":
        return f"vLLM's method dspark serves head.kind=vanilla alone, and no engine serves {head['kind']}; {KEEPS}"
    if to == "dflash":
        served = reducer["option"] == "fc" and head["option"] == "markov"
        return "vLLM's method dspark serves head=markov, from to=speculators" if served else None
    if groups["blocks"]["layout"] == "causal":
        return "its blocks see themselves whole, and z-lab's dflash and vLLM serve blocks.layout=causal, from to=dflash"
    if reducer["option"] != "fc" or head["option"] == "correction":
        return f"vLLM with plugins/vllm serves its gate or head as {PLUGIN}, from to=dflash"
    return None


def architecture(to: str, groups: Groups) -> str:
    """Returns the name by which an engine finds the model's class."""
    if to == "transformers":
        return OWN
    if to == "speculators":
        return "DSparkSpeculator" if groups["head"]["option"] == "markov" else "DFlashSpeculator"
    return STOCK if groups["reducer"]["option"] == "fc" and groups["head"]["option"] == "lm_head" else PLUGIN


def served_by(to: str, groups: Groups) -> str:
    """Returns one sentence about the engine that serves the export."""
    if to == "transformers":
        return "This project's own loop decodes with it: `hyperdflash generate run=FOLDER`; no engine reads this format."
    name = architecture(to, groups)
    if name == PLUGIN:
        return f"vLLM 0.32 to 0.33 serves it (method dflash) with plugins/vllm and HYPERDFLASH_PRE_HC_HEAD=1, as {PLUGIN}."
    method = "dspark" if name.startswith("DSpark") else "dflash"
    if groups["conditioning"]["option"] == "layers":
        return f"vLLM 0.33 serves it (method {method}); its taps of DeepSeek-V4 are means over the paths, as in training."
    return (
        f"vLLM 0.32 to 0.33 serves it (method {method}) with plugins/vllm and HYPERDFLASH_PRE_HC_HEAD=1, which put the "
        "residual's paths in the place of the tapped layers; without them it reads other states and drafts badly."
    )


def config_of(to: str, description: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json: the format's keys and, for this project's loader, ``description`` (see folder.py). ``target`` has
    hidden_size, vocab_size, num_hidden_layers, hc_mult, rms_norm_eps, hc_eps and max_position_embeddings of the target's
    configuration, and its architectures and name."""
    groups, mask_id = description["groups"], description["mask_token_id"]
    own = {"dtype": description["dtype"], "hyperdflash": description}
    head = {"architectures": [architecture(to, groups)], "model_type": "hyperdflash"}
    if to == "transformers":
        return head | own
    sizes, causal = groups["drafter"], groups["blocks"]["layout"] == "causal"
    taps = groups["conditioning"].get("layer_ids", list(range(target["hc_mult"])))
    longest, num_layers = target["max_position_embeddings"], sizes["num_layers"]
    layers = {
        "model_type": "qwen3",
        "hidden_size": target["hidden_size"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        **{name: sizes[name] for name in ("intermediate_size", "head_dim", "rms_norm_eps", "rope_theta")},
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "vocab_size": target["vocab_size"],
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * num_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if to == "dflash":
        # vLLM gives a draft layer without a window of its own that of DeepSeek-V4's layers, 128 tokens
        window = {"use_swa": True, "swa_window_size": longest}
        blocks = {"mask_token_id": mask_id, "target_layer_ids": taps, "causal": causal, **window}
        config = layers | head | {"model_type": "qwen3", "block_size": sizes["block_size"], "dflash_config": blocks}
        config |= {"num_target_layers": target["num_hidden_layers"], **({"is_causal": True} if causal else {})}
        if groups["reducer"]["option"] == "hc_gate":
            gate = {"num_paths": target["hc_mult"], "norm_eps": target["rms_norm_eps"], "hc_eps": target["hc_eps"]}
            config["hyperdflash_config"] = gate | {"path_norm": groups["reducer"]["path_norm"]}
        return config | own
    markov = groups["head"] if groups["head"]["option"] == "markov" else None
    algorithm = "dspark" if markov else "dflash"
    proposal = {"proposal_type": "greedy", "speculative_tokens": sizes["block_size"] - 1}
    verifier = {"name_or_path": target["name"], "architectures": target.get("architectures") or []}
    config = {
        "architectures": head["architectures"],
        "speculators_model_type": algorithm,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
        "transformer_layer_config": layers,
        "draft_vocab_size": target["vocab_size"],
        "block_size": sizes["block_size"],
        "aux_hidden_state_layer_ids": [i + 1 for i in taps],
        "mask_token_id": mask_id,
        "sample_from_anchor": False,
    }
    if markov:
        confidence = {"enable_confidence_head": markov["confidence"], "confidence_head_with_markov": markov["confidence"]}
        config |= {"markov_rank": markov["rank"], "markov_head_type": markov["kind"], **confidence}
    return config | own


def renamed(name: str, to: str, *, back: bool = False) -> str:
    """Returns a tensor's name in the format ``to``, or ``back`` in this project."""
    for own, other in NAMES[to].items():
        before, after = (other, own) if back else (own, other)
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
