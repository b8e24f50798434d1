"""JSON over HTTP with nothing but the standard library: one request, a stream of server-sent events, a page of text.

What went wrong is told apart by what can be done about it: ``Refused`` (HTTP 4xx: asking again gives the same) and
``Unavailable`` (5xx, 429, no connection, too slow, no JSON: asking again may help).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(ValueError):
    """The server understood and said no; ``status``: the HTTP status it said it with."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unavailable(ValueError):
    """The server gave no usable answer this time."""


def get_json(url: str, timeout_s: float) -> dict:
    """GET, a JSON object."""
    return _object(get_text(url, timeout_s), url)


def get_text(url: str, timeout_s: float) -> str:
    """GET, text."""
    with _open(urllib.request.Request(url), timeout_s) as answer:
        return answer.read().decode()


def post_json(url: str, body: dict, timeout_s: float) -> dict:
    """POST a JSON object, get one."""
    with _open(_post(url, body), timeout_s) as answer:
        return _object(answer.read(), url)


def stream_json(url: str, body: dict, timeout_s: float) -> Iterator[dict]:
    """POST a JSON object and yield the object of each ``data:`` line as it arrives, until ``[DONE]`` or the end."""
    with _open(_post(url, body), timeout_s) as answer:
        for line in answer:
            if line.startswith(b"data:"):
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                yield _object(data, url)


def _post(url: str, body: dict) -> urllib.request.Request:
    return urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})


@contextmanager
def _open(request: urllib.request.Request, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    """``timeout_s`` is the longest silence, while connecting and between two reads."""
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace").strip().replace("\n", " ")
        message = f"{url} answered HTTP {error.code}{f': {said}' if said else ''}"
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise Refused(message, error.code) from None
        raise Unavailable(message) from None
    except TimeoutError:
        raise Unavailable(f"{url} said nothing for {timeout_s:g} s") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"nothing for {timeout_s:g} s"
        raise Unavailable(f"{url} cannot be reached ({reason})") from None


def _object(text: str | bytes, url: str) -> dict:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"{url} answered something that is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise Unavailable(f"{url} answered a JSON {type(found).__name__}, wanted an object")
    return found
