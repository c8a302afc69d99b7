"""A Python function as an annotator: found, called, seeded, refused."""

import random
import sys
import types

import numpy as np
import pytest
from annotator_kit import ITEMS

from llmkd.annotators.base import Annotator, Item
from llmkd.annotators.checks import checked
from llmkd.annotators.rule import RuleAnnotator
from llmkd.errors import AnnotatorError, MissingFileError, RecipeError
from llmkd.labels.preference import Scores, Votes


def rule_file(tmp_path, text, name="rules.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_all_responses_at_once(tmp_path):
    path = rule_file(
        tmp_path, "def longest(prompt, responses):\n    return list(map(len, responses))"
    )
    rule = RuleAnnotator(f"{path}:longest")
    assert isinstance(rule, Annotator) and rule.name == f"{path}:longest"
    found = checked(rule, ITEMS)
    assert [one.scores_K.tolist() for one in found] == [[5, 25, 4], [4, 23]]


def test_one_response_at_a_time_is_told_by_the_name(tmp_path):
    path = rule_file(
        tmp_path, "def score(prompt, response):\n    return len(response) - len(prompt)"
    )
    found = RuleAnnotator(f"{path}:score").annotate(ITEMS)
    assert isinstance(found[1], Scores) and found[1].scores_K.tolist() == [4 - 26, 23 - 26]


def test_a_function_of_an_installed_module(monkeypatch):
    module = types.ModuleType("my_rules")
    module.votes = lambda prompt, responses: (2, 3)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rules", module)
    (found,) = RuleAnnotator("my_rules:votes").annotate(ITEMS[1:])
    assert isinstance(found, Votes) and found.wins_KK.tolist() == [[0, 2], [1, 0]]


def test_a_file_may_hold_dataclasses(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass W:\n    n: int = 2\n"
        "def score(prompt, response): return W().n\n"
    )
    assert RuleAnnotator(f"{rule_file(tmp_path, text)}:score").annotate(ITEMS)


def test_a_function_itself():
    rule = RuleAnnotator(lambda prompt, responses: 0.5, name="mine")
    assert rule.name == "mine" and rule.annotate(ITEMS[1:])[0].logits()[0, 1] == 0.5


def test_what_it_is_given_is_its_own():
    chat = [{"role": "user", "content": "hi"}]

    def vandal(prompt, responses):
        prompt[0]["content"] = "gone"
        responses.clear()
        return [0, 1]

    item = Item(3, chat, ("a", "b"))
    RuleAnnotator(vandal).annotate([item])
    assert chat == [{"role": "user", "content": "hi"}] and item.responses == ("a", "b")


def test_the_seed_is_that_of_run_and_row_not_of_the_order_of_calls():
    def draw(prompt, responses, *, seed):
        rng = random.Random(seed)
        return [rng.random() for _ in responses]

    one, again = RuleAnnotator(draw, seed=5), RuleAnnotator(draw, seed=5)
    forth, back = one.annotate(ITEMS), again.annotate(ITEMS[::-1])[::-1]
    for a, b in zip(forth, back, strict=True):
        assert a.scores_K.tolist() == b.scores_K.tolist()
    other = RuleAnnotator(draw, seed=6)
    assert other.annotate(ITEMS)[0].scores_K.tolist() != forth[0].scores_K.tolist()
    assert other.fingerprint != one.fingerprint == again.fingerprint
    row_8 = one.annotate([Item(8, ITEMS[0].prompt, ITEMS[0].responses)])
    assert row_8[0].scores_K.tolist() != forth[0].scores_K.tolist()


def test_seeds_of_single_responses_differ_and_go_with_the_response():
    seen = []

    def noise(prompt, response, seed):
        seen.append(seed)
        return np.random.default_rng(seed).normal()

    rule = RuleAnnotator(noise)
    (forth,) = rule.annotate([Item(0, "p", ("a", "b", "c"))])
    (back,) = rule.annotate([Item(0, "p", ("c", "b", "a"))])
    assert len(set(seen)) == 3 and all(0 <= seed < 2**32 for seed in seen)
    assert forth.scores_K.tolist() == back.scores_K[::-1].tolist()


def test_the_fingerprint_is_that_of_the_whole_file_and_the_function(tmp_path):
    text = "LIMIT = 3\ndef a(prompt, response): return LIMIT\ndef b(prompt, response): return 1\n"
    path = rule_file(tmp_path, text)
    first = RuleAnnotator(f"{path}:a", seed=1)
    assert first.fingerprint == RuleAnnotator(f"{path}:a", seed=2).fingerprint  # it takes no seed
    assert first.fingerprint != RuleAnnotator(f"{path}:b").fingerprint
    rule_file(tmp_path, text.replace("LIMIT = 3", "LIMIT = 4"))
    changed = RuleAnnotator(f"{path}:a")
    assert changed.fingerprint != first.fingerprint
    assert changed.annotate(ITEMS)[0].scores_K.tolist() == [4, 4, 4]  # no stale module
    copied = rule_file(tmp_path, path.read_text(), "elsewhere.py")
    assert RuleAnnotator(f"{copied}:a").fingerprint == changed.fingerprint


@pytest.mark.parametrize(
    "given, kind, problem",
    [
        ("rules.py", RecipeError, "names no function"),
        ("{folder}/rules.py:", RecipeError, "names no function"),
        ("{folder}/rule.py:score", MissingFileError, "no such file"),
        ("{folder}/rules.py:scor", RecipeError, "did you mean 'score'"),
        ("{folder}/rules.py:LIMIT", RecipeError, "LIMIT is no function"),
        ("no_such_module_here:f", RecipeError, "cannot be imported: raised ModuleNotFoundError"),
        ("{folder}/broken.py:f", RecipeError, "raised ZeroDivisionError.*broken.py, line 2"),
        ("{folder}/rules.py:three", RecipeError, r"takes \(a, b, c\), not \(prompt, responses\)"),
        ("{folder}/rules.py:swapped", RecipeError, r"takes \(response, prompt\)"),
        ("{folder}/rules.py:alone", RecipeError, r"takes \(response\)"),
        ("{folder}/rules.py:later", RecipeError, "is async"),
    ],
)
def test_what_names_no_rule(tmp_path, given, kind, problem):
    rule_file(tmp_path, "\n1 / 0\n", "broken.py")
    rule_file(
        tmp_path,
        "LIMIT = 3\n"
        "def score(prompt, response): return 1\n"
        "def three(a, b, c): return 1\n"
        "def swapped(response, prompt): return 1\n"
        "def alone(response): return 1\n"
        "async def later(prompt, response): return 1\n",
    )
    with pytest.raises(kind, match=problem):
        RuleAnnotator(given.replace("{folder}", str(tmp_path)))


def test_no_function_at_all():
    with pytest.raises(RecipeError, match="function: 3: is no function"):
        RuleAnnotator(3)  # type: ignore[arg-type]


def test_a_function_that_raises_midway_names_the_row(tmp_path):
    path = rule_file(
        tmp_path, "def f(prompt, response):\n    return 1 if 'cat' in prompt else 1 / 0"
    )
    with pytest.raises(AnnotatorError, match="row 1: raised ZeroDivisionError") as caught:
        RuleAnnotator(f"{path}:f").annotate(ITEMS)
    assert "rules.py, line 2" in str(caught.value) and f"{path}:f" in str(caught.value)


@pytest.mark.parametrize("answer, problem", [(float("nan"), "finite"), ("good", "no number")])
def test_a_function_that_returns_nonsense_names_the_row(answer, problem):
    with pytest.raises(AnnotatorError, match=f"row 0: .*{problem}"):
        RuleAnnotator(lambda prompt, response: answer, name="mine").annotate(ITEMS)
