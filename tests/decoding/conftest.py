"""The sequential reference for walks and replays."""

from __future__ import annotations

import pytest


def speculative_decoding(draft, text: list[int], num_slots: int, start: int, end: int) -> list[tuple[int, int, int]]:
    """Token by token, as a greedy loop would: (anchor, accepted, emitted). ``draft(position)`` gives S tokens."""
    rounds, written = [], text[: start + 1]
    while len(written) - 1 < end:
        anchor, accepted = len(written) - 1, 0
        for token in draft(anchor)[:num_slots]:
            if len(written) - 1 == end or token != text[len(written)]:
                break
            written.append(token)
            accepted += 1
        if len(written) - 1 < end:
            written.append(text[len(written)])  # the target's own token
        rounds.append((anchor, accepted, len(written) - 1 - anchor))
    assert written == text[: end + 1]
    return rounds


@pytest.fixture
def sequential_loop():
    return speculative_decoding
