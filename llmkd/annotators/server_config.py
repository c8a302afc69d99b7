"""The keys of `{type: server, ...}` and what is refused of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.annotators.templates import (
    LEVEL_TEMPLATE,
    LEVELS,
    PAIR_TEMPLATE,
    check_levels,
    check_template,
)
from llmkd.errors import RecipeError

MODES = ("pair", "level")
OWN_BODY = ("model", "messages", "temperature", "stream", "n", "logprobs", "top_logprobs")


@dataclass(kw_only=True)
class ServerSettings:
    """A judge behind a server.

    url: http(s)://host:port/v1; model: its name there; mode: pair (which of two) or level (how
    good); name: what reports call it. template: the question, with {prompt}, {response_a},
    {response_b} (pair) or {response}, {levels} (level); system: a system message before it; levels:
    words of the scale with their values. use_logprobs: auto, true, false. samples: answers a
    question where only their texts count, each a vote. temperature: default 0 for one sample, 1 for
    several. max_tokens: of an answer (null: the server's own limit). max_chars: longest question;
    longer ones lose the middle of the prompt, then of the responses. extra: further fields of the
    request.

    timeout: seconds without a byte; retries of calls that may succeed later; concurrency: calls at
    a time. max_calls, max_tokens_spent: what may be spent on this model in all runs that share the
    cache. api_key_env: NAME of the variable that holds the key. cache_dir: folder of the answers,
    by default `judge_answers` in the run's `folder`.
    """

    url: str
    model: str
    mode: str = "pair"
    name: str | None = None
    template: str | None = None
    system: str | None = None
    levels: Mapping[str, float] | None = None
    samples: int = 1
    use_logprobs: Any = "auto"
    temperature: float | None = None
    max_tokens: int | None = 16
    max_chars: int | None = None
    extra: Mapping[str, Any] | None = None
    timeout: float = 60.0
    retries: int = 5
    concurrency: int = 8
    max_calls: int | None = None
    max_tokens_spent: int | None = None
    api_key_env: str | None = None
    cache_dir: str | None = None
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise RecipeError.of("model", self.model, "must be the model's name on the server")
        if self.mode not in MODES:
            raise RecipeError.of("mode", self.mode, "no such mode", f"known: {', '.join(MODES)}")
        self.use_logprobs = str(self.use_logprobs).lower()
        if self.use_logprobs not in ("auto", "true", "false"):
            raise RecipeError.of("use_logprobs", self.use_logprobs, "must be auto, true or false")
        self.scale = check_levels("levels", LEVELS if self.levels is None else self.levels)
        self.text = self.template or (PAIR_TEMPLATE if self.mode == "pair" else LEVEL_TEMPLATE)
        check_template("template", self.text, self.mode)
        self._check_numbers()
        if self.temperature is None:
            self.temperature = 0.0 if self.samples == 1 else 1.0
        if self.temperature == 0 and self.samples > 1:
            raise RecipeError.of(
                "samples",
                self.samples,
                "answers at temperature 0 are all the same",
                "temperature: 1",
            )
        for key in self.extra or {}:
            if key in OWN_BODY:
                raise RecipeError.of(f"extra.{key}", (self.extra or {})[key], "is set by llmkd")

    def _check_numbers(self) -> None:
        whole = {"samples": 1, "retries": 0, "concurrency": 1, "max_tokens": 1, "max_chars": 1000}
        whole |= {"max_calls": 1, "max_tokens_spent": 1}
        for key, least in whole.items():
            value = getattr(self, key)
            if value is None and key not in ("samples", "retries", "concurrency"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError.of(key, value, f"must be a whole number, at least {least}")
        for key, value in (("timeout", self.timeout), ("temperature", self.temperature or 0.0)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise RecipeError.of(key, value, "must be a number, at least 0")
        if self.timeout == 0:
            raise RecipeError.of("timeout", self.timeout, "must be above 0 seconds", "timeout: 60")

    @property
    def answers(self) -> Path | None:
        """Folder of the answers; None keeps them in memory."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        return Path(self.folder) / "judge_answers" if self.folder else None

    def body(self, question: str) -> dict[str, Any]:
        """The request without what log-probabilities add."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": question})
        body = {"model": self.model, "messages": messages, "temperature": self.temperature}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return {**body, **(self.extra or {})}

    def deciding(self) -> dict[str, Any]:
        """What decides the answers."""
        keys = "model mode system samples use_logprobs temperature max_tokens max_chars extra"
        found = {key: getattr(self, key) for key in keys.split()}
        return {"server": 1, "text": self.text, "scale": self.scale, **found}
