"""What every latent and every task loss obeys: what counts, sums, NaN, dtypes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmkd.objectives.latent import ATTENTION_FORMS, attention_loss, hidden_mse
from llmkd.objectives.prediction import SOFT_FORMS, TASKS, check_soft, hard_loss, soft_loss
from llmkd.types import DenseLogits, LossTerm, MixtureTarget

B, A, T, C, D = 3, 2, 5, 4, 6


@dataclass(frozen=True)
class Case:
    """`call(student, teacher, mask)`; `axes` of the student's tensor run over tokens, the others
    over rows, heads and entries.
    """

    call: Callable[..., LossTerm]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def maps(form: str, causal: bool) -> Case:
    def call(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
        width = student.shape[-1]
        visible = torch.ones(1, 1, width, width).tril().bool() if causal else None
        return attention_loss(student, teacher, mask, form=form, visible_BTT=visible)

    return Case(call, (B, A, T, T), (2, 3))


def gold(mask: Tensor) -> Tensor:
    """A label for each place that depends on how many real tokens stand before it."""
    return ((mask.cumsum(-1) - 1) % C).masked_fill(~mask, -100)


def tokens(form: str, mixed: bool = False) -> Case:
    def call(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
        target = DenseLogits(teacher, C)
        if mixed:
            target = MixtureTarget((target, DenseLogits(-teacher, C)), (0.25, 0.75))
        return soft_loss("token", student, target, gold(mask), form=form)

    return Case(call, (B, T, C), (1,))


MASKED = {
    "hidden": Case(hidden_mse, (B, T, D), (1,)),
    **{f"attn {form}": maps(form, False) for form in ATTENTION_FORMS},
    **{f"attn {form} causal": maps(form, True) for form in ATTENTION_FORMS},
    "hard token": Case(
        lambda student, teacher, mask: hard_loss("token", student, gold(mask)), (B, T, C), (1,)
    ),
    **{f"soft token {form}": tokens(form) for form in SOFT_FORMS},
    "soft token kl mixture": tokens("kl", True),
}
every_masked = pytest.mark.parametrize("name", MASKED)


@pytest.fixture
def mask():
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:] = mask[1, 1:] = False
    return mask


def inputs(name, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(2, *MASKED[name].shape) * 2).to(dtype).unbind()


def holes(name, mask):
    """True where an entry of the student's tensor belongs to padding."""
    case = MASKED[name]
    found = torch.zeros(case.shape, dtype=torch.bool)
    for axis in case.axes:
        view = [1] * len(case.shape)
        view[0], view[axis] = mask.shape
        found |= ~mask.view(view)
    return found


@every_masked
def test_nan_under_the_mask_changes_neither_loss_nor_gradient(name, mask):
    student, teacher = inputs(name)
    hole, call = holes(name, mask), MASKED[name].call
    clean = student.clone().requires_grad_()
    dirty = student.masked_fill(hole, float("nan")).requires_grad_()
    terms = [
        call(clean, teacher, mask),
        call(dirty, teacher.masked_fill(hole, float("nan")), mask),
    ]
    for term in terms:
        term.total.backward()
        assert term.count.item() == mask.sum().item()
    assert torch.equal(terms[0].total, terms[1].total) and terms[0].total > 0.1
    assert torch.equal(clean.grad, dirty.grad) and clean.grad.abs().max() > 0.01
    assert not clean.grad[hole].any()


@every_masked
@pytest.mark.parametrize("rows", [0, B], ids=["no rows", "all masked"])
def test_nothing_counted_gives_zero_with_gradients(name, rows):
    student, teacher = (x[:rows] for x in inputs(name))
    student = student.clone().requires_grad_()
    term = MASKED[name].call(student, teacher, torch.zeros(rows, T, dtype=torch.bool))
    term.total.backward()
    assert term.total.item() == 0 and term.count.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@every_masked
@pytest.mark.parametrize("left, right", [(0, 3), (2, 0), (1, 2)])
def test_more_padding_on_either_side_changes_nothing(name, left, right, mask):
    student, teacher = inputs(name)
    case = MASKED[name]

    def padded(x, axes, value):
        for axis in axes:
            shape = list(x.shape)
            shape[axis] = left
            before = x.new_full(shape, value)
            shape[axis] = right
            x = torch.cat((before, x, x.new_full(shape, value)), axis)
        return x

    plain = student.clone().requires_grad_()
    wide = student.clone().requires_grad_()
    one = case.call(plain, teacher, mask)
    two = case.call(
        padded(wide, case.axes, 9.0),
        padded(teacher, case.axes, -9.0),
        padded(mask, (1,), False),
    )
    one.total.backward()
    two.total.backward()
    assert_close(two.total, one.total, rtol=1e-6, atol=0)
    assert_close(wide.grad, plain.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(one.count, two.count)


@every_masked
def test_totals_add_up_over_parts_of_the_rows(name, mask):
    student, teacher = inputs(name, torch.float64)
    whole = MASKED[name].call(student, teacher, mask)
    for cuts in ((0, 1, B), (0, 1, 2, B), (0, 0, B)):
        parts = [
            MASKED[name].call(student[a:b], teacher[a:b], mask[a:b]) for a, b in pairwise(cuts)
        ]
        assert_close(sum(part.total for part in parts), whole.total)
        assert sum(part.count for part in parts) == whole.count


@every_masked
def test_bfloat16_is_widened_before_anything_else(name, mask):
    student, teacher = inputs(name, torch.bfloat16)
    narrow, wide = student.clone().requires_grad_(), student.float().requires_grad_()
    terms = [
        MASKED[name].call(narrow, teacher, mask),
        MASKED[name].call(wide, teacher.float(), mask),
    ]
    for term in terms:
        term.total.backward()
    assert terms[0].total.dtype == torch.float32 and torch.equal(terms[0].total, terms[1].total)
    assert narrow.grad.dtype == torch.bfloat16
    assert_close(narrow.grad.float(), wide.grad, rtol=2**-8, atol=1e-6)


@every_masked
def test_single_precision_agrees_with_float64(name, mask):
    student, teacher = inputs(name)
    single = MASKED[name].call(student, teacher, mask).total
    exact = MASKED[name].call(student.double(), teacher.double(), mask).total
    assert single.dtype == torch.float32 and exact.dtype == torch.float64
    assert_close(single.double(), exact, rtol=3e-6, atol=0)
    mixed = MASKED[name].call(student.double(), teacher, mask).total  # a float32 teacher serves
    assert_close(mixed, exact, rtol=1e-6, atol=0)


@every_masked
def test_the_teacher_gets_no_gradient_it_does_not_ask_for(name, mask):
    student, teacher = inputs(name)
    MASKED[name].call(student.requires_grad_(), teacher, mask).total.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# Sequence tasks: every example counts.


def fits(kind, form):
    return not (form == "nkd" and kind in ("multi_label", "regression"))


SEQUENCE = [k for k in TASKS if k != "token"]
EXAMPLES = [(kind, "hard") for kind in SEQUENCE]
EXAMPLES += [(kind, form) for kind in SEQUENCE for form in SOFT_FORMS if fits(kind, form)]
every_example = pytest.mark.parametrize("kind, form", EXAMPLES)


def examples(kind, dtype=torch.float32):
    torch.manual_seed(0)
    width = 1 if kind == "regression" else C
    labels = {
        "single_label": torch.randint(0, C, (B,)),
        "multi_label": torch.randint(0, 2, (B, C)).float(),
        "regression": torch.randn(B),
    }[kind]
    return *torch.randn(2, B, width).to(dtype).unbind(), labels


def of_examples(kind, form, student, teacher, labels):
    if form == "hard":
        return hard_loss(kind, student, labels)
    check_soft(kind, form)
    return soft_loss(kind, student, DenseLogits(teacher, teacher.shape[-1]), labels, form=form)


@every_example
def test_no_examples_give_zero_with_gradients(kind, form):
    student, teacher, labels = (x[:0] for x in examples(kind))
    student = student.clone().requires_grad_()
    term = of_examples(kind, form, student, teacher, labels)
    term.total.backward()
    assert term.total.item() == 0 and term.count.item() == 0 and student.grad.shape[0] == 0


@every_example
def test_examples_add_up(kind, form):
    student, teacher, labels = examples(kind, torch.float64)
    whole = of_examples(kind, form, student, teacher, labels)
    each = [
        of_examples(kind, form, student[n : n + 1], teacher[n : n + 1], labels[n : n + 1])
        for n in range(B)
    ]
    assert_close(sum(part.total for part in each), whole.total)
    assert sum(part.count for part in each) == whole.count == B


@every_example
def test_bfloat16_examples_are_widened(kind, form):
    student, teacher, labels = examples(kind, torch.bfloat16)
    narrow = of_examples(kind, form, student, teacher, labels).total
    wide = of_examples(kind, form, student.float(), teacher.float(), labels).total
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)
