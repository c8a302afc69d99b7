"""One call of an OpenAI-compatible server: what to send again, and what every failure means."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkd import __version__
from llmkd.errors import AnnotatorError, RecipeError

BACKOFF = 0.5  # seconds before the second try, doubled for each further one
LONGEST_BACKOFF = 30.0
LONGEST_WAIT = 600.0  # seconds a server may ask for in Retry-After; beyond, it is said instead
LARGEST_ANSWER = 16 << 20  # bytes
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PATH = "/chat/completions"
TRANSIENT = (TimeoutError, ConnectionResetError, BrokenPipeError, http.client.HTTPException)


class BadRequestError(AnnotatorError):
    """The server refuses this request (400 or 422); another one may be taken."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    # A redirected request would carry the key to a host nobody named.
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class Client:
    """Sends bodies to `url`, several threads at a time.

    Timeouts, broken connections, 429 and 5xx are tried again `retries` times, after a time that
    doubles, is drawn from half to one and a half of that, and is never shorter than the server's
    Retry-After. The key stands in the environment variable `api_key_env`; it is taken out of
    everything the server says.
    """

    url: str
    api_key_env: str | None
    timeout: float
    retries: int
    stop: threading.Event = field(default_factory=threading.Event)
    retried: int = 0

    def __post_init__(self) -> None:
        self.endpoint = endpoint(self.url)
        self.shown = self.endpoint.partition("?")[0]
        self._key = _read_key(self.api_key_env)
        host = urllib.parse.urlsplit(self.endpoint).hostname
        direct = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirects, *direct)

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer as JSON; AnnotatorError that says what to do about a failure."""
        for attempt in range(self.retries + 1):
            try:
                return self._once(body)
            except _AgainError as again:
                last = again
            if attempt < self.retries:
                self.retried += 1
                if self.stop.wait(self._wait(attempt, last.after)):
                    break
        raise AnnotatorError.of(
            "url",
            self.shown,
            f"gave no answer in {attempt + 1} tries: {last}",
            "the same command goes on from the cache once the server answers again",
            f"wait longer for an answer: timeout (now {self.timeout:g} s), retries",
            "ask less at a time: concurrency",
        ) from None

    def _wait(self, attempt: int, after: float | None) -> float:
        if after is not None and after > LONGEST_WAIT:
            raise AnnotatorError.of(
                "url",
                self.shown,
                f"asks to be left alone for {after:,.0f} seconds (Retry-After)",
                "run the same command again after that; what was answered is in the cache",
            )
        pause = min(BACKOFF * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.5, 1.5)
        return max(pause, after or 0.0)

    def _once(self, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": f"llmkd/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint, data=data, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                text = self._clean(answer.read(LARGEST_ANSWER))
        except urllib.error.HTTPError as error:
            raise self._refused(error, body) from None
        except urllib.error.URLError as error:
            raise self._unreachable(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        return self._parsed(text)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except json.JSONDecodeError:
            answer = None
        choices = answer.get("choices") if isinstance(answer, dict) else None
        usable = isinstance(choices, list) and choices and isinstance(choices[0], dict)
        if not isinstance(answer, dict) or not usable:
            raise AnnotatorError.of(
                "url",
                self.shown,
                f"does not answer like a chat server; it said {_short(text)!r}",
                "it must speak OpenAI's /v1/chat/completions (vLLM, llama.cpp, TGI, Ollama do)",
            )
        return answer

    def _clean(self, data: bytes) -> str:
        text = data.decode("utf-8", "replace")
        if not self._key:
            return text
        return text.replace(self._key, "***").replace(self._key.replace("/", "\\/"), "***")

    def _unreachable(self, reason: Any) -> Exception:
        if isinstance(reason, TRANSIENT) and not isinstance(reason, ConnectionRefusedError):
            slow = isinstance(reason, TimeoutError)
            what = f"no answer within {self.timeout:g} s" if slow else type(reason).__name__
            return _AgainError(what)
        ways = ["is the server running, and is this its address and port?"]
        if isinstance(reason, ssl.SSLError):
            ways = ["http:// or https://? is the certificate valid?"]
        problem = f"cannot be reached: {reason}"
        return AnnotatorError.of("url", self.shown, problem, *ways)

    def _refused(self, error: urllib.error.HTTPError, body: Mapping[str, Any]) -> Exception:
        try:
            said = _message(self._clean(error.read(1 << 16)))
        except (OSError, http.client.HTTPException):
            said = ""
        code, what = error.code, f"{error.code} {error.reason}: {said}".rstrip(": ")
        if (code == 429 and "insufficient_quota" not in said) or code >= 500 or code == 408:
            return _AgainError(what, _retry_after(error.headers.get("Retry-After")))
        if code in (401, 403):
            how = "api_key_env: the NAME of an environment variable that holds the key"
            return AnnotatorError.of(
                "api_key_env", self.api_key_env, f"{self.shown} refuses the key ({what})", how
            )
        if code in (400, 413, 422):
            return BadRequestError.of(
                "url",
                self.shown,
                f"refuses the request ({what})",
                "a text too long for the model: max_chars cuts the prompt's middle",
                "a setting it does not know: use_logprobs: false, max_tokens: null, extra",
            )
        if code == 404:
            return AnnotatorError.of(
                "model",
                body.get("model"),
                f"or the path is not known at {self.shown} ({what})",
                f"the models it serves: curl {self.shown.removesuffix(PATH)}/models",
                "url is the part up to and with /v1",
            )
        ways = ["name the address it moved to"] if 300 <= code < 400 else []
        return AnnotatorError.of("url", self.shown, f"refuses the call ({what})", *ways)


class _AgainError(Exception):
    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


def endpoint(url: str) -> str:
    """Where to send the calls: `url` with /v1/chat/completions where it stops before that."""
    parts = urllib.parse.urlsplit(str(url).strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError.of("url", _no_login(url), "is no address", "http://localhost:8000/v1")
    if parts.username or parts.password:
        raise RecipeError.of(
            "url",
            _no_login(url),
            "holds a login, which would be written into files",
            "api_key_env: the NAME of an environment variable that holds the key",
        )
    path = parts.path.rstrip("/")
    if not path.endswith(PATH):
        path = (path or "/v1") + PATH
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _no_login(url: Any) -> str:
    text = str(url)
    scheme, mark, rest = text.rpartition("@")
    return f"{scheme.partition('://')[0]}://***@{rest}" if mark else text


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    way = "export it: the recipe holds the variable's NAME, never the key"
    if not name.isidentifier():  # perhaps the key itself: not shown
        raise RecipeError.of("api_key_env", "***", "is no name of an environment variable", way)
    key = os.environ.get(name, "").strip()
    if not key:
        raise RecipeError.of("api_key_env", name, "no such environment variable is set", way)
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError.of("api_key_env", name, "holds blanks or odd characters, not a key", way)
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _message(text: str) -> str:
    """What an error body says: OpenAI's error.message with its code, or the text itself."""
    try:
        error = json.loads(text).get("error")
    except (json.JSONDecodeError, AttributeError):
        return _short(text)
    if isinstance(error, dict):
        code = error.get("code") or error.get("type")
        return _short(f"{error.get('message', '')}" + (f" [{code}]" if code else ""))
    return _short(str(error or text))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
