"""Where the answers of a configuration come from: how the target is asked, and which file a server's answers are in."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.responses import AnswerSettings
from hyperdflash.answers.served_answers import served_path
from hyperdflash.data.corpus import Corpus
from hyperdflash.identity import runs_dir


def answer_settings(config: DictConfig, corpus: Corpus) -> AnswerSettings:
    return AnswerSettings(
        temperature=corpus.temperature,
        top_p=corpus.top_p,
        max_new_tokens=corpus.max_new_tokens,
        max_length=corpus.max_length,
        mode=config.mode,
        seed=config.seed if corpus.temperature > 0 else 0,
        dtype=config.target.dtype,
    )


def answers_dir() -> Path:
    return runs_dir() / "responses"


def served_file(config: DictConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> Path:
    """Of ``corpus.responses=server:NAME``."""
    assert corpus.server_model is not None
    return served_path(answers_dir(), fingerprint, corpus.server_model, tokenizer, answer_settings(config, corpus))
