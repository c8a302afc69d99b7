"""FerKD's gate: thresholds by hand, a corrupted teacher, and what a loss makes of it."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.errors import RecipeError
from llmkd.objectives import (
    ferkd_gate,
    gate_threshold,
    gold_probability,
    smoothed_cross_entropy_rows,
)
from llmkd.objectives.divergences import forward_kl
from llmkd.types import DenseLogits

TENTHS = torch.tensor([0.7, 0.2, 0.9, 0.1, 0.5, 0.4, 0.8, 0.3, 1.0, 0.6, 0.05])


@pytest.mark.parametrize("percentile", [10.0, 33.0, 50.0, 99.5, 100.0])
def test_threshold_is_numpys_percentile(percentile):
    expected = np.percentile(TENTHS.numpy(), percentile)
    assert gate_threshold(TENTHS, percentile).item() == pytest.approx(expected, abs=1e-6)


def test_a_tenth_is_gated_by_hand():
    # 11 numbers: the 10th percentile is the second smallest, .1; one lies below it
    gate = ferkd_gate(TENTHS)
    assert gate.threshold.item() == pytest.approx(0.1)
    assert (~gate.kd).nonzero().flatten().tolist() == [10]
    assert gate.smooth.nonzero().flatten().tolist() == [10] and not gate.drop.any()
    assert gate.smoothing == 0.1
    dropped = ferkd_gate(TENTHS, below="drop")
    assert dropped.drop.nonzero().flatten().tolist() == [10] and not dropped.smooth.any()


@pytest.mark.parametrize("below", ["smooth", "drop"])
def test_every_position_has_one_fate(below):
    gate = ferkd_gate(torch.rand(100), percentile=30.0, below=below)
    fates = gate.kd.long() + gate.smooth.long() + gate.drop.long()
    assert fates.eq(1).all() and gate.kd.sum().item() == 70


def test_a_given_threshold_makes_the_gate_independent_of_the_batch():
    whole = ferkd_gate(TENTHS, threshold=0.45)
    halves = [ferkd_gate(part, threshold=torch.tensor(0.45)) for part in TENTHS.split(4)]
    assert torch.equal(torch.cat([half.kd for half in halves]), whole.kd)
    assert torch.equal(whole.kd, TENTHS >= 0.45)


def test_labels_that_give_gold_nothing_are_below_even_where_they_tie():
    """RS-KD's draws: more than a tenth of all positions may lack their gold token."""
    draws = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.5, 0.9])
    gate = ferkd_gate(draws)
    assert gate.threshold.item() == 0.0
    assert gate.kd.tolist() == [False, False, False, True, True, True]


def test_percentile_0_and_an_empty_batch_gate_nothing():
    assert ferkd_gate(torch.tensor([0.0, 0.3]), percentile=0.0).kd.all()
    empty = ferkd_gate(torch.zeros(0))
    assert empty.kd.shape == (0,) and empty.threshold.item() == -math.inf
    assert ferkd_gate(torch.full((5,), 0.25)).kd.all()  # all alike: nobody is below


def test_settings_are_checked():
    for settings in (
        {"percentile": 101.0},
        {"percentile": math.nan},
        {"smoothing": -0.1},
        {"below": "dorp"},
    ):
        with pytest.raises(RecipeError):
            ferkd_gate(TENTHS, **settings)


def test_gate_precision_on_a_corrupted_teacher():
    """Spec 3: a teacher that is right on 80 % of the positions and sure of a wrong token on 20 %.

    A gate at the 20th percentile should name the corrupted ones; chance would be right on 20 %.
    """
    torch.manual_seed(0)
    count, vocab = 2000, 50
    gold = torch.randint(0, vocab, (count,))
    corrupted = torch.rand(count) < 0.2
    believed = torch.where(corrupted, (gold + torch.randint(1, vocab, (count,))) % vocab, gold)
    logits = torch.randn(count, vocab)
    logits.scatter_add_(-1, believed[:, None], 4.0 + 1.5 * torch.randn(count, 1))
    gold_p = gold_probability(DenseLogits(logits, vocab), gold)
    gate = ferkd_gate(gold_p, percentile=20.0)
    precision = corrupted[~gate.kd].float().mean().item()
    assert precision > 0.85
    tenth = ferkd_gate(gold_p)  # the default keeps half of the corrupted and is surer still
    assert corrupted[~tenth.kd].float().mean().item() > precision


def test_smoothed_cross_entropy_by_hand():
    # q = (.5, .25, .25), eps .1: -.9 ln .5 - .1 / 3 (ln .5 + 2 ln .25) = .9 ln 2 + ln 2 / 6
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    value = smoothed_cross_entropy_rows(logits, torch.tensor([0]))
    assert value.item() == pytest.approx((0.9 + 1 / 6) * math.log(2), abs=1e-12)
    torch.manual_seed(0)
    logits, gold = torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    library = torch.nn.functional.cross_entropy(logits, gold, reduction="none", label_smoothing=0.3)
    assert_close(smoothed_cross_entropy_rows(logits, gold, smoothing=0.3), library)
    # a padded head: the even part over the 7 real tokens only
    labels = 0.7 * torch.nn.functional.one_hot(gold % 7, 9).double()
    labels[:, :7] += 0.3 / 7
    padded = smoothed_cross_entropy_rows(logits, gold % 7, smoothing=0.3, entries=7)
    assert_close(padded, -(labels * logits.log_softmax(-1)).sum(-1))


def test_rows_are_chosen_not_multiplied_by_zero():
    torch.manual_seed(0)
    student = torch.randn(4, 6, requires_grad=True)
    teacher, gold = DenseLogits(torch.randn(4, 6), 6), torch.tensor([0, 1, 2, 3])
    gate = ferkd_gate(torch.tensor([0.5, 0.01, 0.5, 0.5]), threshold=0.1)
    kd = forward_kl.of_rows(student, teacher)
    ce = smoothed_cross_entropy_rows(student, gold, smoothing=gate.smoothing)
    chosen = gate.combine(kd, ce)
    assert_close(chosen, torch.stack((kd[0], ce[1], kd[2], kd[3])))
    dropped = ferkd_gate(torch.tensor([0.5, 0.01, 0.5, 0.5]), threshold=0.1, below="drop")
    kept = dropped.combine(torch.where(dropped.drop, torch.inf, kd), ce)
    kept.sum().backward()
    assert kept[1].item() == 0 and student.grad[1].abs().max() == 0
    assert student.grad.isfinite().all()
