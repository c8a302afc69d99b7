"""Token objectives: values worked by hand, then the fast form against the plain one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.objectives import OBJECTIVES, ce_kd_chunked
from llmkd.objectives import chunked as chunked_module
from llmkd.objectives.divergences import forward_kl
from llmkd.objectives.token import ce_kd, cross_entropy, shift_labels
from llmkd.types import DenseLogits

F64 = torch.float64


def log(rows):
    return torch.tensor(rows, dtype=F64).log()


def test_labels_move_onto_the_token_that_predicts_them():
    assert shift_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]


def test_cross_entropy_is_worked_out_by_hand():
    # q(gold) = .25 and .5; -ln .25 - ln .5 = 2.0794415; the third position is masked
    student = log([[[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]])
    gold, mask = torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]])
    term = cross_entropy(student, gold, mask)
    assert term.total.item() == pytest.approx(3 * math.log(2), abs=1e-12)
    assert term.count.item() == 2


def test_forward_kl_is_worked_out_by_hand():
    # teacher (.9, .1), student (.5, .5): .9 ln(.9/.5) + .1 ln(.1/.5) = .3680642 nats
    teacher = DenseLogits(log([[[0.9, 0.1], [0.2, 0.8]]]), shared=2)
    term = forward_kl(torch.zeros(1, 2, 2, dtype=F64), teacher, torch.tensor([[True, False]]))
    assert term.total.item() == pytest.approx(0.3680642, abs=1e-7)


def test_kd_is_cross_entropy_to_the_teacher_by_hand():
    # p = (.8, .2), q = (.5, .5), gold = 0, w = .25: .75 ln 2 + .25 (.8 ln 2 + .2 ln 2) = ln 2;
    # q = (.25, .75): .75 * -ln .25 + .25 * (-.8 ln .25 - .2 ln .75) = 1.3314...
    p = DenseLogits(log([[[0.8, 0.2]]]), 2)
    gold, mask = torch.tensor([[0]]), torch.tensor([[True]])
    even = ce_kd(log([[[0.5, 0.5]]]), p, mask, gold_BT=gold, kd_weight=0.25)
    assert even.total.item() == pytest.approx(math.log(2), abs=1e-12)
    odd = ce_kd(log([[[0.25, 0.75]]]), p, mask, gold_BT=gold, kd_weight=0.25)
    by_hand = 0.75 * math.log(4) + 0.25 * (0.8 * math.log(4) + 0.2 * math.log(4 / 3))
    assert odd.total.item() == pytest.approx(by_hand, abs=1e-12)


def test_temperature_a_quarter_is_the_fourth_power():
    # softmax(z / .25) is p^4 renormalised: (.6, .4) -> .1296 / (.1296 + .0256) = .8350515
    p = DenseLogits(log([[[0.6, 0.4]]]), 2)
    student = torch.zeros(1, 1, 2, dtype=F64, requires_grad=True)
    term = forward_kl(student, p, torch.tensor([[True]]), teacher_temperature=0.25)
    term.total.backward()
    # d KL / d logits = q - p
    assert student.grad[0, 0, 0].item() == pytest.approx(0.5 - 0.8350515, abs=1e-7)


def test_t2_multiplies_by_the_students_temperature_squared():
    p = DenseLogits(log([[[0.9, 0.1]]]), 2)
    student, mask = log([[[0.3, 0.7]]]), torch.tensor([[True]])
    options = {"teacher_temperature": 3.0, "student_temperature": 3.0}
    bare = forward_kl(student, p, mask, **options).total
    scaled = forward_kl(student, p, mask, **options, t2_scale=True).total
    assert scaled.item() == pytest.approx(9 * bare.item(), rel=1e-12)


def test_mixed_loss_is_cross_entropy_to_the_mixed_target():
    # spec salt.md section 5: CE against (1 - w) onehot + w p, gradient softmax - target
    torch.manual_seed(0)
    student = torch.randn(1, 3, 7, dtype=F64, requires_grad=True)
    teacher, gold = torch.randn(1, 3, 7, dtype=F64), torch.tensor([[1, 4, 6]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    term = ce_kd(student, DenseLogits(teacher, 7), mask, gold_BT=gold, kd_weight=0.667)
    term.total.backward()
    onehot = torch.nn.functional.one_hot(gold, 7)
    target = (1 - 0.667) * onehot + 0.667 * teacher.softmax(-1)
    loss = -(target * student.log_softmax(-1)).sum()
    torch.testing.assert_close(term.total, loss)
    torch.testing.assert_close(student.grad, (student.softmax(-1) - target).detach())


CASES = st.tuples(
    st.integers(2, 40),  # student vocabulary
    st.integers(2, 40),  # teacher vocabulary
    st.sampled_from([0.0, 0.3, 0.667, 1.0]),
    st.sampled_from([0.25, 1.0, 2.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.booleans(),
    st.integers(0, 10_000),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_fast_form_equals_the_plain_one(case):
    vocab, teacher_vocab, weight, t_teacher, t_student, t2, seed = case
    torch.manual_seed(seed)
    shared = int(torch.randint(1, min(vocab, teacher_vocab) + 1, ()))
    student = (torch.randn(2, 9, vocab, dtype=F64) * 4).requires_grad_()
    teacher = DenseLogits(torch.randn(2, 9, teacher_vocab, dtype=F64) * 4, shared)
    gold, mask = torch.randint(0, shared, (2, 9)), torch.rand(2, 9) > 0.3
    options = {
        "gold_BT": gold,
        "kd_weight": weight,
        "teacher_temperature": t_teacher,
        "student_temperature": t_student,
        "t2_scale": t2,
    }
    plain = ce_kd(student, teacher, mask, **options)
    plain.total.backward()
    expected, student.grad = student.grad.clone(), None
    chunk, chunked_module.CHUNK_BYTES = chunked_module.CHUNK_BYTES, 1  # 16 rows: several chunks
    try:
        fast = ce_kd_chunked(student, teacher, mask, **options)
    finally:
        chunked_module.CHUNK_BYTES = chunk
    fast.total.backward()
    torch.testing.assert_close(fast.total, plain.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-12)
    assert fast.count == plain.count
    for name, value in plain.metrics.items():
        torch.testing.assert_close(fast.metrics[name], value, rtol=1e-9, atol=1e-9)


def test_fast_form_without_a_teacher_is_cross_entropy():
    torch.manual_seed(1)
    student = torch.randn(2, 5, 11, dtype=F64, requires_grad=True)
    gold, mask = torch.randint(0, 11, (2, 5)), torch.rand(2, 5) > 0.4
    plain = cross_entropy(student, gold, mask)
    (expected,) = torch.autograd.grad(plain.total, student)
    fast = ce_kd_chunked(student, None, mask, gold_BT=gold)
    torch.testing.assert_close(fast.total, plain.total)
    torch.testing.assert_close(torch.autograd.grad(fast.total, student)[0], expected)


def test_fast_gradient_is_the_slope_of_the_fast_loss():
    # gradcheck asks twice for one backward pass, which the in-place buffer refuses
    torch.manual_seed(2)
    student = torch.randn(1, 4, 5, dtype=F64)
    teacher = DenseLogits(torch.randn(1, 4, 6, dtype=F64), 4)
    gold, mask = torch.randint(0, 4, (1, 4)), torch.tensor([[True, False, True, True]])

    def loss(logits):
        options = {"gold_BT": gold, "kd_weight": 0.4, "student_temperature": 1.7}
        return ce_kd_chunked(logits, teacher, mask, **options).total

    leaf = student.clone().requires_grad_()
    loss(leaf).backward()
    for place in [(0, 0, 0), (0, 1, 2), (0, 2, 4), (0, 3, 3)]:
        step = torch.zeros_like(student)
        step[place] = 1e-6
        slope = (loss(student + step) - loss(student - step)) / 2e-6
        assert leaf.grad[place].item() == pytest.approx(slope.item(), abs=1e-8)


def test_second_backward_is_refused_rather_than_wrong():
    student = torch.randn(1, 2, 3, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    term = ce_kd_chunked(student, None, mask, gold_BT=torch.zeros(1, 2, dtype=torch.long))
    term.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        term.total.backward()


def test_teacher_may_rule_tokens_out_with_minus_infinity():
    teacher = torch.tensor([[[0.0, float("-inf"), 1.0]]], dtype=F64)
    student = torch.zeros(1, 1, 3, dtype=F64, requires_grad=True)
    mask, gold = torch.tensor([[True]]), torch.tensor([[0]])
    for form in (ce_kd, ce_kd_chunked):
        student.grad = None
        term = form(student, DenseLogits(teacher, 3), mask, gold_BT=gold, kd_weight=0.5)
        term.total.backward()
        assert torch.isfinite(term.total) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_logits_dtype_and_are_close(dtype):
    torch.manual_seed(3)
    wide = torch.randn(2, 6, 50, dtype=F64)
    teacher, gold = torch.randn(2, 6, 50), torch.randint(0, 50, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    student = wide.to(dtype).requires_grad_()
    term = ce_kd_chunked(student, DenseLogits(teacher, 50), mask, gold_BT=gold, kd_weight=0.6)
    term.total.backward()
    exact = student.detach().double().requires_grad_()
    ce_kd(
        exact, DenseLogits(teacher.double(), 50), mask, gold_BT=gold, kd_weight=0.6
    ).total.backward()
    assert student.grad.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    assert (student.grad.double() - exact.grad).abs().max() < tolerance


def test_unknown_objective_names_the_nearest():
    from llmkd.errors import RecipeError
    from llmkd.objectives import find

    assert find("forward_kl") is OBJECTIVES["forward_kl"]
    with pytest.raises(RecipeError, match="did you mean 'forward_kl'"):
        find("foward_kl")
