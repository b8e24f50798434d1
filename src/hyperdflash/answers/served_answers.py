"""Requests answers from servers and stores them, many conversations at a time, for training to read.

The file's name has the server's name of the model and the fingerprint of ``target.path``; the user vouches that both have the
same weights. An answer depends only on its own conversation, so a larger corpus requests only its new conversations, and a
killed job repeats only its open requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.answers.answer_server import AnswerClient, AnswerServers, Finished, WrongServer
from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.prompts import named
from hyperdflash.leases import exclusive

# So many failures without an answer in between end the job if the servers do not answer a known conversation either. Refusals
# arrive faster than answers, so the limit for them adds the number of workers.
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
) -> None:
    """Requests every conversation that ``path`` has no answer to, and appends the answers as they arrive.

    ValueError names the failed conversations at the end, or as soon as several fail in a row. A conversation that every server
    refuses is left out for good if the servers still answer another one at the end.
    """
    title = f"answers of {servers.model}"
    busy = f"another process is filling {path}: wait for it, or end it"
    with exclusive(path.parent, f"leases/{path.stem}", wait_s=0, busy=busy):
        answers = AnswerFile(path, conversations)
        todo = answers.missing(conversations)
        print(f"{title}: {len(conversations) - len(todo):,} of {len(conversations):,} are in {path}", flush=True)
        if not todo:
            return
        servers.check()
        client = AnswerClient(servers, tokenizer, settings)
        workers = min(len(todo), servers.concurrency * len(servers.servers))
        known = next((c for c in conversations if answers.answered(c)), None)  # answered before
        from_text = tokens = in_a_row = 0
        left_out: dict[str, str] = {}
        failed: dict[str, Finished] = {}

        def keep(one: Finished) -> None:
            answers.append(one.documents, one.left_out)
            if one.left_out:
                left_out[one.conversation.id] = str(one.error or one.left_out)

        def still_answering() -> bool:
            return known is not None and client.answer(known).error is None

        with (
            tqdm(total=len(todo), desc=title, unit="doc", mininterval=2) as bar,
            ThreadPool(workers) as threads,  # a thread that waits for a stalled server does not delay the end of the process
        ):
            for one in threads.imap_unordered(client.answer, todo):
                bar.update()
                if isinstance(one.error, WrongServer):
                    raise one.error
                if one.error is not None:
                    failed[one.conversation.id] = one
                    in_a_row += 1
                    if in_a_row >= min(_IN_A_ROW + (workers if one.left_out else 0), len(todo)):
                        if not still_answering():
                            break
                        in_a_row = 0
                else:
                    keep(one)
                    if one.tokens or one.left_out:  # not for a prompt without room, which no server received
                        known, in_a_row = one.conversation, 0
                    from_text, tokens = from_text + one.from_text, tokens + one.tokens
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
        refused = [one for one in failed.values() if one.left_out]
        if refused and still_answering():
            for one in refused:
                keep(failed.pop(one.conversation.id))
    if from_text:
        print(f"{title}: {from_text:,} came as text and were encoded here (no return_token_ids)")
    if left_out:
        print(
            f"{title}: {len(left_out)} left out for good: {named(list(left_out))}; the last one's reason: "
            f"{list(left_out.values())[-1]} (to request it again, remove its line from {path})"
        )
    if failed:
        advice = "; raise the server's max_model_len, or lower corpus.max_length"
        *_, last = failed.values()
        raise ValueError(
            f"{len(failed)} of {len(todo)} conversations have no answer, the same command requests them again "
            f"({named(list(failed))}); the last one's error: {last.error}{advice if last.left_out else ''}"
        )


def served_documents(
    conversations: Sequence[Conversation],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    command: str,
) -> list[Document]:
    """Returns the stored documents in the order of ``conversations``; ValueError with ``command`` where one is absent."""
    answers = AnswerFile(path, conversations)
    if missing := answers.missing(conversations):
        raise ValueError(f"{len(missing):,} of {len(conversations):,} answers are not in {path}: run `{command}` first")
    print(f"target answers: all {len(conversations):,} are in {path}", flush=True)
    return answers.ordered(conversations, settings, tokenizer)
