import math

import numpy as np
import pytest

from llmkd.annotators.templates import (
    LEVELS,
    PAIR_TEMPLATE,
    check_levels,
    check_template,
    cut_to,
    level_question,
    level_score,
    pair_question,
    prompt_text,
)
from llmkd.annotators.verdicts import letter_logit, level_from_logprobs, read_letter, read_level
from llmkd.errors import RecipeError


@pytest.mark.parametrize(
    "text, wins",
    [
        ("A", 1.0),
        (" b. ", 0.0),
        ("**A**", 1.0),
        ("(B)", 0.0),
        ("A: it is shorter", 1.0),
        ("Answer: A because B is wrong", 1.0),
        ("My verdict is **B**", 0.0),
        ("Response B is better than Response A.", 0.0),
        ("first [[A]], on reflection [[B]]", 0.0),
        ("<think>A or B? A.</think>B", 0.0),
        ("<think>cut off, A", None),
        ("[[C]]", 0.5),
        ("It's a tie", 0.5),
        ("Neither.", 0.5),
        ("A good response would say so", None),  # the article
        ("Response A is worse", None),
        ("I like A and B", None),
        ("My answer is a mess", None),
        ("", None),
        ("banana", None),
    ],
)
def test_a_letter_is_read_out_of_text(text, wins):
    assert read_letter(text) == wins


@pytest.mark.parametrize(
    "text, value",
    [
        ("Good.", 4.0),
        ("rating: poor", 2.0),
        ("[[bad]]", 1.0),
        ("Fair, I think", 3.0),
        ("not good", None),
        ("good or bad", None),
        ("", None),
        ("goodness", None),
    ],
)
def test_a_level_is_read_out_of_text(text, value):
    assert read_level(text, LEVELS) == value


def test_levels_may_be_digits():
    digits = check_levels("levels", {"1": 1, "2": 2, "3": 3})
    assert read_level("Score: 2", digits) == 2 and read_level("3/3", digits) == 3
    assert read_level("23", digits) is None


def at(token, **listed):
    top = [{"token": t, "logprob": math.log(p)} for t, p in listed.items()]
    return {"token": token, "logprob": math.log(listed.get(token, 1e-6)), "top_logprobs": top}


def test_a_logit_adds_up_the_spellings_of_a_letter():
    top = [at("A", **{"A": 0.5, " A": 0.1, "B": 0.2, "the": 0.1})]
    assert letter_logit(top, "A") == pytest.approx(math.log(0.6 / 0.2))


def test_a_letter_that_is_not_listed_is_at_most_the_least_listed():
    top = [at("A", A=0.9, the=0.05, x=0.01)]
    assert letter_logit(top, "A") == pytest.approx(math.log(0.9 / 0.01))


def test_the_logit_is_read_where_the_answer_stands():
    top = [at("Answer", Answer=0.9, A=0.05, B=0.01), at(":", **{":": 1.0}), at("B", A=0.2, B=0.7)]
    assert letter_logit(top, "Answer: B") == pytest.approx(math.log(0.2 / 0.7))


def test_an_article_is_no_verdict():
    top = [at("Well", Well=0.9, A=0.06, B=0.01)]
    assert letter_logit(top, "Well, both have merits") is None
    sure = [at("Response", Response=0.5, A=0.3, B=0.1)]
    assert letter_logit(sure, "Response quality differs") == pytest.approx(math.log(3))
    assert letter_logit(None, "A") is None and letter_logit([], "A") is None
    assert letter_logit([at("tie", tie=0.6, A=0.2, B=0.2)], "tie") is None


def test_levels_from_log_probabilities_by_hand():
    # .75 excellent (of which .25 as a prefix), .25 good: mean 4.75, variance .1875, step 1.
    top = [at("excellent", excellent=0.3, **{" exc": 0.15}, good=0.15, zebra=0.4)]
    mean, variance = level_from_logprobs(top, LEVELS)
    assert mean == pytest.approx(4.75) and variance == pytest.approx(0.1875 + 1 / 12)
    assert level_from_logprobs([at("zebra", zebra=0.95, good=0.05)], LEVELS) is None


def test_a_prefix_of_several_levels_counts_for_none():
    levels = {"good": 2.0, "goofy": 1.0}
    assert level_from_logprobs([at("goo", goo=0.9, good=0.1)], levels) == pytest.approx(
        level_score(np.log([1.0, 1e-300]), np.array([2.0, 1.0]))
    )


def test_one_level_alone_has_the_variance_of_rounding():
    mean, variance = level_score(np.array([0.0, -np.inf, -np.inf]), np.array([10.0, 5.0, 0.0]))
    assert mean == 10.0 and variance == pytest.approx(25 / 12)


def test_braces_in_a_response_are_text():
    asked = pair_question(PAIR_TEMPLATE, "p", "{response_b} {x}", "second {prompt}")
    assert "[Response A]\n{response_b} {x}\n" in asked and "second {prompt}\n" in asked
    assert "one of excellent, good, fair, poor, bad" in level_question(
        "{prompt}{response} one of {levels}", "p", "r"
    )


def test_prompts_are_shown_as_text():
    user = {"role": "user", "content": "hi"}
    assert prompt_text("hi") == prompt_text([user]) == "hi"
    both = [user, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "so?"}]
    assert prompt_text(both) == "User: hi\n\nAssistant: ho\n\nUser: so?"


def test_cutting_takes_the_prompt_first_and_treats_responses_alike():
    prompt, responses, cut = cut_to(100, "p" * 100, ["a" * 10, "b" * 30])
    assert cut and responses == ["a" * 10, "b" * 30]
    assert len(prompt) == 60 and "[...]" in prompt and prompt.startswith("p")
    prompt, responses, cut = cut_to(100, "p" * 100, ["a" * 100, "b" * 90])
    assert [len(response) for response in responses] == [37, 37] and len(prompt) == 26
    assert cut_to(100, "p", ["a", "b"]) == ("p", ["a", "b"], False)


@pytest.mark.parametrize(
    "mode, template, missing",
    [("pair", "{prompt} {response_a}", "response_b"), ("level", "{prompt}", "response")],
)
def test_a_template_without_a_place_is_refused(mode, template, missing):
    with pytest.raises(RecipeError, match=rf"has no \{{{missing}\}}"):
        check_template("template", template, mode)


@pytest.mark.parametrize(
    "levels", [{"a": 1}, {"a": 1, "b": 1}, {"a": 1, "b": "x"}, {"A": 1, "a": 2}, "good"]
)
def test_levels_that_are_no_scale_are_refused(levels):
    with pytest.raises(RecipeError, match="levels"):
        check_levels("levels", levels)
