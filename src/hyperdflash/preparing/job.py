"""Two jobs, each made once from a configuration and checked: one captures states, the other also prepares a dataset."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.answers.responses import answer_conversations
from hyperdflash.answers.served_answers import served_path
from hyperdflash.checks.engine_states import checked_client
from hyperdflash.cli import capture_command, command_of, config_name
from hyperdflash.contracts import ENCODING_VERSION, Conversation, Document
from hyperdflash.data.chat import MODES
from hyperdflash.data.corpus import Corpus
from hyperdflash.data.tokenizer import load_tokenizer, special_ids, tokenizer_fingerprint
from hyperdflash.identity import dataset_decided_by, dataset_name, runs_dir
from hyperdflash.leases import exclusive
from hyperdflash.options import instantiate
from hyperdflash.settings import natural_int, one_of
from hyperdflash.stable_hash import content_hash
from hyperdflash.states.manifest import IN_PROCESS, CacheKey
from hyperdflash.states.modes import CacheMode
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import DTYPES, Target, fingerprint, read_config
from hyperdflash.targets.producer import InProcess, Producer


class NoTarget(ValueError):
    """The mode of the cache allows no target in this process."""


class StatesJob:
    """How a training, an evaluation or a check captures and stores the states of documents."""

    def __init__(self, config: DictConfig):
        one_of("target.dtype", config.target.dtype, tuple(DTYPES))
        self.cache: CacheMode = instantiate(config.cache)
        self.target: dict = OmegaConf.to_container(config.target, resolve=True)
        self.mode: str = config.mode
        self.capture_command = capture_command()  # captures missing states

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.target["path"])

    @cached_property
    def _loaded(self) -> Target:
        if not self.cache.loads_target:
            raise NoTarget(
                f"cache={self.cache.name} loads no target, and answers or states are missing: run `{self.capture_command}`"
            )
        print(f"loading the target from {self.target['path']}", flush=True)
        return instantiate(self.target)

    def load(self) -> Target:
        """Returns the target, loaded at the first call; NoTarget when the mode of the cache allows none."""
        return self._loaded

    @cached_property
    def producer(self) -> Callable[[], Producer]:
        """Makes, on the first call, what computes states."""
        return self.producer_of(self.load)

    def producer_of(self, target: Callable[[], Target]) -> Callable[[], Producer]:
        """Makes, on the first call, what computes states: ``target`` in this process, or the servers of ``target.engine``."""

        @cache
        def make() -> Producer:
            if self.target.get("engine"):
                return checked_client(self.target, self.tokenizer, self.mode)
            return InProcess(target())

        return make

    def key(self, heads: TargetHeads) -> CacheKey:
        """Returns what the states depend on; reads the tokenizer's file."""
        return CacheKey(
            target=fingerprint(heads, keep=True),
            target_dtype=self.target["dtype"],
            num_paths=heads.num_paths,
            hidden_size=heads.hidden_size,
            dtype=self.cache.dtype,
            tokenizer=tokenizer_fingerprint(self.target["path"]),
            mode=self.mode,
            encoding_version=ENCODING_VERSION,
            engine=self.target.get("engine") or IN_PROCESS,
        )

    def open_store(self, heads: TargetHeads) -> StateStore:
        return self.cache.open(self.key(heads))

    def states(
        self,
        documents: Sequence[Document],
        store: StateStore,
        layer_ids: Sequence[int] = (),
        producer: Callable[[], Producer] | None = None,
    ) -> ShardedStates:
        """Returns documents with their states, in the order of their shards. ``producer`` None is that of the job."""
        shards = make_shards(documents, self.cache.documents_per_shard)
        return self.cache.states(shards, store, producer or self.producer, layer_ids, command=self.capture_command)

    def target_answers(
        self,
        conversations: Sequence[Conversation],
        target_fingerprint: str,
        settings: AnswerSettings,
        target: Callable[[], Target] | None = None,
    ) -> list[Document]:
        """Returns documents with the target's answers, which one process computes and stores; ``target`` None: the job's."""
        wanted = repr((target_fingerprint, settings, [conversation.id for conversation in conversations]))
        given = (conversations, target or self.load, target_fingerprint, self.tokenizer, settings, answers_dir())
        if not self.cache.loads_target and not self.cache.writes:  # reads only
            return answer_conversations(*given)
        with exclusive(answers_dir(), f"leases/{content_hash(wanted)}"):
            return answer_conversations(*given)


class PrepareJob(StatesJob):
    """Holds what decides a dataset, with taps of the layers ``layer_ids``."""

    def __init__(self, config: DictConfig, layer_ids: Sequence[int] = ()):
        """Reads no weight and no row of the corpus; ValueError for a wrong option."""
        one_of("mode", config.mode, MODES)
        natural_int("seed", config.seed)
        super().__init__(config)
        self.name, self.decided_by = dataset_name(config), dataset_decided_by(config)
        self.corpus: Corpus = instantiate(config.corpus)
        if self.corpus.max_length > (context := read_config(self.target["path"]).max_position_embeddings):
            given = f"corpus.max_length={self.corpus.max_length}"
            raise ValueError(f"{given} exceeds the target's context of {context:,}: give {context} or less")
        self.seed, self.threads, self.layer_ids = config.seed, config.trainer.threads, tuple(layer_ids)
        self.mask_token_id = special_ids(self.tokenizer, config.target.mask_token_id).mask
        server = "" if config_name() == "regenerate" else " server=http://host:port/v1"
        self.regenerate_command = command_of("src.regenerate") + server  # asks a server for missing answers

    def splits(self) -> dict[str, tuple[Corpus, Callable[[], list[Conversation]]]]:
        """``train`` as configured; ``validation`` greedy: tau at temperature 0 is defined on the target's own greedy text."""
        corpus = self.corpus
        responses = corpus.responses if corpus.server_model is not None else "target"
        greedy = replace(corpus, responses=responses, temperature=0.0, top_p=1.0)
        return {"train": (corpus, corpus.train), "validation": (greedy, greedy.validation_conversations)}

    def answer_settings(self, corpus: Corpus) -> AnswerSettings:
        return AnswerSettings(
            temperature=corpus.temperature,
            top_p=corpus.top_p,
            max_new_tokens=corpus.max_new_tokens,
            max_length=corpus.max_length,
            mode=self.mode,
            seed=self.seed if corpus.temperature > 0 else 0,
            dtype=self.target["dtype"],
        )

    def served_file(self, corpus: Corpus, target_fingerprint: str) -> Path:
        model, settings = corpus.server_model, self.answer_settings(corpus)
        return served_path(answers_dir(), target_fingerprint, model, self.tokenizer, settings)


def answers_dir() -> Path:
    return runs_dir() / "responses"
