"""Compares an engine's states with the target's in this process on a few prompts, and writes the stamp that captures need.

1. prompts      held-out prompts, encoded as a capture encodes them
2. own          the target in this process (``reference=target``), or only its heads (``reference=heads``)
3. engine       per server: states of every prompt, and the next token that it generates
4. table        the stamp in runs/engine_checks, passed or not, and its table beside it; a failed check ends in exit code 1
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from hyperdflash.cli import command_of
from hyperdflash.contracts import DOMAINS
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.engines.compare import Comparison, Limits, compare
from hyperdflash.engines.producer import make_client, stamp_path
from hyperdflash.options import instantiate
from hyperdflash.preparing.job import engine_checks_dir
from hyperdflash.record import environment_record
from hyperdflash.report.results import write_report
from hyperdflash.report.tables import GAP, Table, markdown
from hyperdflash.settings import one_of, positive_int
from hyperdflash.targets.load import fingerprint, load_heads
from hyperdflash.targets.producer import InProcess


def check_engine(config: DictConfig) -> Path:
    """Returns the stamp's path; ValueError in one sentence where a server's states are not the target's."""
    one_of("reference", config.reference, ("target", "heads"))
    if config.target.engine is None:
        raise ValueError("there is no engine to check: give target.engine=sglang or vllm, and target.servers=[http://...]")
    limits = Limits(**config.limits)
    prompts = check_prompts(config)
    client = make_client(OmegaConf.to_container(config.target, resolve=True))
    client.check_servers()
    heads = load_heads(config.target.path)
    own = None
    if config.reference == "target":
        print(f"loading the target from {config.target.path}", flush=True)
        target = instantiate(config.target)
        if target.fingerprint != client.fingerprint:
            raise ValueError(f"{config.target.path} loads as {target.fingerprint}, its heads as {client.fingerprint}")
        producer = InProcess(target)
        own = torch.cat([producer.states([prompt])[None] for prompt in prompts])
        del target, producer
    found: dict[str, Comparison] = {}
    for server in client.settings.servers:
        one = replace(client, settings=replace(client.settings, servers=(server,)))
        found[server] = compare(one.states(prompts)[None], own, [len(p) for p in prompts], one.next_tokens(prompts), heads)
    complaints = {server: complaint for server, c in found.items() if (complaint := c.complaint(limits))}
    verdict = next((f"at {server} {complaint}" for server, complaint in complaints.items()), "all servers agree")
    path = stamp_path(engine_checks_dir(), client.settings.engine, fingerprint(heads), config.target.dtype)
    stamp = {
        "passed": not complaints,
        "verdict": verdict,
        "engine": client.settings.engine,
        "servers": list(client.settings.servers),
        "target": {"path": str(config.target.path), "fingerprint": client.fingerprint, "dtype": config.target.dtype},
        "reference": config.reference,
        "limits": asdict(limits),
        "prompts": len(prompts),
        "comparisons": {server: asdict(c) for server, c in found.items()},
        "environment": environment_record(command_of("src.check_engine")),
    }
    text = comparison_markdown(found, complaints, limits, len(prompts))
    write_report(path.parent, {path.name: stamp, path.with_suffix(".md").name: text})
    print(f"{text}\nwrote {path}", flush=True)
    if complaints:
        raise ValueError(f"{verdict}: nothing will be captured through {client.settings.engine}, see {path.with_suffix('.md')}")
    return path


def check_prompts(config: DictConfig) -> list[Tensor]:
    """Returns ``prompts`` committed held-out prompts, the domains in turn, each cut to ``max_length`` tokens."""
    number, longest = positive_int("prompts", config.prompts), positive_int("max_length", config.max_length)
    tokenizer = load_tokenizer(config.target.path)
    by_domain = [load_eval_prompts(domain) for domain in DOMAINS]
    chosen = [by_domain[i % len(DOMAINS)][i // len(DOMAINS)] for i in range(min(number, sum(map(len, by_domain))))]
    return [torch.tensor(encode_prompt(prompt, tokenizer, config.mode)[:longest]) for prompt in chosen]


def comparison_markdown(found: dict[str, Comparison], complaints: dict[str, str], limits: Limits, num_prompts: int) -> str:
    """Returns a row per server, and the definitions of its numbers."""
    paths = max((len(c.cosine) for c in found.values() if c.cosine), default=0)
    header = ["Server", "tokens", "max abs", "rel. error", "worst token", *(f"cos path {j}" for j in range(paths))]
    rows = []
    for server, c in found.items():
        numbers = [GAP if v is None else f"{v:.1e}" for v in (c.max_abs, c.relative_error, c.worst_token)]
        shares = [GAP if v is None else f"{v:.1%}" for v in (c.argmax, c.next_token)]
        cosines = [f"{v:.5f}" for v in c.cosine or ()]
        rows.append([server, str(c.tokens), *numbers, *cosines, *shares, "**differs**" if server in complaints else "agrees"])
    notes = (
        f"{num_prompts} prompts. rel. error: ||engine - target|| / ||target|| over all tokens, and of the worst one; cos: "
        "mean over tokens; same argmax: tokens whose next token is the same read from both states; own next token: prompts "
        "whose last state, read by the checkpoint's own heads, gives the token that the engine generates. Limits: cosine "
        f"{limits.cosine:g}, rel. error {limits.relative_error:g}, argmax {limits.argmax:g}, "
        f"next token {limits.next_token:g}."
    )
    return markdown([Table([*header, "same argmax", "own next token", ""], rows), notes])
