"""Requests answers from servers and stores them, many conversations at a time, for training to read.

The file's name has the server's name of the model and the fingerprint of ``target.path``; the user vouches that both have the
same weights. An answer depends only on its own conversation, so a larger corpus requests only its new conversations, and a
killed job repeats only its open requests.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.answer_file import append_answers, cut_half_line, read_answers
from hyperdflash.answers.answer_server import AnswerClient, AnswerServers, Finished, WrongServer
from hyperdflash.answers.responses import AnswerSettings, ordered_documents
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.lengths import named
from hyperdflash.leases import exclusive

# So many failures without an answer in between end the job. Refusals arrive faster than answers, so the limit for them adds
# the number of workers.
_IN_A_ROW = 8


def served_path(
    directory: Path, fingerprint: str, model: str, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings
) -> Path:
    """Returns the path of a server's answers: ``<fingerprint>-server-<model>-<hash of settings and tokenizer>.jsonl``."""
    deciding = {name: value for name, value in asdict(settings).items() if name not in ("dtype", "batch_rows")}
    key = hashlib.sha256(json.dumps([fingerprint, model, deciding, tokenizer.backend_tokenizer.to_str()]).encode())
    readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in model)
    return directory / f"{fingerprint}-server-{readable}-{key.hexdigest()[:16]}.jsonl"


def ask_servers(
    conversations: Sequence[Conversation],
    servers: AnswerServers,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    path: Path,
    progress: bool = True,
) -> None:
    """Requests every conversation that ``path`` has no answer to, and appends the answers as they arrive.

    ValueError names the failed conversations at the end, or as soon as several fail in a row. A conversation that every server
    refuses is left out for good once another one is answered; where no other is open, an answered one is requested again.
    """
    busy = f"another process is filling {path}: wait for it, or end it"
    with exclusive(path.parent, f"leases/{path.stem}", wait_s=0, busy=busy):
        cut_half_line(path)
        done = read_answers(path, {conversation.id for conversation in conversations})
        todo = [conversation for conversation in conversations if conversation.id not in done]
        print(
            f"answers of {servers.model}: {len(conversations) - len(todo):,} of {len(conversations):,} are in {path}",
            flush=True,
        )
        if not todo:
            return
        servers.check()
        client = AnswerClient(servers, tokenizer, settings)
        workers = min(len(todo), servers.concurrency * len(servers.servers))
        from_text = tokens = in_a_row = 0
        left_out: dict[str, str] = {}
        failed: dict[str, Exception] = {}
        refused: list[Finished] = []  # since the last answer
        known = next((c for c in conversations if c.id in done and len(done[c.id].input_ids)), None)  # answered before

        def keep(one: Finished) -> None:
            append_answers(path, one.documents, one.left_out)
            if one.left_out:
                left_out[one.conversation.id] = str(one.error or one.left_out)

        def settle(answering: bool) -> bool:
            """Leaves the refused conversations out if the servers answer others."""
            if answering:
                for one in refused:
                    keep(one)
                refused.clear()
            return answering

        def still_answering() -> bool:
            return known is not None and client.answer(known).error is None

        title = f"answers of {servers.model}"
        with (
            tqdm(total=len(todo), desc=title, unit="doc", mininterval=2, disable=not progress) as bar,
            closing(_in_threads(client.answer, todo, workers)) as results,
        ):
            for one in results:
                bar.update()
                if isinstance(one.error, WrongServer):
                    raise one.error
                if one.error is not None and one.left_out is None:
                    failed[one.conversation.id] = one.error
                    in_a_row += 1
                    if in_a_row >= min(_IN_A_ROW, len(todo)):
                        break
                elif one.error is not None:
                    refused.append(one)
                    if len(refused) >= _IN_A_ROW + workers and not settle(still_answering()):
                        break
                else:
                    keep(one)
                    if one.tokens or one.left_out:  # not for a prompt without room, which no server received
                        known, in_a_row = one.conversation, 0
                        settle(True)
                    from_text, tokens = from_text + one.from_text, tokens + one.tokens
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
            else:
                settle(bool(refused) and still_answering())
    failed |= {one.conversation.id: one.error for one in refused}
    if from_text:
        print(f"answers of {servers.model}: {from_text:,} came as text and were encoded here (no return_token_ids)")
    if left_out:
        print(
            f"answers of {servers.model}: {len(left_out)} left out for good: {named(list(left_out))}; the last one's reason: "
            f"{list(left_out.values())[-1]} (to request it again, remove its line from {path})"
        )
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(todo)} conversations have no answer, the same command requests them again "
            f"({named(list(failed))}); the last one's error: {list(failed.values())[-1]}"
            + ("; raise the server's max_model_len, or lower corpus.max_length" if refused else "")
        )


def served_documents(
    conversations: Sequence[Conversation],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    command: str,
) -> list[Document]:
    """Returns the stored documents in the order of ``conversations``; ValueError with ``command`` where one is absent."""
    done = read_answers(path, {conversation.id for conversation in conversations})
    missing = [conversation.id for conversation in conversations if conversation.id not in done]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(conversations):,} answers are not in {path}: run `{command}` first")
    print(f"target answers: all {len(conversations):,} are in {path}", flush=True)
    return ordered_documents(conversations, done, tokenizer, settings)


def _in_threads(work: Callable[[Conversation], Finished], todo: Sequence[Conversation], workers: int) -> Iterator[Finished]:
    """Yields results as they arrive. Closing the iterator starts no further work; daemon threads that wait for a stalled server
    do not delay the end of the process."""
    waiting, finished, stop = iter(todo), queue.SimpleQueue(), threading.Event()
    lock = threading.Lock()

    def run() -> None:
        while not stop.is_set():
            with lock:
                conversation = next(waiting, None)
            if conversation is None:
                return
            finished.put(work(conversation))

    for _ in range(workers):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in todo:
            yield finished.get()
    finally:
        stop.set()
