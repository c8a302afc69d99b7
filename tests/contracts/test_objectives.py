"""What every objective in the table obeys, whoever adds it."""

import pytest
import torch

from llmkd.objectives import OBJECTIVES, ce_kd_chunked
from llmkd.types import DenseLogits, LossTerm

B, T, V = 3, 5, 11
GOLD_ONLY = {"cross_entropy"}
NEEDS_GOLD = {"ce_kd", "ce_kd_chunked"}
FORMS = {**OBJECTIVES, "ce_kd_chunked": ce_kd_chunked}


def call(name, student, teacher, gold, mask) -> LossTerm:
    if name in GOLD_ONLY:
        return FORMS[name](student, gold, mask)
    settings = {"gold_BT": gold, "kd_weight": 0.6} if name in NEEDS_GOLD else {}
    return FORMS[name](student, DenseLogits(teacher, V), mask, **settings)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.rand(B, T) > 0.4
    return torch.randn(B, T, V), torch.randn(B, T, V), torch.randint(0, V, (B, T)), mask


@pytest.mark.parametrize("name", sorted(FORMS))
def test_ignores_what_is_masked_even_nan(name, batch):
    student, teacher, gold, mask = batch
    clean = call(name, student, teacher, gold, mask)
    hole = ~mask[..., None]
    dirty = student.masked_fill(hole, float("nan")).requires_grad_()
    gold = gold.masked_fill(~mask, -100)
    term = call(name, dirty, teacher.masked_fill(hole, float("nan")), gold, mask)
    term.total.backward()
    assert torch.equal(term.total, clean.total)
    assert torch.equal(dirty.grad[~mask], torch.zeros_like(dirty.grad[~mask]))
    assert dirty.grad.isfinite().all() and dirty.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(FORMS))
def test_all_masked_gives_zero_with_gradients(name, batch):
    student, teacher, gold, mask = batch
    student.requires_grad_()
    term = call(name, student, teacher, gold, torch.zeros_like(mask))
    term.total.backward()
    assert term.total.item() == 0 and term.count.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("name", sorted(FORMS))
def test_totals_are_sums_so_that_parts_add_up(name, batch):
    student, teacher, gold, mask = batch
    whole = call(name, student, teacher, gold, mask)
    parts = [call(name, *(x[i : i + 1] for x in batch)) for i in range(B)]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    assert sum(p.count for p in parts) == whole.count
    for key, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[key] for p in parts), value, rtol=1e-5, atol=1e-6)
        assert not value.requires_grad


@pytest.mark.parametrize("name", sorted(set(FORMS) - GOLD_ONLY))
def test_a_student_that_is_the_teacher_gets_no_gradient_from_it(name, batch):
    _, teacher, gold, mask = batch
    student = teacher.clone().requires_grad_()
    settings = {"gold_BT": gold, "kd_weight": 1.0} if name in NEEDS_GOLD else {}
    term = FORMS[name](student, DenseLogits(teacher, V), mask, **settings)
    term.total.backward()
    assert student.grad.abs().max() < 1e-6
    assert abs(term.metrics["kl"].item()) < 1e-4


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_direction_and_unit_is_documented(name):
    text = FORMS[name].__doc__ or ""
    assert "nats" in text or "Equal to" in text
