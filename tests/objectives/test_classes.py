"""USKD: worked by hand, and what it does not depend on."""

import math

import pytest
import torch
from torch.testing import assert_close

from llmkd.objectives import uskd
from llmkd.objectives.classes import non_target_labels

F64 = torch.float64
S = ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6))
W = ((0.4, 0.1, 0.5), (0.7, 0.1, 0.2))
GOLD = torch.tensor([0, 2])


def log(rows):
    return torch.tensor(rows, dtype=F64).log()


def test_ranks_by_hand():
    # row 0, gold 0: W / .6 + S / .5 = (1.667, .767, 1.233): ranks 1, 3, 2; without gold
    # (1/3, 1/2) / (5/6) = (.4, .6)
    # row 1, gold 2: W / .8 + S / .4 = (1.375, .625, 1.75): ranks 2, 3, 1: (1/2, 1/3) -> (.6, .4)
    labels = non_target_labels(log(S), log(W), GOLD)
    assert_close(labels, torch.tensor([[0, 0.4, 0.6], [0.6, 0.4, 0]], dtype=F64))


def test_gold_keeps_its_rank_when_it_is_dropped():
    # gold last: the others have ranks 1 and 2: (1, 1/2) / 1.5
    labels = non_target_labels(log([S[0]]), log([S[0]]), torch.tensor([2]))
    assert_close(labels, torch.tensor([[2 / 3, 1 / 3, 0]], dtype=F64))


def test_ranks_use_s_as_the_paper_not_log_s_as_its_code():
    # gold 0; W / .5 + S / .5 = (.99, 1.01) for 1 and 2; the code's W / .5 + ln S / (1 - ln .5) =
    # (-.321, -.341) puts them the other way round
    s, w = ((0.5, 0.3, 0.2),), ((0.5, 0.195, 0.305),)
    labels = non_target_labels(log(s), log(w), torch.tensor([0]))
    assert labels[0, 2] > labels[0, 1]
    code = log(w).exp() / 0.5 + log(s) / (1 - math.log(0.5))
    assert code[0, 1] > code[0, 2]


def test_value_by_hand():
    # S_t^2 = .25, .36, mean .305: P_t = .945, 1.055
    target = -0.945 * math.log(0.5) - 1.055 * math.log(0.6)
    # others of S: (.6, .4) and (.5, .5); labels (.4, .6) and (.6, .4)
    others = -0.4 * math.log(0.6) - 0.6 * math.log(0.4) + math.log(2)
    # middle, gold smoothed by .1: .9 + .1 / 3
    middle = -0.9 * (math.log(0.4) + math.log(0.2))
    middle -= 0.1 / 3 * (math.log(0.4 * 0.1 * 0.5) + math.log(0.7 * 0.1 * 0.2))
    term = uskd(log(S), log(W), GOLD)
    assert term.total.item() == pytest.approx(target + 0.1 * others + 0.005 * middle, abs=1e-12)
    assert term.count.item() == 2
    parts = [term.metrics[f"uskd_{name}"].item() for name in ("target", "non_target", "middle")]
    assert parts == pytest.approx([target, others, middle], abs=1e-12)


def test_soft_labels_are_detached_and_the_middle_head_learns_from_its_own_term():
    student, middle = log(S).requires_grad_(), log(W).requires_grad_()
    uskd(student, middle, GOLD, beta=0.0, mu=0.0).total.backward()
    onehot = torch.nn.functional.one_hot(GOLD, 3)
    p = torch.tensor([[0.945], [1.055]], dtype=F64)
    assert_close(student.grad, p * (torch.tensor(S, dtype=F64) - onehot))
    assert middle.grad.abs().max() == 0
    uskd(student, middle, GOLD, alpha=0.0, beta=0.0, mu=1.0).total.backward()
    smooth = 0.9 * onehot + 0.1 / 3
    assert_close(middle.grad, torch.tensor(W, dtype=F64) - smooth)


def test_a_mixup_weight_takes_the_place_of_one():
    weights = torch.tensor([0.7, 1.0])
    light, full = (
        uskd(log(S), log(W), GOLD, gold_weight_N=v).metrics["uskd_target"].item()
        for v in (weights, None)
    )
    assert full - light == pytest.approx(-0.3 * math.log(0.5), abs=1e-7)


def test_totals_add_up_over_batches_only_with_a_given_mean():
    rows = [(log(S)[i : i + 1], log(W)[i : i + 1], GOLD[i : i + 1]) for i in range(2)]
    whole = uskd(log(S), log(W), GOLD).total
    given = sum(uskd(*row, mean_square=0.305).total for row in rows)
    assert_close(given, whole)
    assert abs(sum(uskd(*row).total for row in rows).item() - whole.item()) > 1e-3


def test_extremes_and_nothing_at_all_are_finite():
    sure = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    term = uskd(sure, sure.detach(), torch.tensor([0]))
    term.total.backward()
    assert term.total.isfinite() and sure.grad.isfinite().all()
    empty = torch.zeros(0, 3, requires_grad=True)
    term = uskd(empty, empty, torch.zeros(0, dtype=torch.long))
    term.total.backward()
    assert term.total.item() == 0 and term.count.item() == 0
