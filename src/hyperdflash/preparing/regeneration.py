"""The answers that a training would need, and nothing else: by the target in this process, or by servers."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from hyperdflash.answers.answer_server import AnswerServers
from hyperdflash.answers.served_answers import ask_servers
from hyperdflash.cli import command_of
from hyperdflash.preparing.answers import answer_settings, served_file
from hyperdflash.preparing.states import lazy_target, splits, training_documents
from hyperdflash.record import environment_record, write_json
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint, load_heads
from hyperdflash.training.components import Parts, make_parts


def regenerate(config: DictConfig) -> None:
    """Fill in what is missing; then read all of it the way a training does, which prints what it will find."""
    parts = make_parts(config)
    servers = _servers(config, parts)
    heads = load_heads(config.target.path)
    if servers is not None:
        _ask(config, parts, heads, servers)
    training_documents(config, parts, heads, lazy_target(config))


def _servers(config: DictConfig, parts: Parts) -> AnswerServers | None:
    corpus = parts.corpus
    urls = OmegaConf.to_container(config.server) if OmegaConf.is_config(config.server) else config.server
    if corpus.responses == "original":
        raise ValueError("corpus.responses=original keeps the corpus's answers: use corpus.responses=target or server:NAME")
    if (urls is None) != (corpus.server_model is None):
        raise ValueError(
            "answers of a server need server=http://host:port/v1 and corpus.responses=server:NAME, the model's name there; "
            f"got server={urls} and corpus.responses={corpus.responses}"
        )
    if urls is None:
        return None
    return AnswerServers(
        servers=tuple(str(url).rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)),
        model=corpus.server_model,
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        attempts=config.attempts,
        backoff_s=config.backoff_s,
    )


def _ask(config: DictConfig, parts: Parts, heads: TargetHeads, servers: AnswerServers) -> None:
    servers.check()
    for name, conversations, source in splits(parts):
        path = served_file(config, source.corpus, parts.tokenizer, fingerprint(heads))
        print(f"{name}: {len(conversations):,} conversations", flush=True)
        write_json(path.with_suffix(".json"), {"servers": servers.servers, **environment_record(command_of("src.regenerate"))})
        ask_servers(conversations, servers, parts.tokenizer, answer_settings(config, source.corpus), path)
