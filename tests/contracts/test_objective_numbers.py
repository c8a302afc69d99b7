"""What every objective obeys on every kind of soft label: values, temperatures, vocabularies."""

import pytest
import torch
from objective_kit import CASES, FORMS, NEVER, TEMPERED, doubled, label, matching
from torch.testing import assert_close

B, T, V = 3, 5, 11
every_case = pytest.mark.parametrize("name, kind", CASES)


def inputs(student_entries=V, teacher_entries=V, shared=None, seed=0):
    torch.manual_seed(seed)
    student = torch.randn(B, T, student_entries) * 2
    teacher = torch.randn(B, T, teacher_entries) * 2
    gold = torch.randint(0, shared or min(student_entries, teacher_entries), (B, T))
    return student, teacher, gold, torch.rand(B, T) > 0.3


@pytest.mark.parametrize("name, kind", [case for case in CASES if FORMS[case[0]].kd_weight > 0])
def test_a_student_that_matches_its_label_gets_no_gradient_from_it(name, kind):
    _, teacher, gold, mask = inputs()
    form, target = FORMS[name], label(kind, teacher, V)
    student = matching(kind, target, teacher).requires_grad_()
    term = (form.label_part or form.call)(student, target, mask, gold)
    term.total.backward()
    assert student.grad.abs().max() < 1e-6
    if form.distance:
        # a position's logarithms are good to some 3e-6 where torch.softmax makes them (20 ulp)
        assert abs(term.metrics[form.distance].item()) < 5e-6 * term.count.item()


@every_case
def test_single_precision_agrees_with_float64(name, kind):
    student, teacher, gold, mask = inputs(37, 37)
    target, call = label(kind, teacher, 37), FORMS[name].call
    narrow, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    single = call(narrow, target, mask, gold)
    exact = call(wide, doubled(target), mask, gold)
    single.total.backward()
    exact.total.backward()
    assert exact.total.dtype == torch.float64
    assert_close(single.total.double(), exact.total, rtol=2e-6, atol=0)
    error = (narrow.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error.item() < 2e-6


@every_case
def test_bfloat16_logits_are_widened_before_anything_else(name, kind):
    student, teacher, gold, mask = inputs()
    target, call = label(kind, teacher, V), FORMS[name].call
    narrow = student.bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    for logits in (narrow, wide):
        call(logits, target, mask, gold).total.backward()
    totals = [call(logits, target, mask, gold).total for logits in (narrow, wide)]
    assert totals[0].dtype == torch.float32 and torch.equal(*totals)
    assert narrow.grad.dtype == torch.bfloat16
    assert_close(narrow.grad.float(), wide.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name, kind", TEMPERED)
def test_t2_multiplies_the_divergence_by_nine_at_student_temperature_three(name, kind):
    student, teacher, gold, mask = inputs()
    form, target = FORMS[name], label(kind, teacher, V, temperature=2.0)
    settings = {"teacher_temperature": 2.0, "student_temperature": 3.0}
    bare = form.call(student, target, mask, gold, **settings)
    scaled = form.call(student, target, mask, gold, **settings, t2_scale=True)
    ce = (1 - form.kd_weight) * bare.metrics["ce"] if form.kd_weight < 1 else 0.0
    assert_close(scaled.total - ce, 9 * (bare.total - ce), rtol=1e-5, atol=0)
    for key, value in bare.metrics.items():
        assert_close(scaled.metrics[key], value)
    cold = form.call(student, label(kind, teacher, V), mask, gold)
    assert abs(cold.total.item() - bare.total.item()) > 0.05


@pytest.mark.parametrize("name, kind", TEMPERED)
def test_temperatures_divide_the_logits(name, kind):
    student, teacher, gold, mask = inputs()
    form = FORMS[name]
    settings = {"teacher_temperature": 2.0, "student_temperature": 0.5}
    torch.manual_seed(1)
    asked = form.call(student, label(kind, teacher, V, temperature=2.0), mask, gold, **settings)
    torch.manual_seed(1)
    by_hand = form.call(student / 0.5, label(kind, teacher / 2.0, V), mask, gold)
    for key in set(asked.metrics) - {"ce"}:  # CE stays at temperature 1
        assert_close(asked.metrics[key], by_hand.metrics[key], rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("student_entries", [9, 12, 14])
def test_what_a_teacher_says_beyond_the_shared_entries_is_inert(name, kind, student_entries):
    student, teacher, gold, mask = inputs(student_entries, 12, 9)
    torch.manual_seed(1)
    term = FORMS[name].call(student, label(kind, teacher, 9), mask, gold)
    teacher = torch.cat((teacher[..., :9], teacher[..., 9:] + 50.0), -1)
    torch.manual_seed(1)
    louder = FORMS[name].call(student, label(kind, teacher, 9), mask, gold)
    torch.manual_seed(1)
    trimmed = FORMS[name].call(student, label(kind, teacher[..., :9], 9), mask, gold)
    # the hidden kind multiplies the 50 through its head in float32
    assert_close(louder.total, term.total, rtol=1e-4 if kind == "hidden" else 1e-6, atol=0)
    if kind != "hidden":  # there the head itself depends on the teacher's width
        assert_close(trimmed.total, term.total, rtol=1e-6, atol=0)


@every_case
def test_padding_of_a_wider_student_costs_nothing_once_it_is_ruled_out(name, kind):
    student, teacher, gold, mask = inputs(9, 9)
    target, call = label(kind, teacher, 9), FORMS[name].call
    narrow = call(student, target, mask, gold)
    padding = torch.full((B, T, 3), NEVER)
    wide = call(torch.cat((student, padding), -1), target, mask, gold)
    assert_close(wide.total, narrow.total, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name, kind", [case for case in CASES if case[1] != "bucket"])
def test_padding_of_a_wider_student_is_pushed_down_never_up(name, kind):
    """In a bucket it is one of the others, which the label may want more of."""
    student, teacher, gold, mask = inputs(12, 9, 9)
    student.requires_grad_()
    FORMS[name].call(student, label(kind, teacher, 9), mask, gold).total.backward()
    assert student.grad.isfinite().all()
    assert student.grad[..., 9:].min() >= -1e-7


@every_case
def test_a_sure_student_and_a_sure_teacher_stay_finite(name, kind):
    """Logits of 1,000: everything but one token underflows, on one side or on both."""
    one = torch.nn.functional.one_hot(torch.zeros(1, 2, dtype=torch.long), V) * 1000.0
    other = one.roll(1, -1)
    mask = torch.ones(1, 2, dtype=torch.bool)
    gold = torch.tensor([[0, 1]])
    torch.manual_seed(0)
    for logits, teacher in ((one, one), (one, other), (torch.zeros_like(one), other)):
        student = logits.clone().requires_grad_()
        term = FORMS[name].call(student, label(kind, teacher, V), mask, gold)
        term.total.backward()
        assert term.total.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name, kind", CASES)
def test_a_student_surer_than_its_label_is_pulled_back_as_in_float64(name, kind):
    """Its other tokens hold e^-40: 1 minus a sum would be rounding, and so would be the slope."""
    student, teacher, gold, mask = inputs()
    target, call = label(kind, teacher, V), FORMS[name].call
    student = torch.nn.functional.one_hot(teacher.argmax(-1), V) * 40.0 + 0.1 * student
    narrow, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    single, exact = call(narrow, target, mask, gold), call(wide, doubled(target), mask, gold)
    single.total.backward()
    exact.total.backward()
    assert_close(single.total.double(), exact.total, rtol=1e-5, atol=1e-5)
    assert_close(narrow.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_direction_and_unit_are_documented(name):
    doc = FORMS[name].doc
    assert "nats" in doc or "no unit" in doc or "Equal to" in doc
    if "kl" in name.split()[0]:
        assert "KL(" in doc and " || " in doc
