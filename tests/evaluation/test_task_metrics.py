"""Scores of labelled sets, worked by hand; the chance level against every constant answer."""

import itertools
import math

import numpy as np
import pytest

from llmkd.errors import DataError, NonFiniteError, RecipeError
from llmkd.evaluation.task_metrics import SCORES, chance, main_metric, task_scores


def one_hot(answers, classes):
    """Logits that answer `answers` and give every other class log(1/3) less."""
    return np.log(3.0) * np.eye(classes)[np.asarray(answers)]


def test_single_label_by_hand():
    # labels 1 1 1 0, answers 1 1 0 1: TP 2, FN 1, FP 1, TN 0
    scores = task_scores("single_label", one_hot([1, 1, 0, 1], 2), np.array([1, 1, 1, 0]))
    assert scores["accuracy"] == 0.5 and scores["examples"] == 4
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # 2/3
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)  # class 0 has no hit
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = -1 / sqrt(3 * 3 * 1 * 1)
    assert scores["matthews"] == pytest.approx(-1 / 3)
    # the answer has probability 3/4, the other class 1/4: two right, two wrong
    assert scores["loss"] == pytest.approx(-(2 * math.log(0.75) + 2 * math.log(0.25)) / 4)
    assert next(iter(scores)) == "accuracy"


def test_f1_is_for_two_classes_and_the_main_score_comes_first():
    outputs, labels = one_hot([0, 1, 2], 3), np.array([0, 1, 1])
    assert "f1" not in task_scores("single_label", outputs, labels)
    assert next(iter(task_scores("single_label", outputs, labels, metric="matthews"))) == "matthews"
    with pytest.raises(RecipeError, match=r"3 classes.*\n.*macro_f1"):
        task_scores("single_label", outputs, labels, metric="f1")


def test_token_counts_tokens():
    # labels 0 0 1, answers 0 1 1: class 0 has precision 1 and recall 1/2, class 1 the reverse
    scores = task_scores("token", one_hot([0, 1, 1], 4), np.array([0, 0, 1]))
    assert scores["token_accuracy"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx(2 / 3)  # classes 2 and 3 occur nowhere
    # one of four classes at log 3: probability 3/6 for the answer, 1/6 for another
    assert scores["loss"] == pytest.approx(-(2 * math.log(1 / 2) + math.log(1 / 6)) / 3)


def test_multi_label_by_hand():
    logits = np.array([[2.0, -1.0, 0.0], [1.0, 3.0, -2.0]])  # a logit of exactly 0 says no
    labels = np.array([[1, 0, 0], [0, 1, 0]])
    scores = task_scores("multi_label", logits, labels)
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))  # TP 2, FP 1, FN 0
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["exact_match"] == 0.5 and scores["examples"] == 2
    sigmoid = 1 / (1 + np.exp(-logits))
    by_hand = -(labels * np.log(sigmoid) + (1 - labels) * np.log(1 - sigmoid)).mean()
    assert scores["loss"] == pytest.approx(by_hand)


def test_one_multi_label_class_is_not_two_classes():
    scores = task_scores(
        "multi_label", np.array([[1.0], [-1.0], [-1.0]]), np.array([[1], [1], [0]])
    )
    assert scores["micro_f1"] == scores["macro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_by_hand(shape):
    # outputs 1 2 3 6, labels 1 3 2 6: ranks differ by 0 1 1 0, so rho = 1 - 6 * 2 / (4 * 15)
    outputs, labels = np.array([1.0, 2, 3, 6]).reshape(shape), np.array([1.0, 3, 2, 6])
    scores = task_scores("regression", outputs, labels)
    assert scores["mse"] == scores["loss"] == pytest.approx(0.5)
    assert scores["spearman"] == pytest.approx(0.8)
    # both means are 3, both sums of squares 14, the products sum to 4 + 0 + 0 + 9
    assert scores["pearson"] == pytest.approx(13 / 14)


@pytest.mark.parametrize("outputs", [[2.0, 2.0, 2.0], [1e9, 1e9, 1e9]])
def test_an_undefined_correlation_is_zero(outputs):
    scores = task_scores("regression", np.array(outputs), np.array([1.0, 2.0, 3.0]))
    assert scores["pearson"] == scores["spearman"] == 0.0
    assert task_scores("single_label", one_hot([1, 1], 2), np.array([0, 1]))["matthews"] == 0.0


def test_half_precision_outputs_are_scored_in_full():
    outputs = np.array([[300.0, -300.0], [300.0, -300.0]], dtype=np.float16)
    scores = task_scores("single_label", outputs, np.array([0, 1]))
    assert scores["loss"] == pytest.approx(300.0)  # (0 + 600) / 2


@pytest.mark.parametrize(
    "kind, outputs, labels, says",
    [
        ("single_label", np.zeros((2, 3)), np.array([0, -1]), "-1"),
        ("single_label", np.zeros((2, 3)), np.array([0, 3]), "from 0 to 2"),
        ("single_label", np.zeros((2, 3)), np.array([0.0, 0.5]), "0.5"),
        ("single_label", np.zeros((2, 3)), np.array([0, 1, 2]), "do not fit"),
        ("multi_label", np.zeros((2, 3)), np.array([0, 1]), "do not fit"),
        ("multi_label", np.zeros((1, 2)), np.array([[0, 2]]), "from 0 to 1"),
        ("regression", np.zeros((2, 2)), np.zeros(2), "do not fit"),
        ("regression", np.zeros(2), np.array([0, math.nan]), "is not a number"),
        ("token", np.zeros((0, 2)), np.zeros(0), "no example"),
    ],
)
def test_what_cannot_be_scored_is_said(kind, outputs, labels, says):
    with pytest.raises(DataError, match=says):
        task_scores(kind, outputs, labels)


def test_a_diverged_model_has_no_score():
    with pytest.raises(NonFiniteError, match=r"1.*of 4"):
        task_scores("single_label", np.array([[0, math.nan], [0, 0]]), np.array([0, 1]))


def test_main_metric_defaults_and_refuses():
    names = {kind: main_metric(kind) for kind in SCORES}
    assert names == {
        "single_label": "accuracy",
        "multi_label": "micro_f1",
        "regression": "pearson",
        "token": "token_accuracy",
    }
    assert main_metric("single_label", "f1") == main_metric("single_label", "f1", classes=2) == "f1"
    with pytest.raises(RecipeError, match="lower is better"):
        main_metric("regression", "mse")
    with pytest.raises(RecipeError, match=r"no such score\n.*pearson"):
        main_metric("regression", "accuracy")
    with pytest.raises(RecipeError, match="single_label"):
        main_metric("classification")


LABELS = np.array([0, 1, 1, 0, 1, 2, 0, 1, 2, 1])


@pytest.mark.parametrize("kind, classes", [("single_label", 3), ("single_label", 2), ("token", 3)])
def test_chance_is_the_best_constant_class(kind, classes):
    labels = LABELS if classes == 3 else np.minimum(LABELS, 1)
    for metric in SCORES[kind]:
        if metric == "f1" and classes != 2:
            continue
        constants = (one_hot([c] * len(labels), classes) for c in range(classes))
        best = max(task_scores(kind, z, labels, metric=metric)[metric] for z in constants)
        assert chance(kind, labels, metric) == pytest.approx(best), metric


@pytest.mark.parametrize("metric", SCORES["multi_label"])
@pytest.mark.parametrize("seed", range(3))
def test_chance_is_the_best_constant_row(metric, seed):
    share = np.array([0.7, 0.3, 0.1])
    labels = (np.random.default_rng(seed).random((30, 3)) < share).astype(int)
    rows = itertools.product((-1.0, 1.0), repeat=3)
    tried = [task_scores("multi_label", np.tile(row, (30, 1)), labels)[metric] for row in rows]
    assert chance("multi_label", labels, metric) == pytest.approx(max(tried))
    assert max(tried) > min(tried)


def test_chance_by_hand():
    assert chance("single_label", [0, 1, 1, 1]) == 0.75
    assert chance("single_label", [0, 0, 0, 1], "f1") == pytest.approx(0.4)  # P 1/4, R 1
    assert chance("regression", [1.0, 2.0]) == chance("single_label", [0, 1], "matthews") == 0.0
    with pytest.raises(DataError, match="no example"):
        chance("single_label", [])
