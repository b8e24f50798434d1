"""JSON over HTTP by the standard library: one request, a stream of server-sent events, a page of text.

Errors are ``Refused`` (HTTP 4xx: a retry gives the same) or ``Unavailable`` (5xx, 408, 429, no connection, too slow, no JSON: a
retry can succeed).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(ValueError):
    """The server refused the request with HTTP ``status``."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unavailable(ValueError):
    """The server gave no usable answer; a retry can succeed."""


def get_json(url: str, timeout_s: float) -> dict:
    """Sends GET and returns a JSON object."""
    return _object(get_text(url, timeout_s), url)


def get_text(url: str, timeout_s: float) -> str:
    """Sends GET and returns text."""
    with _open(urllib.request.Request(url), timeout_s) as answer:
        return answer.read().decode()


def post_json(url: str, body: dict, timeout_s: float) -> dict:
    """Sends a JSON object by POST and returns one."""
    with _open(_post(url, body), timeout_s) as answer:
        return _object(answer.read(), url)


def stream_json(url: str, body: dict, timeout_s: float) -> Iterator[dict]:
    """Sends a JSON object by POST and yields the object of each ``data:`` line as it arrives, until ``[DONE]`` or the end."""
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
    """Opens a request; ``timeout_s`` bounds the connection and each wait for data."""
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        text = error.read(500).decode(errors="replace").strip().replace("\n", " ")
        message = f"{url} answered HTTP {error.code}{f': {text}' if text else ''}"
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise Refused(message, error.code) from None
        raise Unavailable(message) from None
    except TimeoutError:
        raise Unavailable(f"{url} sent nothing for {timeout_s:g} s") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"nothing for {timeout_s:g} s"
        raise Unavailable(f"{url} cannot be reached ({reason})") from None


def _object(text: str | bytes, url: str) -> dict:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"{url} answered with something other than JSON ({error})") from None
    if not isinstance(found, dict):
        raise Unavailable(f"{url} answered a JSON {type(found).__name__}, wanted an object")
    return found
