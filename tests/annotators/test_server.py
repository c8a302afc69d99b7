"""A judge behind a server, against a server of this process."""

import inspect
import logging
import math
import socket
import threading
import time

import numpy as np
import pytest
from annotators.server_kit import ChatServer, says, shown

from llmkd.annotators import server_client
from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.checks import checked
from llmkd.annotators.server import ServerAnnotator
from llmkd.annotators.server_cache import Budget
from llmkd.annotators.server_client import endpoint
from llmkd.errors import AnnotatorError, RecipeError
from llmkd.labels.preference import Logits, Scores, Votes

ITEMS = [
    Item(0, "Say hi.", ("hi", "hello there", "no")),
    Item(7, [{"role": "user", "content": "Count."}], ("1 2 3", "1 2")),
]
QUESTIONS = 3 * 2 + 2


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(server_client, "BACKOFF", 0.01)
    made = []

    def start(reply):
        made.append(ChatServer(reply))
        return made[-1]

    yield start
    for server in made:
        server.close()


def longer_wins(body, number):
    first, second = shown(body)
    return says("A" if len(first) > len(second) else "B")


def judge(server, **settings):
    defaults = {"retries": 2, "timeout": 5, "concurrency": 4}
    return ServerAnnotator(server.url, "m", **{**defaults, **settings})


def test_it_is_an_annotator():
    one = ServerAnnotator("http://localhost:1", "m")
    assert isinstance(one, Annotator) and one.name == "server:m"
    assert "url" in inspect.signature(ServerAnnotator).parameters
    one.load(None)
    one.release()


def test_log_probabilities_of_both_orders_give_logits(serve):
    def reply(body, number):  # logit that the longer one is better 2, lean towards the first 1
        first, second = shown(body)
        gap = (2.0 if len(first) > len(second) else -2.0) + 1.0
        p = 1 / (1 + math.exp(-gap))
        return says("A", {"A": math.log(p) - 0.1, "B": math.log(1 - p) - 0.1, "x": -9.0})

    server = serve(reply)
    found = checked(one := judge(server), ITEMS)
    assert all(isinstance(annotation, Logits) for annotation in found)
    lengths = [len(response) for response in ITEMS[0].responses]
    for i in range(3):
        for j in range(3):
            if lengths[i] != lengths[j]:
                sign = np.sign(lengths[i] - lengths[j])
                assert found[0].logits_KK[i, j] == pytest.approx(2.0 * sign)
                assert found[0].first_KK[i, j] == pytest.approx(1.0)
    assert found[1].logits_KK[0, 1] == pytest.approx(2.0)
    assert one.counts["questions"] == one.counts["calls"] == len(server.bodies) == QUESTIONS
    assert one.counts["tokens"] == 10 * QUESTIONS
    assert server.bodies[0]["top_logprobs"] == 20 and server.bodies[0]["temperature"] == 0
    assert set(server.paths) == {"/v1/chat/completions"}


def test_equal_lengths_show_that_an_order_effect_cancels(serve):
    server = serve(lambda body, number: says("A", {"A": math.log(0.9), "B": math.log(0.1)}))
    found = checked(judge(server), ITEMS[1:])[0]
    assert found.logits_KK[0, 1] == pytest.approx(0.0)
    assert found.first_KK[0, 1] == pytest.approx(math.log(9))


def test_text_gives_votes_and_leans(serve):
    found = checked(one := judge(serve(longer_wins)), ITEMS[1:])[0]
    assert isinstance(found, Votes)
    np.testing.assert_array_equal(found.wins_KK, [[0, 2], [0, 0]])
    np.testing.assert_array_equal(found.votes_KK, [[0, 2], [2, 0]])
    assert one.leans[0][0, 1] == 0.0  # the first won once of two


def test_a_judge_that_always_says_a_gives_no_logit_and_a_large_lean(serve):
    one = judge(serve(lambda body, number: says("A")), samples=3)
    found = checked(one, ITEMS[1:])[0]
    np.testing.assert_array_equal(found.wins_KK, [[0, 3], [3, 0]])
    assert found.logits()[0, 1] == 0.0
    assert one.leans[0][0, 1] == pytest.approx(math.log(6.5 / 0.5))


def test_several_samples_are_several_votes_and_ties_half(serve):
    lock, answers = threading.Lock(), iter(["A", "tie", "B"] * 2)

    def reply(body, number):
        with lock:
            return says(next(answers))

    server = serve(reply)
    found = checked(judge(server, samples=3, concurrency=1), ITEMS[1:])[0]
    np.testing.assert_array_equal(found.wins_KK, [[0, 3], [3, 0]])
    np.testing.assert_array_equal(found.votes_KK, [[0, 6], [6, 0]])
    assert server.bodies[0]["temperature"] == 1.0


def test_levels_give_scores(serve):
    def reply(body, number):
        good = "hello" in body["messages"][0]["content"].split("[Response]")[1]
        return says("good" if good else "bad")

    found = checked(judge(serve(reply), mode="level"), ITEMS[:1])[0]
    assert isinstance(found, Scores)
    np.testing.assert_array_equal(found.scores_K, [1, 4, 1])
    np.testing.assert_allclose(found.variance_K, 1 / 12)


def test_levels_from_log_probabilities(serve):
    p = {"excellent": math.log(0.75), " good": math.log(0.25)}
    found = checked(judge(serve(lambda b, n: says("excellent", p)), mode="level"), ITEMS[1:])[0]
    np.testing.assert_allclose(found.scores_K, 4.75)
    np.testing.assert_allclose(found.variance_K, 0.1875 + 1 / 12)


def test_a_response_without_a_level_leaves_its_pairs_unasked(serve):
    def reply(body, number):
        response = body["messages"][0]["content"].split("[Response]\n")[1].split("\n")[0]
        return says({"hi": "good", "no": "bad"}.get(response, "hmm"))

    found = checked(judge(serve(reply), mode="level"), ITEMS[:1])[0]
    assert isinstance(found, Logits) and found.logits_KK[0, 2] > 3
    assert np.isnan(found.logits_KK[1, 0]) and np.isnan(found.logits_KK[1, 2])


def test_a_server_without_log_probabilities_is_asked_for_text(serve):
    def reply(body, number):
        if "logprobs" in body:
            return 400, {"error": {"message": "logprobs are not supported"}}, {}
        return longer_wins(body, number)

    server = serve(reply)
    one = judge(server, concurrency=1)
    assert isinstance(checked(one, ITEMS)[0], Votes)
    assert len(server.bodies) == QUESTIONS + 1 and one.counts["calls"] == QUESTIONS


def test_demanding_log_probabilities_that_are_not_there_fails(serve):
    with pytest.raises(AnnotatorError, match=r"gives no log-probabilities.*\n.*auto"):
        judge(serve(longer_wins), use_logprobs=True).annotate(ITEMS)


def test_use_logprobs_false_asks_for_none(serve):
    server = serve(longer_wins)
    judge(server, use_logprobs=False).annotate(ITEMS)
    assert all("logprobs" not in body for body in server.bodies)


def test_a_500_is_asked_again(serve):
    def reply(body, number):
        return (500, {"error": "busy"}, {}) if number == 1 else longer_wins(body, number)

    one = judge(serve(reply))
    checked(one, ITEMS)
    assert one.counts["retried"] == 1 and one.counts["calls"] == QUESTIONS


def test_retry_after_is_honoured(serve):
    times = []

    def reply(body, number):
        times.append(time.monotonic())
        if number == 1:
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.4"}
        return longer_wins(body, number)

    judge(serve(reply), concurrency=1).annotate(ITEMS[1:])
    assert times[1] - times[0] >= 0.4


def test_a_very_long_retry_after_is_said(serve):
    server = serve(lambda body, number: (429, {"error": "full"}, {"Retry-After": "7200"}))
    with pytest.raises(AnnotatorError, match="7,200 seconds"):
        judge(server).annotate(ITEMS)


def test_a_quota_that_is_used_up_is_not_asked_again(serve):
    error = {"error": {"message": "pay first", "code": "insufficient_quota"}}
    server = serve(lambda body, number: (429, error, {}))
    with pytest.raises(AnnotatorError, match="pay first"):
        judge(server, concurrency=1).annotate(ITEMS)
    assert len(server.bodies) == 1


def test_retries_end(serve):
    server = serve(lambda body, number: (503, {"error": "loading"}, {}))
    with pytest.raises(AnnotatorError, match=r"no answer in 3 tries: 503 .*loading"):
        judge(server, concurrency=1).annotate(ITEMS)
    assert len(server.bodies) == 3


def test_a_timeout_is_asked_again_and_then_said(serve):
    done = threading.Event()

    def reply(body, number):
        done.wait(5)
        return longer_wins(body, number)

    one = judge(serve(reply), timeout=0.1, retries=1, concurrency=1)
    with pytest.raises(AnnotatorError, match=r"no answer in 2 tries: no answer within 0.1 s"):
        one.annotate(ITEMS)
    done.set()
    assert one.counts["retried"] == 1


def test_connection_refused_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = ServerAnnotator(f"http://127.0.0.1:{port}", "m", retries=5)
    began = time.monotonic()
    with pytest.raises(AnnotatorError, match=r"cannot be reached.*refused(.|\n)*running"):
        one.annotate(ITEMS)
    assert time.monotonic() - began < 2 and one.counts["retried"] == 0


@pytest.mark.parametrize(
    "status, said, wanted",
    [
        (401, {"error": {"message": "no key"}}, "api_key_env.*refuses the key.*no key"),
        (404, {"error": {"message": "no model m"}}, "model: 'm'.*no model m(.|\n)*/models"),
        (400, {"error": {"message": "too long"}}, "refuses the request.*too long(.|\n)*max_chars"),
        (302, {}, "302"),
        (200, b"<html>login</html>", "does not answer like a chat server.*<html>"),
        (200, {"choices": []}, "does not answer like a chat server"),
        (200, [1], "does not answer like a chat server"),
    ],
)
def test_every_refusal_has_its_error(serve, status, said, wanted):
    server = serve(lambda body, number: (status, said, {"Location": "http://127.0.0.1:1/"}))
    with pytest.raises(AnnotatorError, match=wanted):
        judge(server, concurrency=1).annotate(ITEMS)


def test_nonsense_is_asked_once_more_warmer(serve):
    def reply(body, number):
        return longer_wins(body, number) if body["temperature"] > 0 else says("banana")

    server = serve(reply)
    one = judge(server)
    found = checked(one, ITEMS)
    assert found[0].votes_KK.sum() == 12
    assert one.counts["nonsense"] == QUESTIONS and one.counts["unanswered"] == 0
    assert one.example == "banana" and len(server.bodies) == 2 * QUESTIONS


def test_a_pair_with_one_order_unanswered_is_not_asked(serve):
    def reply(body, number):
        return says("banana") if shown(body)[0] == "hi" else longer_wins(body, number)

    one = judge(serve(reply))
    votes_KK = checked(one, ITEMS)[0].votes_KK
    np.testing.assert_array_equal(votes_KK, [[0, 0, 0], [0, 0, 2], [0, 2, 0]])
    assert one.counts["unanswered"] == 2 and one.counts["nonsense"] == 4
    assert np.isnan(one.leans[0][0, 1]) and one.leans[0][1, 2] == 0


def test_nothing_but_nonsense_is_an_error_with_an_example(serve, caplog):
    server = serve(lambda body, number: says("As an AI"))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(AnnotatorError, match=r"not one of 8 answers.*As an AI(.|\n)*max_tokens"),
    ):
        judge(server).annotate(ITEMS)
    assert "As an AI" in caplog.text


def test_an_answer_without_text_is_nonsense(serve):
    payload = {"choices": [{"message": {"content": None}}]}
    one = judge(serve(lambda body, number: payload))
    assert checked(one, ITEMS[1:])[0].votes_KK.sum() == 0 and one.counts["unanswered"] == 2


def test_a_crash_costs_no_answer_twice(serve, tmp_path):
    def reply(body, number):
        return (401, {}, {}) if number == 6 else longer_wins(body, number)

    server = serve(reply)
    with pytest.raises(AnnotatorError):
        judge(server, cache_dir=str(tmp_path), concurrency=1).annotate(ITEMS)
    again = judge(server, cache_dir=str(tmp_path))
    found = again.annotate(ITEMS)
    assert again.counts["cached"] == 5 and again.counts["calls"] == QUESTIONS - 5
    server.close()
    elsewhere = ServerAnnotator("http://127.0.0.1:9/v1", "m", folder=None, cache_dir=str(tmp_path))
    for one, other in zip(found, elsewhere.annotate(ITEMS), strict=True):
        np.testing.assert_array_equal(one.wins_KK, other.wins_KK)
    assert elsewhere.counts["calls"] == 0 and elsewhere.fingerprint == again.fingerprint
    assert not list(tmp_path.rglob("*.part"))


def test_answers_live_in_the_runs_folder(serve, tmp_path):
    judge(serve(longer_wins), folder=tmp_path).annotate(ITEMS)
    assert len(list((tmp_path / "judge_answers").rglob("*.json"))) == QUESTIONS


def test_a_damaged_answer_is_asked_again(serve, tmp_path):
    server = serve(longer_wins)
    judge(server, cache_dir=str(tmp_path)).annotate(ITEMS)
    path = next(tmp_path.rglob("*.json"))
    path.write_text(path.read_text()[:20])
    one = judge(server, cache_dir=str(tmp_path))
    one.annotate(ITEMS)
    assert one.counts["calls"] == 1


def test_equal_questions_are_asked_once(serve):
    server = serve(longer_wins)
    found = judge(server).annotate([ITEMS[1], Item(8, "Count.", ("1 2 3", "1 2"))])
    np.testing.assert_array_equal(found[0].wins_KK, found[1].wins_KK)
    assert len(server.bodies) == 2


def test_a_budget_of_calls_stops_and_goes_on_when_raised(serve, tmp_path):
    server = serve(longer_wins)
    kept = {"cache_dir": str(tmp_path)}
    with pytest.raises(AnnotatorError, match=r"max_calls: 3.*spent: 3 calls, 30 tokens"):
        judge(server, max_calls=3, **kept).annotate(ITEMS)
    with pytest.raises(AnnotatorError, match="spent: 3 calls"):  # a new process has no new budget
        judge(server, max_calls=3, **kept).annotate(ITEMS)
    assert len(server.bodies) == 3
    one = judge(server, max_calls=QUESTIONS, **kept)
    one.annotate(ITEMS)
    assert len(server.bodies) == QUESTIONS and one.counts["calls"] == QUESTIONS - 3


def test_a_budget_of_tokens_stops(serve):
    server = serve(longer_wins)
    with pytest.raises(AnnotatorError, match=r"max_tokens_spent: 25.*3 calls, 30 tokens(.|\n)*dir"):
        judge(server, max_tokens_spent=25, concurrency=1).annotate(ITEMS)
    assert len(server.bodies) == 3


def test_a_budget_of_tokens_needs_a_server_that_counts(serve):
    payload = {"choices": [{"message": {"content": "A"}}]}
    with pytest.raises(AnnotatorError, match=r"does not say what an answer cost"):
        judge(serve(lambda body, number: payload), max_tokens_spent=99).annotate(ITEMS)


def test_two_processes_share_a_budget(tmp_path):
    one, other = (Budget(tmp_path, "m", 3, None) for _ in range(2))
    for budget in (one, other, one):
        budget.take()
        budget.pay(5)
    assert one.spent() == other.spent() == (3, 15)
    with pytest.raises(AnnotatorError, match="max_calls"):
        other.take()
    assert Budget(tmp_path, "another model", 3, None).spent() == (0, 0)


def test_a_failed_call_costs_nothing(tmp_path):
    budget = Budget(tmp_path, "m", 1, None)
    budget.take()
    budget.give_back()
    budget.take()
    with pytest.raises(AnnotatorError):
        budget.take()


def test_the_key_is_sent_and_nowhere_else(serve, tmp_path, monkeypatch, caplog):
    key = "sk-verysecret/123"
    monkeypatch.setenv("JUDGE_KEY", key)

    def reply(body, number):
        if number > 2:
            return 401, {"error": {"message": f"Incorrect API key provided: {key}"}}, {}
        return says(f"what is {key}?")  # a server that says it back

    server = serve(reply)
    one = judge(server, api_key_env="JUDGE_KEY", cache_dir=str(tmp_path), concurrency=1)
    with caplog.at_level(logging.DEBUG), pytest.raises(AnnotatorError) as raised:
        one.annotate(ITEMS)
    assert server.headers[0]["Authorization"] == f"Bearer {key}"
    error, seen = raised.value, []
    while error is not None:
        seen.append(f"{error!r} {error.__dict__}")
        error = error.__cause__ or error.__context__
    seen += [caplog.text, repr(one), str(one.counts), str(one.example), one.fingerprint]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert "JUDGE_KEY" in seen[0] and not any(key in text for text in seen)
    assert any("what is ***?" in text for text in seen)


def test_a_key_that_is_missing_odd_or_in_the_wrong_place_is_refused(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(RecipeError, match="no such environment variable"):
        ServerAnnotator("http://localhost:1", "m", api_key_env="NO_KEY")
    with pytest.raises(RecipeError) as raised:
        ServerAnnotator("http://localhost:1", "m", api_key_env="sk-abc-123")
    assert "sk-abc" not in str(raised.value)
    monkeypatch.setenv("ODD_KEY", "two\nlines")
    with pytest.raises(RecipeError) as raised:
        ServerAnnotator("http://localhost:1", "m", api_key_env="ODD_KEY")
    assert "two" not in str(raised.value)
    with pytest.raises(RecipeError) as raised:
        ServerAnnotator("http://me:pass@host/v1", "m")
    assert "pass" not in str(raised.value)


def test_redirects_carry_no_key_away(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    thief = serve(longer_wins)
    server = serve(lambda body, number: (307, {}, {"Location": thief.url}))
    with pytest.raises(AnnotatorError, match="307"):
        judge(server, api_key_env="JUDGE_KEY").annotate(ITEMS)
    assert not thief.bodies


@pytest.mark.parametrize(
    "url, wanted",
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/v1/", "http://h:8000/v1/chat/completions"),
        ("https://h/openai/v1/chat/completions", "https://h/openai/v1/chat/completions"),
        ("https://h/x?api-version=1", "https://h/x/chat/completions?api-version=1"),
    ],
)
def test_urls_may_stop_early(url, wanted):
    assert endpoint(url) == wanted


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"mode": "triple"}, "mode"),
        ({"use_logprobs": "maybe"}, "use_logprobs"),
        ({"samples": 0}, "samples"),
        ({"samples": 3, "temperature": 0}, "samples"),
        ({"temperature": -1}, "temperature"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"concurrency": 1.5}, "concurrency"),
        ({"max_calls": 0}, "max_calls"),
        ({"max_tokens": True}, "max_tokens"),
        ({"template": "{prompt}"}, "template"),
        ({"levels": {"good": 1}}, "levels"),
        ({"extra": {"model": "other"}}, "extra.model"),
        ({"url": "localhost:8000"}, "url"),
        ({"model": " "}, "model"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, key):
    with pytest.raises(RecipeError, match=f"^{key}"):
        ServerAnnotator(**{"url": "http://localhost:1", "model": "m", **settings})


def test_what_decides_the_answers_is_in_the_fingerprint():
    def mark(**settings):
        url = settings.pop("url", "http://localhost:1")
        return ServerAnnotator(url, "m", **settings).fingerprint

    same = [mark(), mark(url="http://elsewhere:2"), mark(timeout=1), mark(retries=0, name="x")]
    other = [mark(temperature=0.5), mark(mode="level"), mark(samples=2), mark(system="You judge.")]
    assert len(set(same)) == 1 and len({*same, *other}) == 5


def test_long_texts_are_cut_and_counted(serve):
    server = serve(longer_wins)
    one = judge(server, max_chars=1000)
    one.annotate([Item(0, "p" * 2000, ("a" * 10, "b" * 20)), ITEMS[1]])
    longest = max(len(body["messages"][0]["content"]) for body in server.bodies)
    assert longest <= 1000 and one.counts["cut"] == 2
    assert any("a" * 10 in body["messages"][0]["content"] for body in server.bodies)


def test_extra_fields_and_a_system_message_are_sent(serve):
    server = serve(longer_wins)
    extra = {"max_completion_tokens": 9}
    judge(server, extra=extra, system="Be fair.", max_tokens=None).annotate(ITEMS)
    body = server.bodies[0]
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be fair."}
