"""Gets the answers that a training needs, and nothing else, from the target in this process or from servers."""

from omegaconf import DictConfig, OmegaConf

from hyperdflash.answers.served_answers import AnswerServers, ask_servers
from hyperdflash.cli import command_of
from hyperdflash.data.corpus import Corpus
from hyperdflash.preparing.dataset import prepare
from hyperdflash.preparing.job import PrepareJob
from hyperdflash.record import environment_record, write_json
from hyperdflash.targets.load import fingerprint, load_heads
from hyperdflash.training.components import make_parts


def regenerate(config: DictConfig) -> None:
    """Gets missing answers, writes the dataset and prints its summary."""
    make_parts(config)
    job = PrepareJob(config)
    servers = _servers(config, job.corpus)
    heads = load_heads(job.target["path"])
    if servers is not None:
        servers.check(job.corpus.max_length)
        environment = environment_record(command_of("src.regenerate"))
        splits = [(name, corpus, conversations()) for name, (corpus, conversations) in job.splits().items()]
        for name, corpus, found in splits:
            path = job.served_file(corpus, fingerprint(heads))
            print(f"{name}: {len(found):,} conversations", flush=True)
            write_json(path.with_suffix(".json"), {"servers": servers.servers, **environment})
            ask_servers(found, servers, job.tokenizer, job.answer_settings(corpus), path)
    print("\n".join(prepare(job, heads).summary()), flush=True)


def _servers(config: DictConfig, corpus: Corpus) -> AnswerServers | None:
    """Returns the servers of ``config.server``, one URL or a list; None if the target answers in this process."""
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
    options = {name: config[name] for name in ("concurrency", "timeout_s", "attempts", "backoff_s")}
    servers = tuple(str(url).rstrip("/") for url in ([urls] if isinstance(urls, str) else urls))
    return AnswerServers(servers=servers, model=corpus.server_model, **options)
