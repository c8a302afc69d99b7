"""A judge behind any OpenAI-compatible server: pairs in both orders, or a level a response."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkd.annotators.base import Item
from llmkd.annotators.server_cache import Budget, BudgetSpentError, Cache, Reply
from llmkd.annotators.server_client import BadRequestError, Client
from llmkd.annotators.server_config import ServerSettings
from llmkd.annotators.templates import cut_to, level_question, level_score, pair_question
from llmkd.annotators.verdicts import letter_logit, level_from_logprobs, read_letter, read_level
from llmkd.errors import AnnotatorError
from llmkd.files import digest
from llmkd.labels.preference import Annotation, Logits, Scores, Votes
from llmkd.labels.votes import both_orders, vote_logit

logger = logging.getLogger(__name__)

TOP_LOGPROBS = 20  # as many as OpenAI and vLLM list
RETRY_TEMPERATURE = 0.7  # a judge at 0 would say the same nonsense again
COUNTED = ("questions", "calls", "cached", "tokens", "nonsense", "unanswered", "cut")
HOPELESS = 8  # questions without one usable answer: it is not going to get better


@dataclass
class _Answer:
    """`told`: logit of A (pair) or mean and variance (level) from log-probabilities; `said`: what
    the texts say, wins of A or values of levels; both empty for nonsense.
    """

    told: Any = None
    said: list[float] = field(default_factory=list)


class ServerAnnotator:
    """Asks `model` at `url`; further keys are those of `ServerSettings`.

    mode pair: every pair in both orders, K (K - 1) questions a prompt, `samples` answers each.
    With log-probabilities one answer a question gives log P(A) - log P(B), and half the difference
    of the two orders is the logit (`Logits`); without, each answer is a vote (`Votes`). A pair of
    which an order was never answered counts as not asked. mode level: K questions a prompt, the
    score's mean and variance over the scale (`Scores`).

    `counts` says what it came to, `leans` holds for each item of the last call [K, K] the logit
    that whichever response was shown first is preferred (None in mode level), `example` an answer
    that was not understood. Every answer is kept in `cache_dir` at once.
    """

    __signature__ = inspect.signature(ServerSettings)  # what a recipe's mapping may hold

    def __init__(self, url: str, model: str, **settings: Any) -> None:
        self.settings = ServerSettings(url=url, model=model, **settings)
        self.name = self.settings.name or f"server:{model}"
        s = self.settings
        self._client = Client(url, s.api_key_env, s.timeout, s.retries)
        self._cache = Cache(s.answers)
        self._budget = Budget(s.answers, self.name, s.max_calls, s.max_tokens_spent)
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._no_logprobs = s.use_logprobs == "false"
        self._counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
        self._usable = 0
        self.leans: list[np.ndarray | None] = []
        self.example: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of model, texts and settings; not of the address, which may change on the way."""
        return digest(self.settings.deciding())

    @property
    def counts(self) -> dict[str, int]:
        """What this object did: questions asked, calls and tokens paid, answers out of the cache,
        nonsense, questions without any usable answer, texts that were cut, calls sent again.
        """
        return {**self._counts, "retried": self._client.retried}

    def load(self, device: Any) -> None:
        """Nothing: the model lives elsewhere."""

    def release(self) -> None:
        """Nothing to give back."""

    def annotate(self, items: Sequence[Item]) -> list[Annotation]:
        """One annotation an item. AnnotatorError for a server that cannot be asked, a spent budget,
        and a judge whose every answer so far is nonsense.
        """
        pair = self.settings.mode == "pair"
        asked = [self._pairs(item) if pair else self._levels(item) for item in items]
        answers = self._answers({text for questions in asked for text in questions.values()})
        self._check_hope()
        self.leans, found = [], []
        for item, questions in zip(items, asked, strict=True):
            mine = {key: answers[text] for key, text in questions.items()}
            annotation, lean = (_of_pairs if pair else self._of_levels)(len(item.responses), mine)
            found.append(annotation)
            self.leans.append(lean)
        return found

    def _pairs(self, item: Item) -> dict[Any, str]:
        """Question by (i shown as A, j as B)."""
        s, found = self.settings, {}
        for i, a in enumerate(item.responses):
            for j, b in enumerate(item.responses):
                if i != j:
                    prompt, (first, second) = self._cut(item, [a, b])
                    found[i, j] = pair_question(s.text, prompt, first, second)
        return found

    def _levels(self, item: Item) -> dict[Any, str]:
        s, found = self.settings, {}
        for i, response in enumerate(item.responses):
            prompt, (only,) = self._cut(item, [response])
            found[i] = level_question(s.text, prompt, only, tuple(s.scale))
        return found

    def _cut(self, item: Item, responses: list[str]) -> tuple[Any, list[str]]:
        most = self.settings.max_chars
        if most is None:
            return item.prompt, responses
        prompt, responses, cut = cut_to(most - len(self.settings.text), item.prompt, responses)
        self._counts["cut"] += cut
        return prompt, responses

    def _answers(self, texts: set[str]) -> dict[str, _Answer]:
        """Ask every question, `concurrency` at a time; the first failure stops all."""
        self._client.stop.clear()
        self._failed = None
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge")
        try:
            jobs = {text: pool.submit(self._guarded, text) for text in sorted(texts)}
            wait(jobs.values())
        except BaseException:
            self._client.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        if isinstance(self._failed, BudgetSpentError):
            raise self._budget.spent_error()  # with the calls that were under way then
        if self._failed is not None:
            raise self._failed
        return {text: job.result() for text, job in jobs.items()}

    def _guarded(self, text: str) -> _Answer:
        if self._client.stop.is_set():
            return _Answer()
        try:
            answer = self._ask(text)
        except BaseException as error:
            with self._lock:
                self._failed = self._failed or error
            self._client.stop.set()
            return _Answer()
        usable = answer.told is not None or bool(answer.said)
        self._count(questions=1, unanswered=not usable)
        with self._lock:
            self._usable += usable
        return answer

    def _ask(self, text: str) -> _Answer:
        answer = _Answer()
        for sample in range(self.settings.samples):
            with_top = sample == 0 and not self._no_logprobs
            reply = self._reply(text, sample, with_top)
            told, said = self._read(reply)
            if told is None and said is None:
                self._note_nonsense(reply)
                reply = self._reply(text, sample, with_top, again=True)
                told, said = self._read(reply)
                if told is None and said is None:
                    self._note_nonsense(reply)
            if said is not None:
                answer.said.append(said)
            if told is not None:
                answer.told = told
                return answer  # further samples are of the distribution that is known now
            if self.settings.use_logprobs == "true":
                break
        return answer

    def _read(self, reply: Reply) -> tuple[Any, float | None]:
        """What an answer's log-probabilities tell and what its text says."""
        s = self.settings
        if s.mode == "level":
            told = level_from_logprobs(reply.top, s.scale)
            said = read_level(reply.text, s.scale)
        else:
            told = letter_logit(reply.top, reply.text)
            said = read_letter(reply.text)
            if said is None and told is not None:
                said = 0.5 + 0.5 * float(np.sign(told))
        return (told, None if s.use_logprobs == "true" and told is None else said)

    def _reply(self, text: str, sample: int, with_top: bool, again: bool = False) -> Reply:
        """Out of the cache, or asked, paid and kept."""
        body = self.settings.body(text)
        if again:
            body["temperature"] = max(body["temperature"], RETRY_TEMPERATURE)
        if with_top:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        key = digest({"judge": self.name, "body": body, "sample": sample, "again": again})
        if (known := self._cache.get(key)) is not None:
            self._count(cached=1)
            return self._checked(known, with_top)
        self._budget.take()
        try:
            answer = self._client.ask(body)
        except BadRequestError:
            self._budget.give_back()
            if not with_top or self.settings.use_logprobs == "true":
                raise
            self._no_logprobs = True  # perhaps that is what it does not take
            return self._reply(text, sample, False, again)
        except BaseException:
            self._budget.give_back()
            raise
        reply = _parsed(answer)
        self._budget.pay(reply.tokens)
        self._cache.put(key, reply, body)
        self._count(calls=1, tokens=reply.tokens)
        self._check_cost(reply)
        return self._checked(reply, with_top)

    def _checked(self, reply: Reply, with_top: bool) -> Reply:
        s = self.settings
        if with_top and s.use_logprobs == "true" and reply.top is None:
            raise AnnotatorError.of(
                "use_logprobs",
                "true",
                f"{self._client.shown} gives no log-probabilities of its answers",
                "use_logprobs: auto takes the text where there are none; samples: 5 gives votes",
            )
        return reply

    def _check_cost(self, reply: Reply) -> None:
        s = self.settings
        if s.max_tokens_spent is not None and not reply.tokens:
            raise AnnotatorError.of(
                "max_tokens_spent",
                s.max_tokens_spent,
                f"{self._client.shown} does not say what an answer cost (usage.total_tokens)",
                "max_calls limits the calls instead",
            )

    def _note_nonsense(self, reply: Reply) -> None:
        self._count(nonsense=1)
        with self._lock:
            first, self.example = self.example is None, self.example or reply.text[:200]
        if first:
            logger.warning("%s: an answer was not understood: %r", self.name, self.example)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number

    def _check_hope(self) -> None:
        if self._usable or self._counts["unanswered"] < HOPELESS:
            return
        wanted = "A or B" if self.settings.mode == "pair" else ", ".join(self.settings.scale)
        raise AnnotatorError.of(
            "annotators",
            self.name,
            f"not one of {self._counts['unanswered']} answers can be understood, e.g. "
            f"{self.example!r}",
            f"the template must ask for {wanted} and nothing else",
            f"max_tokens ({self.settings.max_tokens}) may cut the answer off: a model that thinks "
            "first needs more",
        )

    def _of_levels(self, count: int, answers: Mapping[Any, _Answer]) -> tuple[Annotation, None]:
        """Scores, or logits of the pairs of which both responses got one."""
        mean_K, variance_K = np.full(count, math.nan), np.full(count, math.nan)
        values_L = np.array(list(self.settings.scale.values()))
        for i, answer in answers.items():
            if answer.told is not None:
                mean_K[i], variance_K[i] = answer.told
            elif answer.said:
                seen_L = np.array([sum(v == said for said in answer.said) for v in values_L])
                with np.errstate(divide="ignore"):
                    mean_K[i], variance_K[i] = level_score(np.log(seen_L), values_L)
        scored = int(np.isfinite(mean_K).sum())
        if scored == count:
            return Scores(mean_K, variance_K), None
        if scored < 2:
            return _no_votes(count), None
        known_K, unknown = np.nan_to_num(mean_K), np.isnan(mean_K)
        logits_KK = Scores(known_K, np.nan_to_num(variance_K, nan=1.0)).logits()
        logits_KK[unknown, :] = logits_KK[:, unknown] = math.nan
        return Logits(logits_KK), None


def _of_pairs(count: int, answers: Mapping[Any, _Answer]) -> tuple[Annotation, np.ndarray]:
    """Logits where every answer came with log-probabilities, else votes; and the leans [K, K]."""
    known = {key: a for key, a in answers.items() if a.said or a.told is not None}
    known = {(i, j): a for (i, j), a in known.items() if (j, i) in known}
    if known and all(answer.told is not None for answer in known.values()):
        logits_KK = np.full((count, count), math.nan)
        leans_KK = np.full((count, count), math.nan)
        for (i, j), answer in known.items():
            logits_KK[i, j], leans_KK[i, j] = both_orders(answer.told, known[j, i].told)
        np.fill_diagonal(logits_KK, 0.0)
        return Logits(logits_KK, leans_KK), leans_KK
    wins_KK, firsts_KK, votes_KK = (np.zeros((count, count)) for _ in range(3))
    for (i, j), answer in known.items():
        wins_KK[i, j] += sum(answer.said)
        wins_KK[j, i] += len(answer.said) - sum(answer.said)
        for a, b in ((i, j), (j, i)):
            firsts_KK[a, b] += sum(answer.said)
            votes_KK[a, b] += len(answer.said)
    leans_KK = np.where(votes_KK > 0, vote_logit(firsts_KK, votes_KK), math.nan)
    return Votes(wins_KK, votes_KK, leans_KK), leans_KK


def _parsed(answer: dict[str, Any]) -> Reply:
    choice = answer["choices"][0]
    message = choice.get("message") or {}
    text = message.get("content") if isinstance(message, dict) else None
    tokens = (answer.get("usage") or {}).get("total_tokens")
    top = (choice.get("logprobs") or {}).get("content")
    return Reply(
        text if isinstance(text, str) else "",
        _trimmed(top) if isinstance(top, list) and top else None,
        tokens if isinstance(tokens, int) and tokens >= 0 else 0,
    )


def _no_votes(count: int) -> Votes:
    return Votes(np.zeros((count, count)), np.zeros((count, count)))


def _trimmed(top: Iterable[Any]) -> list[dict[str, Any]]:
    """Tokens and numbers of `logprobs.content` without the bytes some servers add."""

    def one(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": entry.get("token"), "logprob": entry.get("logprob")}

    return [
        {**one(at), "top_logprobs": [one(e) for e in listed if isinstance(e, dict)]}
        for at in top
        if isinstance(at, dict) and isinstance(listed := at.get("top_logprobs") or [], list)
    ]
