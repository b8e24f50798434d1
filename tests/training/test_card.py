"""The model card's answers are made by one process at a time."""

from __future__ import annotations

import pytest

from hyperdflash.answers import responses
from hyperdflash.preparing import job
from tiny_target.card import measure as card


class Answering(Exception):
    """The card has come to its answers."""


def test_two_cards_at_once_do_not_write_one_file_of_answers(compose_config, mini_target, tmp_path, monkeypatch):
    leases = []

    def answering(*_, **__):
        leases.extend((job.answers_dir() / "leases").glob("*.json"))
        raise Answering

    monkeypatch.setattr(card, "load_embedded", lambda split: [])
    monkeypatch.setattr(card, "heldout_groups", lambda *_: {})
    monkeypatch.setattr(card, "_measure_text", lambda *_: ({}, {}))
    monkeypatch.setattr(responses, "generate_batch", answering)
    options = [f"target.path={mini_target}", f"out={tmp_path}", "threads=1"]
    with pytest.raises(Answering):
        card.make_card(compose_config("card", options))
    assert len(leases) == 1 and not leases[0].exists()
