"""NKD: values worked by hand, what has no gradient, stored labels against live ones."""

import math

import pytest
import torch
from objective_kit import KINDS, label, matching
from torch.testing import assert_close

from llmkd.objectives import OBJECTIVES, nkd_rows
from llmkd.objectives.nkd import nkd_parts
from llmkd.types import TAILS, DenseLogits, SparseTarget

F64 = torch.float64
V = 9


def rows(*values):
    return torch.tensor(values, dtype=F64)


def test_value_by_hand():
    # teacher (.5, .3, .2), student (.6, .1, .3), gold 0.
    # target: -.5 ln .6; others: teacher (.6, .4), student (.25, .75): -.6 ln .25 - .4 ln .75
    teacher, student = rows((0.5, 0.3, 0.2)).log(), rows((0.6, 0.1, 0.3)).log()
    gold = torch.tensor([0])
    target, others = nkd_parts(student, DenseLogits(teacher, 3), gold)
    assert target.item() == pytest.approx(-0.5 * math.log(0.6), abs=1e-12)
    by_hand = -0.6 * math.log(0.25) - 0.4 * math.log(0.75)
    assert others.item() == pytest.approx(by_hand, abs=1e-12)
    whole = nkd_rows(student, DenseLogits(teacher, 3), gold)
    assert whole.item() == pytest.approx(-0.5 * math.log(0.6) + 1.5 * by_hand, abs=1e-12)


def test_temperature_tempers_the_others_alone_by_hand():
    # tau 1/2 squares: teacher (.09, .04) / .13, student (.01, .09) / .1; gamma tau^2 = 3.5 / 4
    teacher, student = rows((0.5, 0.3, 0.2)).log(), rows((0.6, 0.1, 0.3)).log()
    value = nkd_rows(
        student, DenseLogits(teacher, 3), torch.tensor([0]), temperature=0.5, gamma=3.5
    )
    others = -(9 / 13) * math.log(0.1) - (4 / 13) * math.log(0.9)
    expected = -0.5 * math.log(0.6) + 3.5 * 0.25 * others
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_the_objective_adds_cross_entropy():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, V, dtype=F64)
    gold, mask = torch.randint(0, V, (2, 3)), torch.rand(2, 3) > 0.3
    target = DenseLogits(teacher, V)
    settings = {"gold_BT": gold, "temperature": 2.0, "gamma": 0.7}
    term = OBJECTIVES["nkd"](student, target, mask, **settings, ce_weight=0.4)
    ce = OBJECTIVES["cross_entropy"](student, gold, mask).total
    alone = nkd_rows(student[mask], DenseLogits(teacher[mask], V), gold[mask], temperature=2.0)
    parts = nkd_parts(student[mask], DenseLogits(teacher[mask], V), gold[mask], temperature=2.0)
    value = (parts[0] + 0.7 * 4 * parts[1]).sum()
    assert_close(term.total, 0.4 * ce + value)
    assert_close(alone, parts[0] + 1.5 * 4 * parts[1])
    assert_close(term.metrics["ce"], ce)
    assert_close(term.metrics["nkd"], value)
    assert_close(term.metrics["nkd_non_target"], parts[1].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_matching_students_get_no_gradient_beside_gold_whose_own_keeps_pulling(kind):
    torch.manual_seed(0)
    teacher, gold = torch.randn(1, 40, V, dtype=F64) * 2, torch.randint(0, V, (40,))
    target = label(kind, teacher, V)
    student = matching(kind, target, teacher)[0].requires_grad_()
    flat = target.take(torch.arange(40))
    pull, others = nkd_parts(student, flat, gold)
    (of_others,) = torch.autograd.grad(others.sum(), student)
    (of_target,) = torch.autograd.grad(pull.sum(), student)
    assert of_others.abs().max() < 1e-12
    assert of_target.abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gold_logits_get_no_gradient_from_the_others(kind):
    torch.manual_seed(1)
    teacher, gold = torch.randn(1, 40, V, dtype=F64) * 2, torch.randint(0, V, (40,))
    student = torch.randn(40, V, dtype=F64, requires_grad=True)
    flat = label(kind, teacher, V).take(torch.arange(40))
    (slope,) = torch.autograd.grad(nkd_parts(student, flat, gold)[1].sum(), student)
    at_gold = torch.nn.functional.one_hot(gold, V).bool()
    assert slope[at_gold].abs().max() == 0 and slope[~at_gold].abs().max() > 0.01
    assert torch.autograd.gradcheck(lambda z: nkd_rows(z, flat, gold), student)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("entries", [V, V + 3])
def test_listing_every_token_is_the_dense_label(tail, entries):
    torch.manual_seed(2)
    teacher, gold = torch.randn(20, V, dtype=F64), torch.randint(0, V, (20,))
    student = torch.randn(20, entries, dtype=F64, requires_grad=True)
    top = teacher.softmax(-1).topk(V)
    whole = nkd_rows(student, SparseTarget(top.indices, top.values, V, tail), gold)
    dense = nkd_rows(student, DenseLogits(teacher, V), gold)
    assert_close(whole, dense)
    slopes = [torch.autograd.grad(value.sum(), student)[0] for value in (whole, dense)]
    assert_close(*slopes)


def test_bucket_by_hand():
    # listed .5 (token 3) and .2 (token 1), the rest .3; student (.1, .2, .3, .25, .15)
    student = rows((0.1, 0.2, 0.3, 0.25, 0.15)).log()
    target = SparseTarget(torch.tensor([[3, 1]]), rows((0.5, 0.2)), 5)
    # gold 3: label (.2, .3) / .5 on token 1 and the others; student (.2, .55) / .75
    pull, others = nkd_parts(student, target, torch.tensor([3]))
    assert pull.item() == pytest.approx(-0.5 * math.log(0.25))
    by_hand = -0.4 * math.log(0.2 / 0.75) - 0.6 * math.log(0.55 / 0.75)
    assert others.item() == pytest.approx(by_hand)
    # gold 4 is not listed: T_t = .3 / 3; the listed alone, (.5, .2) / .7 and (.25, .2) / .45
    pull, others = nkd_parts(student, target, torch.tensor([4]))
    assert pull.item() == pytest.approx(-0.1 * math.log(0.15))
    by_hand = -(5 / 7) * math.log(0.25 / 0.45) - (2 / 7) * math.log(0.2 / 0.45)
    assert others.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("rest, counts", [(1e-3, True), (2e-4, True), (5e-5, False), (0.0, False)])
@pytest.mark.parametrize("tail", [None, *TAILS])
def test_no_second_term_once_the_label_is_nearly_all_gold(rest, counts, tail):
    probs = rows((1 - rest, rest, 0.0, 0.0))
    gold, student = torch.tensor([0]), torch.randn(1, 4, dtype=F64, requires_grad=True)
    target = DenseLogits(probs.log(), 4)
    if tail:
        target = SparseTarget(torch.tensor([[0, 1, 2, 3]]), probs, 4, tail)
    others = nkd_parts(student, target, gold)[1]
    (slope,) = torch.autograd.grad(others.sum(), student)
    assert slope.isfinite().all()
    assert (others.item() > 0.01) is counts and (slope.abs().max().item() > 0) is counts


def test_extremes_in_single_precision_are_finite():
    huge = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    for gold in range(3):
        for teacher in (huge, huge.roll(1, 0), huge.roll(1, 1)):
            student = huge.clone().requires_grad_()
            value = nkd_rows(student, DenseLogits(teacher, 3), torch.full((3,), gold))
            value.sum().backward()
            assert value.isfinite().all() and student.grad.isfinite().all()


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(2, 4, requires_grad=True)
    student = torch.randn(2, 4, requires_grad=True)
    nkd_rows(student, DenseLogits(teacher, 4), torch.tensor([0, 1])).sum().backward()
    assert teacher.grad is None


def test_stored_labels_serve_one_temperature():
    student, gold = torch.zeros(1, 3), torch.tensor([0])
    for own, asked in ((1.0, 2.0), (2.0, 2.0)):
        target = SparseTarget(
            torch.tensor([[0]]), torch.tensor([[0.5]]), 3, "smooth", temperature=own
        )
        with pytest.raises(ValueError, match="made at"):
            nkd_rows(student, target, gold, temperature=asked)
