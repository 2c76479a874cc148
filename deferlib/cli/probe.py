"""Asking an app how it is: is it reachable, is the handler there, has it our key, and what serves it?"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deferlib import checkup, token
from deferlib.clock import Clock
from deferlib.core.model import SECOND
from deferlib.deferred import DEFAULT_URL
from deferlib.keys import Keyring

_SECONDS = 5.0
_MOST_BYTES = 64 * 1024
_LONGEST = 300  # characters of an answer that are shown


class Answer(NamedTuple):
    """What came of the question: a report, or what is wrong."""

    report: dict[str, Any] | None = None
    problem: str = ""
    unreachable: bool = False
    milliseconds: float = 0.0


def ask(base: str, ring: Keyring, clock: Clock) -> Answer:
    """Ask the app at *base* URL, as an engine would push to it: without proxies, cookies or redirects."""
    import requests

    now, deadline = clock.now(), round(_SECONDS * SECOND)
    dispatch = checkup.question(DEFAULT_URL, now, deadline)
    signature = token.sign(ring, now, dispatch, method="GET", body=b"", deadline=deadline, base_path=urlsplit(base).path)
    session = requests.Session()
    session.trust_env = False
    headers = {token.HEADER: signature, "User-Agent": "deferlib doctor"}
    try:
        url = base + DEFAULT_URL
        with session, session.get(url, headers=headers, timeout=_SECONDS, allow_redirects=False, stream=True) as answer:
            text = _text(answer)
            return _judged(answer.status_code, answer.headers, text, answer.elapsed.total_seconds() * 1000)
    except requests.Timeout:
        return Answer(
            problem=f"does not answer within {_SECONDS:g} s: all its workers are busy, or it waits for itself",
        )
    except requests.ConnectionError as error:
        if "closed connection without response" in str(error):
            return Answer(problem="closes the connection without an answer: it speaks no HTTP, or its workers die")
        return Answer(problem=f"can't be reached: {_cause(error)}", unreachable=True)
    except (requests.RequestException, ValueError) as error:  # ValueError: a Location that isn't text
        return Answer(problem=f"gives no proper answer: {type(error).__name__}: {error}"[:_LONGEST])


def _text(answer: Any) -> str:
    """Return the beginning of an answer's body, as much of it as comes in time."""
    until, data = time.monotonic() + _SECONDS, b""
    for part in answer.iter_content(4096):
        data += part
        if len(data) >= _MOST_BYTES or time.monotonic() > until:
            break
    return data.decode("utf-8", "replace")


def _judged(status: int, headers: Any, text: str, milliseconds: float) -> Answer:
    outcome = headers.get(token.OUTCOME)
    if status == 200 and outcome == "ok":
        try:
            report = json.loads(text)
        except ValueError:
            report = None
        if isinstance(report, dict):
            return Answer(report=report, milliseconds=milliseconds)
    if outcome == "untrusted":
        return Answer(
            problem=f"has the handler, but another key than the one here: {text[:_LONGEST].strip()}. Is it another app, or "
            "the same one started in another folder, with another store? Give both the same DEFERLIB_STORE and DEFERLIB_KEY"
        )
    if outcome is not None:
        return Answer(
            problem=f"has the handler, but {token.HEADER} did not arrive: let the proxy between pass it on; or its "
            "deferlib is older than this one"
        )
    if 300 <= status < 400:
        return Answer(
            problem=f"redirects (HTTP {status} to {headers.get('Location', 'nowhere')[:100]}); an engine follows no "
            "redirect: push to where the app itself is served"
        )
    return Answer(
        problem=f"answers, but its handler is not mounted (HTTP {status} at {DEFAULT_URL}): wrap the app, "
        "app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)"
    )


def _cause(error: BaseException) -> str:
    """Return what the operating system said, without the layers around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror.lower()
        reason = seen.args[0] if seen.args and isinstance(seen.args[0], BaseException) else None
        seen = getattr(reason, "reason", None) or reason or seen.__cause__ or seen.__context__
    return "the connection fails"
