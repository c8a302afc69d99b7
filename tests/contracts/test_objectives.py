"""What every objective obeys on every kind of soft label, whoever adds it: which positions count.

The table is `tests/objective_kit.py`; numbers, temperatures and vocabularies are next door.
"""

import pytest
import torch
from objective_kit import CASES, FORMS, WEIGHTED, label, mapped, poisoned
from torch.testing import assert_close

from llmkd.objectives import OBJECTIVES
from llmkd.objectives.token import IGNORE, shift_labels

B, T, V = 3, 5, 11
every_case = pytest.mark.parametrize("name, kind", CASES)
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.rand(B, T) > 0.4
    return torch.randn(B, T, V), torch.randn(B, T, V) * 2, torch.randint(0, V, (B, T)), mask


def test_the_table_has_a_row_for_every_objective():
    assert set(OBJECTIVES) <= set(FORMS)


@every_case
def test_ignores_what_is_masked_even_nan(name, kind, batch):
    student, teacher, gold, mask = batch
    target = label(kind, teacher, V)
    clean = FORMS[name].call(student, target, mask, gold)
    dirty = student.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    gold = gold.masked_fill(~mask, IGNORE)
    term = FORMS[name].call(dirty, poisoned(target, ~mask), mask, gold)
    term.total.backward()
    assert term.count.item() == mask.sum().item()
    assert_close(term.total, clean.total, rtol=1e-6, atol=0)
    assert torch.equal(dirty.grad[~mask], torch.zeros_like(dirty.grad[~mask]))
    assert dirty.grad.isfinite().all() and dirty.grad[mask].abs().sum() > 0


@every_case
@pytest.mark.parametrize("rows", [0, B], ids=["no rows", "all masked"])
def test_nothing_counted_gives_zero_with_gradients(name, kind, rows, batch):
    student, teacher, gold, mask = batch
    target = mapped(label(kind, teacher, V), lambda x: x[:rows])
    student = student[:rows].requires_grad_()
    term = FORMS[name].call(student, target, torch.zeros_like(mask)[:rows], gold[:rows])
    term.total.backward()
    assert term.total.item() == 0 and term.count.item() == 0
    assert all(value.item() == 0 for value in term.metrics.values())
    assert torch.equal(student.grad, torch.zeros_like(student))


@every_case
def test_totals_are_sums_so_that_ranks_and_micro_batches_add_up(name, kind, batch):
    student, teacher, gold, mask = batch
    target, call = label(kind, teacher, V), FORMS[name].call
    whole = call(student, target, mask, gold)
    by_row = [
        call(student[at], mapped(target, lambda x, at=at: x[at]), mask[at], gold[at])
        for at in (slice(0, 1), slice(1, B))
    ]
    even = torch.arange(T) % 2 == 0
    by_place = [call(student, target, mask & part, gold) for part in (even, ~even)]
    for parts in (by_row, by_place):
        assert_close(sum(p.total for p in parts), whole.total, **close)
        assert sum(p.count for p in parts) == whole.count
        for key, value in whole.metrics.items():
            assert_close(sum(p.metrics[key] for p in parts), value, **close)
            assert not value.requires_grad


@every_case
def test_the_side_of_the_padding_changes_nothing(name, kind, batch):
    student, teacher, gold, _ = batch
    target, width = label(kind, teacher, V), T + 2
    lengths = (2, T, 3)

    def padded(x, left):
        out = x.new_full((B, width, *x.shape[2:]), float("nan") if x.is_floating_point() else 0)
        for row, length in enumerate(lengths):
            start = width - length if left else 0
            out[row, start : start + length] = x[row, :length]
        return out

    terms = []
    for left in (False, True):
        mask = padded(torch.ones(B, T, dtype=torch.long), left).bool()
        there = mapped(target, lambda x, left=left: padded(x, left))
        terms.append(FORMS[name].call(padded(student, left), there, mask, padded(gold, left)))
    assert terms[0].count.item() == sum(lengths) == terms[1].count.item()
    assert_close(terms[0].total, terms[1].total, rtol=1e-6, atol=0)


@every_case
def test_logits_lie_on_the_token_they_predict_and_off_by_one_costs(name, kind):
    """Position t predicts token t + 1: student, label and gold as `shift_labels` lays them."""
    torch.manual_seed(0)
    labels = torch.stack((torch.arange(8), torch.arange(8) + 3))
    gold = shift_labels(labels)
    mask = gold != IGNORE
    sure = torch.nn.functional.one_hot(gold.clamp_min(0), V) * 30.0
    right = FORMS[name].call(sure, label(kind, sure, V), mask, gold)
    late = torch.nn.functional.one_hot(labels, V) * 30.0  # label and gold of position t - 1
    wrong = FORMS[name].call(sure, label(kind, late, V), mask, labels)
    assert right.count.item() == 14
    assert right.total.item() < 0.01 * 14
    assert wrong.total.item() > 0.3 * 14


@pytest.mark.parametrize("name, kind", WEIGHTED)
def test_weights_multiply_positions(name, kind, batch):
    student, teacher, gold, mask = batch
    target, call = label(kind, teacher, V), FORMS[name].call
    bare = call(student, target, mask, gold)
    ones = call(student, target, mask, gold, weights_BT=torch.ones(B, T))
    assert_close(ones.total, bare.total, rtol=1e-6, atol=0)
    half = torch.arange(T) % 2 == 0
    zeros = call(student, target, mask, gold, weights_BT=half.float().expand(B, T))
    assert_close(zeros.total, call(student, target, mask & half, gold).total, **close)
    assert zeros.count == bare.count  # a weight is not a mask: whoever divides may want its sum
    weights = torch.rand(B, T).masked_fill(~mask, float("nan"))
    once, twice = (call(student, target, mask, gold, weights_BT=n * weights) for n in (1, 2))
    assert_close(twice.total, 2 * once.total, rtol=1e-6, atol=0)
    for key, value in bare.metrics.items():
        assert_close(once.metrics[key], value, rtol=1e-6, atol=0)
