"""Compares an engine's states with the target's in this process on a few prompts: by a command, and before every capture.

1. prompts      held-out prompts, encoded as a capture encodes them
2. own          the target in this process (``reference=target``), or only its heads (``reference=heads``, and captures)
3. engine       per server: states of every prompt, and the next token that it generates
4. table        a line per server on the terminal; a difference ends in exit code 1

Shapes: see contracts.py; N is the number of tokens of all prompts, concatenated. Engines use other kernels and often other
number formats, so states never agree bit for bit: the limits bound direction, size and the target's next tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import DOMAINS
from hyperdflash.data.chat import Mode, encode_prompt
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.engines.client import EngineClient, EngineSettings
from hyperdflash.engines.sglang import SGLang
from hyperdflash.engines.vllm import VLLM
from hyperdflash.options import instantiate
from hyperdflash.settings import one_of, positive_int
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import DTYPES, fingerprint, load_heads
from hyperdflash.targets.producer import InProcess

CLIENTS = {"sglang": SGLang, "vllm": VLLM}


def make_client(target: Mapping[str, object]) -> tuple[EngineClient, TargetHeads]:
    """Returns the client of a `target` group with an engine, and the heads of the checkpoint at ``target.path``, all that is
    read of it; ValueError for a server that is not reachable, or whose settings corrupt states."""
    settings = EngineSettings.of(target)
    heads = load_heads(target["path"], str(target["dtype"]))
    make = CLIENTS[settings.engine]
    client = make(settings, fingerprint(heads), heads.num_paths, heads.hidden_size, DTYPES[target["dtype"]])
    for server in settings.servers:
        client.checked(server)
    return client, heads


COSINE = 0.98  # least mean over tokens, of every path
RELATIVE_ERROR = 0.2  # most, ||engine - target|| / ||target||
AGREED = 0.9  # least share of tokens, and of prompts, with the same next token


@dataclass(frozen=True)
class Comparison:
    """The result of one server. ``next_token`` is the share of prompts where our heads on the engine's last state give the
    token that the engine generates. The rest is None without a reference: ``cosine`` has M entries, means over tokens;
    ``argmax`` is the share of tokens where both states give the same next token."""

    tokens: int
    next_token: float
    cosine: tuple[float, ...] | None = None
    relative_error: float | None = None
    argmax: float | None = None

    @property
    def complaint(self) -> str | None:
        """Describes the first exceeded limit; None where all hold. NaN exceeds every limit."""
        if self.cosine is not None:
            path = min(range(len(self.cosine)), key=lambda j: self.cosine[j])
            if not self.cosine[path] >= COSINE:
                return f"path {path} points elsewhere (mean cosine {self.cosine[path]:.3f}, wanted {COSINE:g})"
            if not self.relative_error <= RELATIVE_ERROR:
                return f"the states are off by {self.relative_error:.0%} of their size, wanted {RELATIVE_ERROR:.0%} at most"
            if not self.argmax >= AGREED:
                return f"{self.argmax:.0%} of the tokens have the same next token, wanted {AGREED:.0%}"
        if self.next_token >= AGREED:
            return None
        share = f"on {self.next_token:.0%} of the prompts"
        return f"{share} our heads read the engine's own next token from its states, wanted {AGREED:.0%}"


def check_engine(config: DictConfig) -> None:
    """Prints a line per server; ValueError in one sentence where a server's states are not the target's."""
    one_of("reference", config.reference, ("target", "heads"))
    if config.target.engine is None:
        raise ValueError("there is no engine to check: give target.engine=sglang or vllm, and target.servers=[http://...]")
    number, longest = positive_int("prompts", config.prompts), positive_int("max_length", config.max_length)
    prompts = check_prompts(load_tokenizer(config.target.path), config.mode, number, longest)
    client, heads = make_client(OmegaConf.to_container(config.target, resolve=True))
    own = None
    if config.reference == "target":
        print(f"loading the target from {config.target.path}", flush=True)
        producer = InProcess(instantiate(config.target))
        if producer.fingerprint != client.fingerprint:
            raise ValueError(f"{config.target.path} loads as {producer.fingerprint}, its heads as {client.fingerprint}")
        own = torch.cat([producer.states([prompt])[None] for prompt in prompts])
        del producer
    complaints = []
    for server, result in compare_servers(client, heads, prompts, own):
        complaints += [f"at {server} {result.complaint}"] if result.complaint else []
        numbers = ", ".join(f"{name} {value}" for name, value in asdict(result).items() if value is not None)
        print(f"{server} {'differs' if result.complaint else 'agrees'}: {numbers}", flush=True)
    if complaints:
        raise ValueError(f"{complaints[0]}: do not train on states of {client.settings.engine}")


def checked_client(target: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, mode: Mode) -> EngineClient:
    """Returns the client for a capture; ValueError unless our heads on the states of every server give its own next tokens."""
    client, heads = make_client(target)
    for server, result in compare_servers(client, heads, check_prompts(tokenizer, mode)):
        if result.complaint:
            advice = "compare it with the target by `python -m src.check_engine` and these target options"
            raise ValueError(f"at {server} {result.complaint}: {advice}")
    return client


def check_prompts(tokenizer: PreTrainedTokenizerBase, mode: Mode, number: int = 12, longest: int = 512) -> list[Tensor]:
    """Returns ``number`` committed held-out prompts, the domains in turn, each cut to ``longest`` tokens."""
    by_domain = [load_eval_prompts(domain) for domain in DOMAINS]
    chosen = [by_domain[i % len(DOMAINS)][i // len(DOMAINS)] for i in range(min(number, sum(map(len, by_domain))))]
    return [torch.tensor(encode_prompt(prompt, tokenizer, mode)[:longest]) for prompt in chosen]


def compare_servers(
    client: EngineClient, heads: TargetHeads, prompts: Sequence[Tensor], own: Tensor | None = None
) -> Iterator[tuple[str, Comparison]]:
    """Yields each server with its comparison, see `compare`."""
    for server in client.settings.servers:
        one = replace(client, settings=replace(client.settings, servers=(server,)))
        yield server, compare(one.states(prompts)[None], own, [len(p) for p in prompts], one.next_tokens(prompts), heads)


@torch.no_grad()
def compare(
    found: Tensor, own: Tensor | None, lengths: Sequence[int], next_tokens: Sequence[int], heads: TargetHeads
) -> Comparison:
    """Compares the engine's states ``found`` [N, M, D] with ``own`` (or None); ``next_tokens`` are the engine's, per prompt."""
    predicted = best(heads, found[torch.tensor(lengths).cumsum(0) - 1])
    agreed = sum(a == b for a, b in zip(predicted.tolist(), next_tokens, strict=True)) / len(lengths)
    if own is None:
        return Comparison(len(found), agreed)
    cosine = tuple(cosine_similarity(found.float(), own.float(), dim=-1).mean(dim=0).tolist())
    error = float((found.float() - own.float()).norm() / own.float().norm())
    return Comparison(len(found), agreed, cosine, error, float((best(heads, found) == best(heads, own)).float().mean()))


def best(heads: TargetHeads, states: Tensor, rows: int = 256) -> Tensor:
    """[N, M, D] -> [N] int64: the target's most likely next tokens, ``rows`` rows of logits at a time."""
    return torch.cat([heads.logits(heads.collapse(part[None]))[0].argmax(dim=-1) for part in states.split(rows)])
