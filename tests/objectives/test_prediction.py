"""Hard and soft losses of task heads: values by hand, the definition in loops, mixtures, errors.

What they owe to every caller (NaN, sums, dtypes) is in `contracts/test_latent_contracts`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmkd.errors import RecipeError
from llmkd.objectives import OBJECTIVES
from llmkd.objectives.prediction import TASKS, check_soft, hard_loss, soft_loss
from llmkd.types import DenseLogits, MixtureTarget, SparseTarget

F64 = torch.float64
B, T, C = 4, 3, 5
PAIRS = [
    ("single_label", "kl"),
    ("single_label", "mse"),
    ("single_label", "nkd"),
    ("multi_label", "kl"),
    ("multi_label", "mse"),
    ("regression", "kl"),
    ("token", "kl"),
    ("token", "mse"),
    ("token", "nkd"),
]


def dense(logits):
    return DenseLogits(logits, logits.shape[-1])


def batch(kind, seed=0, dtype=F64):
    """Student logits, teacher logits and labels of a kind; some tokens have none."""
    torch.manual_seed(seed)
    shape = {"regression": (B, 1), "token": (B, T, C)}.get(kind, (B, C))
    student, teacher = torch.randn(2, *shape, dtype=dtype) * 2
    if kind == "token":
        labels = torch.randint(0, C, (B, T))
        labels[0, 1:] = labels[2, 0] = -100
    elif kind == "multi_label":
        labels = torch.randint(0, 2, (B, C)).float()
    else:
        labels = torch.randn(B) if kind == "regression" else torch.randint(0, C, (B,))
    return student, teacher, labels


# The definition: plain numbers, one row at a time.


def softmax(z, temperature=1.0):
    weights = [math.exp(x / temperature) for x in z]
    return [weight / sum(weights) for weight in weights]


def sigmoid(x, temperature=1.0):
    return 1 / (1 + math.exp(-x / temperature))


def soft_row(kind, form, z, wanted, gold, temperature=1.0, gamma=1.5):
    """One example's or token's soft loss, without T squared."""
    if form == "mse" or kind == "regression":
        return sum((a - b) ** 2 for a, b in zip(z, wanted, strict=True)) / len(z)
    if kind == "multi_label":
        total = 0.0
        for a, b in zip(z, wanted, strict=True):
            q, p = sigmoid(a, temperature), sigmoid(b, temperature)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        return total / len(z)
    if form == "kl":
        q, p = softmax(z, temperature), softmax(wanted, temperature)
        return sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    others = [i for i in range(len(z)) if i != gold]
    q = softmax([z[i] for i in others], temperature)
    p = softmax([wanted[i] for i in others], temperature)
    rest = -sum(b * math.log(a) for a, b in zip(q, p, strict=True))
    return -softmax(wanted)[gold] * math.log(softmax(z)[gold]) + gamma * temperature**2 * rest


def hard_row(kind, z, gold):
    if kind == "regression":
        return (z[0] - gold) ** 2
    if kind == "multi_label":
        return -sum(
            math.log(sigmoid(x) if y else 1 - sigmoid(x)) for x, y in zip(z, gold, strict=True)
        ) / len(z)
    return -math.log(softmax(z)[gold])


def counted(kind, student, teacher, labels):
    """Rows of numbers, and their gold, of what counts."""
    if kind == "token":
        seen = labels != -100
        student, teacher, labels = student[seen], teacher[seen], labels[seen]
    return student.tolist(), teacher.tolist(), labels.tolist()


@pytest.mark.parametrize("kind, form", PAIRS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_losses_are_their_loops(kind, form, temperature):
    student, teacher, labels = batch(kind)
    rows = counted(kind, student, teacher, labels)
    total = sum(
        soft_row(kind, form, *row, temperature=temperature, gamma=0.8)
        for row in zip(*rows, strict=True)
    )
    options = {"form": form, "temperature": temperature, "gamma": 0.8}
    term = soft_loss(kind, student, dense(teacher), labels, **options)
    assert term.total.item() == pytest.approx(total, rel=1e-10)
    assert term.count.item() == len(rows[0]) and term.total.item() > 0.1
    scaled = soft_loss(kind, student, dense(teacher), labels, **options, t2_scale=True)
    factor = temperature**2 if form == "kl" and kind != "regression" else 1.0
    assert scaled.total.item() == pytest.approx(total * factor, rel=1e-10)


@pytest.mark.parametrize("kind", TASKS)
def test_hard_losses_are_their_loops(kind):
    student, teacher, labels = batch(kind)
    rows, _, gold = counted(kind, student, teacher, labels)
    total = sum(hard_row(kind, z, y) for z, y in zip(rows, gold, strict=True))
    term = hard_loss(kind, student, labels)
    assert term.total.item() == pytest.approx(total, rel=1e-6)
    assert term.count.item() == len(rows)


def test_kl_by_hand():
    # teacher (.9, .1), student (.5, .5): .9 ln 1.8 + .1 ln .2 = .3680642
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.zeros(1, 2)
    term = soft_loss("single_label", student, dense(teacher), None)
    assert term.total.item() == pytest.approx(0.3680642, abs=1e-6) and term.count.item() == 1
    # at T = 1/2 the teacher is (.81, .01) / .82; times T squared a quarter of it
    p = 0.81 / 0.82
    by_hand = p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)
    for t2_scale, factor in ((False, 1.0), (True, 0.25)):
        cold = soft_loss(
            "single_label", student, dense(teacher), None, temperature=0.5, t2_scale=t2_scale
        )
        assert cold.total.item() == pytest.approx(by_hand * factor, abs=1e-6)


def test_binary_kl_by_hand():
    # class 0: teacher .8, student .5: .8 ln 1.6 + .2 ln .4; class 1: both .3. Mean over two.
    teacher = torch.tensor([[0.8, 0.3]]).logit()
    student = torch.tensor([[0.5, 0.3]]).logit()
    by_hand = (0.8 * math.log(1.6) + 0.2 * math.log(0.4)) / 2
    term = soft_loss("multi_label", student, dense(teacher), None)
    assert term.total.item() == pytest.approx(by_hand, abs=1e-6) and term.count.item() == 1


def test_squares_by_hand():
    # ((1 - 3)^2 + (2 - 2)^2) / 2 = 2
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    for kind in ("single_label", "multi_label"):
        assert soft_loss(kind, student, dense(teacher), None, form="mse").total.item() == 2
    # regression: soft to the teacher's number (2 - 5)^2, hard to gold (2 - 4)^2; no mean over B
    numbers = torch.tensor([[2.0], [1.0]])
    soft = soft_loss("regression", numbers, dense(torch.tensor([[5.0], [1.0]])), None)
    hard = hard_loss("regression", numbers, torch.tensor([4.0, 1.0]))
    assert soft.total.item() == 9 and hard.total.item() == 4
    assert soft.count.item() == hard.count.item() == 2


def test_hard_by_hand():
    # -ln .25; mean over classes of (-ln .5, -ln .8)
    student = torch.tensor([[0.75, 0.25]]).log()
    assert hard_loss("single_label", student, torch.tensor([1])).total.item() == pytest.approx(
        -math.log(0.25)
    )
    student = torch.tensor([[0.5, 0.2]]).logit()
    both = hard_loss("multi_label", student, torch.tensor([[1, 0]]))
    assert both.total.item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert both.count.item() == 1


@pytest.mark.parametrize("kind, form", [p for p in PAIRS if p[1] != "nkd"])
def test_no_gradient_at_equal_logits(kind, form):
    student, _, labels = batch(kind)
    for temperature in (1.0, 3.0):
        ours = student.clone().requires_grad_()
        term = soft_loss(kind, ours, dense(student), labels, form=form, temperature=temperature)
        term.total.backward()
        assert abs(term.total.item()) < 1e-14 and ours.grad.abs().max() < 1e-15
    apart = student.clone().add_(torch.randn_like(student)).requires_grad_()
    soft_loss(kind, apart, dense(student), labels, form=form).total.backward()
    assert apart.grad.abs().max() > 0.01


def test_the_mean_is_batchmean_c_times_the_mean_over_all_entries():
    student, teacher, labels = batch("single_label")
    term = soft_loss("single_label", student, dense(teacher), labels)
    log_q, p = student.log_softmax(-1), teacher.softmax(-1)
    entries = torch.nn.functional.kl_div(log_q, p, reduction="none").mean()  # over B * C
    assert (term.total / term.count / entries).item() == pytest.approx(C)
    hard = hard_loss("single_label", student, labels)
    assert_close(hard.total / hard.count, torch.nn.functional.cross_entropy(student, labels))


def test_nkd_is_the_objective_without_its_cross_entropy():
    student, teacher, labels = batch("single_label")
    whole = OBJECTIVES["nkd"](
        student[:, None],
        dense(teacher[:, None]),
        torch.ones(B, 1, dtype=torch.bool),
        gold_BT=labels[:, None],
        temperature=2.0,
        gamma=0.7,
    )
    options = {"form": "nkd", "temperature": 2.0, "gamma": 0.7}
    term = soft_loss("single_label", student, dense(teacher), labels, **options)
    assert_close(term.total, whole.metrics["nkd"])
    assert_close(term.total + hard_loss("single_label", student, labels).total, whole.total)


@pytest.mark.parametrize("form", ["kl", "mse", "nkd"])
def test_tokens_without_a_label_are_left_out(form):
    student, teacher, labels = batch("token")
    term = soft_loss("token", student, dense(teacher), labels, form=form)
    seen = labels != -100
    alone = soft_loss("single_label", student[seen], dense(teacher[seen]), labels[seen], form=form)
    assert_close(term.total, alone.total)
    assert term.count.item() == alone.count.item() == 9  # 12 less 3
    hard = [
        hard_loss("token", student, labels),
        hard_loss("single_label", student[seen], labels[seen]),
    ]
    assert_close(hard[0].total, hard[1].total)
    assert hard[0].count.item() == 9


numbers = st.floats(-30, 30, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), st.floats(0.2, 5.0))
def test_binary_kl_is_never_negative_and_zero_for_equal_logits(pairs, temperature):
    student, teacher = torch.tensor([pairs], dtype=F64).unbind(-1)
    options = {"temperature": temperature}
    apart = soft_loss("multi_label", student, dense(teacher), None, **options).total.item()
    equal = soft_loss("multi_label", teacher, dense(teacher), None, **options).total.item()
    assert equal == 0 and apart >= -1e-12 and math.isfinite(apart)
    gaps = [abs(sigmoid(a, temperature) - sigmoid(b, temperature)) for a, b in pairs]
    assert apart >= 2 * sum(gap**2 for gap in gaps) / len(gaps) - 1e-12  # Pinsker


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "token"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teachers_are_averaged_in_probability(kind, temperature):
    student, one, labels = batch(kind)
    two = torch.randn_like(one) * 3
    mixture = MixtureTarget((dense(one), dense(two)), (0.25, 0.75))
    if kind == "multi_label":
        p = 0.25 * (one / temperature).sigmoid() + 0.75 * (two / temperature).sigmoid()
        mean = p.logit() * temperature
    else:
        p = 0.25 * (one / temperature).softmax(-1) + 0.75 * (two / temperature).softmax(-1)
        mean = p.log() * temperature
    found, wanted, of_logits = (
        soft_loss(kind, student, target, labels, temperature=temperature).total
        for target in (mixture, dense(mean), dense(0.25 * one + 0.75 * two))
    )
    assert_close(found, wanted)
    assert (found - of_logits).abs() > 0.01


def test_a_mixture_in_other_cases():
    student, one, labels = batch("single_label")
    two = torch.randn_like(one)
    alone = MixtureTarget((dense(one), dense(two)), (1.0, 0.0))
    for kind in ("single_label", "multi_label"):
        pair = [soft_loss(kind, student, target, labels) for target in (alone, dense(one))]
        assert_close(pair[0].total, pair[1].total)
    both = MixtureTarget((dense(one), dense(two)), (0.5, 0.5))
    mean = dense((0.5 * one.softmax(-1) + 0.5 * two.softmax(-1)).log())
    pair = [soft_loss("single_label", student, x, labels, form="nkd") for x in (both, mean)]
    assert_close(pair[0].total, pair[1].total)
    # numbers: (2 - (4 + 0) / 2)^2 = 0, (1 - (3 + 0) / 2)^2 = .25
    parts = tuple(dense(torch.tensor(x)) for x in ([[4.0], [3.0]], [[0.0], [0.0]]))
    term = soft_loss(
        "regression", torch.tensor([[2.0], [1.0]]), MixtureTarget(parts, (0.5, 0.5)), None
    )
    assert term.total.item() == 0.25


def test_a_mixture_of_bfloat16_teachers_is_not_rounded_again():
    # bfloat16 has 1.0 and 1.0078125; their mean is no bfloat16 number
    parts = tuple(dense(torch.tensor([[x]], dtype=torch.bfloat16)) for x in (1.0, 1.0078125))
    target = MixtureTarget(parts, (0.5, 0.5))
    term = soft_loss("regression", torch.tensor([[0.0]]), target, None)
    assert term.total.item() == 1.00390625**2


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_sure_logits_stay_finite(kind):
    student = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    for target in (
        dense(student.detach().flip(-1)),
        MixtureTarget((dense(student.detach()), dense(-student.detach())), (0.5, 0.5)),
    ):
        student.grad = None
        term = soft_loss(kind, student, target, None)
        term.total.backward()
        assert term.total.isfinite() and term.total > 40 and student.grad.isfinite().all()


def test_what_a_task_cannot_have_is_refused():
    student, teacher, labels = batch("single_label")
    mixture = MixtureTarget((dense(teacher), dense(student)), (0.5, 0.5))
    with pytest.raises(RecipeError, match=r"(?s)^soft: .*'kll'.*did you mean 'kl'"):
        soft_loss("single_label", student, dense(teacher), labels, form="kll")
    for kind in ("multi_label", "regression"):
        with pytest.raises(
            RecipeError, match=r"^soft: .*needs one gold class; the task is " + kind
        ):
            check_soft(kind, "nkd")
    with pytest.raises(RecipeError, match=r"^soft: .*averaged in probability have none"):
        soft_loss("single_label", student, mixture, labels, form="mse")
    for call in (
        lambda: check_soft("ranking", "kl"),
        lambda: hard_loss("ranking", student, labels),
        lambda: soft_loss("ranking", student, dense(teacher), labels),
    ):
        with pytest.raises(RecipeError, match=r"(?s)^kind: .*'ranking'.*single_label"):
            call()
    check_soft("regression", "mse", mixed=True)


def test_what_does_not_fit_together_is_refused():
    student, teacher, labels = batch("single_label")
    for kind in ("single_label", "multi_label", "regression"):  # one column would be broadcast
        with pytest.raises(ValueError, match=r"\(4, 5\), the teacher's \(4, 1\)"):
            soft_loss(kind, student, dense(teacher[:, :1]), labels)
    with pytest.raises(ValueError, match="nkd of a single_label task needs its labels"):
        soft_loss("single_label", student, dense(teacher), None, form="nkd")
    tokens, theirs, _ = batch("token")
    for form in ("kl", "mse", "nkd"):
        with pytest.raises(ValueError, match="of a token task needs its labels"):
            soft_loss("token", tokens, dense(theirs), None, form=form)
    sparse = SparseTarget(torch.zeros(B, 1, dtype=torch.long), torch.ones(B, 1), C, "renorm")
    with pytest.raises(ValueError, match="SparseTarget holds no class logits"):
        soft_loss("single_label", student, sparse, labels)
