"""The bench judges rightly: its float64 form by hand, a faulty loss caught, our own columns."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import conformance
import rivals
from reference import truth

LN3 = math.log(3)
# Logits rounded to bf16 before the softmax, as in Liger and orda; TRL keeps them in float32.
OPEN = {"FusedLinearKD": {"bf16 inputs (loss 1e-03, grad 5e-03)"}}


def case(**changes):
    """q = (1/4, 3/4), p = (3/4, 1/4); the second position is masked and NaN."""
    student = torch.tensor([[[0.0, LN3], [float("nan")] * 2]])
    teacher = torch.tensor([[[LN3, 0.0], [float("nan")] * 2]])
    labels = torch.tensor([[1, rivals.IGNORE]])
    return rivals.Case(student=student, teacher=teacher, labels=labels, **changes)


def test_truth_by_hand():
    right = truth(case())
    assert right.loss == pytest.approx(0.5 * LN3)
    assert right.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert right.grads[0].tolist() == [[pytest.approx([-0.5, 0.5]), [0.0, 0.0]]]
    js = truth(case(divergence="js"))
    assert js.loss == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    mixed = truth(case(kd_weight=0.6, tokens=2))
    assert mixed.loss == pytest.approx((0.6 * 0.5 * LN3 - 0.4 * math.log(0.75)) / 2)


def faulty(takes="logits"):
    """Shifts, divides by all positions, multiplies masked rows by 0, has T squared."""

    def call(case):
        z, t = case.student[:, :-1] / case.temperature, case.teacher[:, :-1] / case.temperature
        rows = F.kl_div(z.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True)
        rows = rows.sum(-1) * case.mask[:, 1:]
        return rivals.Answer(rows.sum() / case.mask[:, 1:].sum() * case.temperature**2)

    return rivals.Peer("faulty", takes, call, frozenset({"mask", "forward_kl"}), (), "none")


def test_faults_are_caught_and_missing_arguments_named():
    cells = {t: conformance.ask(faulty(), q).text for t, q in conformance.QUESTIONS.items()}
    assert cells["says whether it shifts labels"] == "NO: shifts, not said"
    assert cells["mask: NaN under it changes nothing"] == "NO: loss NaN"
    assert cells["all masked: 0, backward works"] == "NO: loss NaN"
    assert cells["accumulation: parts add up to the whole"].startswith("NO: ")
    assert cells["T²: multiplied in?"] == "n/a: no temperature"
    assert cells["per-token weights"] == "n/a: no weights"
    assert cells["teacher's head wider (padded)"] == "NO: RuntimeError"


@pytest.mark.parametrize("peer", rivals.ours(), ids=lambda peer: peer.name)
def test_our_columns_say_no_only_where_known(peer):
    cells = {t: conformance.ask(peer, q) for t, q in conformance.QUESTIONS.items()}
    assert {t for t, c in cells.items() if c.good is False} <= OPEN.get(peer.name, set())
