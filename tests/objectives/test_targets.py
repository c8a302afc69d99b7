"""Soft labels as events: values worked by hand; several teachers; draws."""

import pytest
import torch
from torch.testing import assert_close

from llmkd.objectives.divergences import forward_kl, soft_cross_entropy
from llmkd.objectives.targets import gold_probability, log_events, log_probs, sparse_probs
from llmkd.types import TAILS, DenseLogits, Head, HiddenTarget, MixtureTarget, SparseTarget

F64 = torch.float64


def rows(*values):
    return torch.tensor(values, dtype=F64)


def sparse(tail, ids=(3, 1), probs=(0.5, 0.2), shared=5):
    return SparseTarget(torch.tensor([ids]), rows(probs), shared, tail)


def test_bucket_events_by_hand():
    # listed tokens 3 and 1, the rest .3; student (.1, .2, .3, .25, .05, .1): the rest .55
    student = rows((0.1, 0.2, 0.3, 0.25, 0.05, 0.1)).log()
    log_p, log_q = log_events(student, sparse("bucket"))
    assert_close(log_p.exp(), rows((0.5, 0.2, 0.3)))
    assert_close(log_q.exp(), rows((0.25, 0.2, 0.55)))


def test_smooth_and_renorm_by_hand():
    # the rest .3 over tokens 0, 2, 4: .1 each; token 5 is the student's padding
    assert_close(sparse_probs(sparse("smooth"), 6), rows((0.1, 0.2, 0.1, 0.5, 0.1, 0.0)))
    assert_close(sparse_probs(sparse("renorm"), 6), rows((0, 2 / 7, 0, 5 / 7, 0, 0)))


@pytest.mark.parametrize("tail", ["bucket", "smooth", "renorm"])
def test_unused_places_change_nothing_whatever_their_id(tail):
    student = torch.randn(1, 6, dtype=F64)
    short = sparse(tail)
    for unused in (3, 0):  # a listed token and another one
        long = sparse(tail, (3, unused, 1), (0.5, 0.0, 0.2))
        assert_close(forward_kl.of_rows(student, long), forward_kl.of_rows(student, short))


@pytest.mark.parametrize("tail", ["bucket", "smooth", "renorm"])
@pytest.mark.parametrize("student_entries", [8, 11])
def test_listing_every_token_is_the_dense_label(tail, student_entries):
    torch.manual_seed(0)
    teacher, student = torch.randn(4, 8, dtype=F64), torch.randn(4, student_entries, dtype=F64)
    top = teacher.softmax(-1).topk(8)
    student.requires_grad_()
    whole = forward_kl.of_rows(student, SparseTarget(top.indices, top.values, 8, tail))
    dense = forward_kl.of_rows(student, DenseLogits(teacher, 8))
    assert_close(whole, dense)
    slopes = [torch.autograd.grad(v.sum(), student)[0] for v in (whole, dense)]
    assert_close(*slopes)


def test_a_sure_student_still_feels_the_bucket_in_single_precision():
    # q(rest) = e^-40 is 0 beside 1 in float32; 1 minus the others would be a floor without slope
    student = torch.tensor([[40.0, 0.0]], requires_grad=True)
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.75]]), 2)
    value = forward_kl.of_rows(student, target)
    value.sum().backward()
    # .75 ln .75 + .25 (ln .25 + 40)
    assert value.item() == pytest.approx(9.4376648, rel=1e-6)
    assert_close(student.grad, torch.tensor([[0.25, -0.25]]))


def test_a_sparse_label_keeps_its_temperature():
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.5]]), 2, temperature=2.0)
    with pytest.raises(ValueError, match="made at 2"):
        forward_kl.of_rows(torch.zeros(1, 2), target)


def test_a_label_wider_than_the_head_is_refused():
    with pytest.raises(ValueError, match="9 entries, the student's head 7"):
        forward_kl.of_rows(torch.zeros(1, 7), DenseLogits(torch.zeros(1, 9), 9))


def teachers(dtype=F64):
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 7, dtype=dtype) * 3
    weight = torch.linalg.qr(torch.randn(7, 7, dtype=dtype)).Q
    hidden = HiddenTarget(second @ weight, Head(weight), 7)
    top = second.roll(1, -1).softmax(-1).topk(3)
    return DenseLogits(first, 7), hidden, SparseTarget(top.indices, top.values, 7, "smooth")


def test_soft_ce_to_a_mixture_is_the_weighted_mean_of_soft_ces():
    """MEAL V2, arXiv 2009.08453: the mean in probability is the mean of the losses."""
    parts, weights = teachers(), (0.5, 0.3, 0.2)
    student = torch.randn(6, 7, dtype=F64, requires_grad=True)
    mixed = soft_cross_entropy.of_rows(student, MixtureTarget(parts, weights))
    alone = [soft_cross_entropy.of_rows(student, part) for part in parts]
    mean = sum(weight * value for weight, value in zip(weights, alone, strict=True))
    assert_close(mixed, mean, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (mixed, mean)]
    assert_close(*slopes)


def test_means_in_probability_and_in_logits_differ_by_hand():
    # (.99, .01) and (.5, .5): mean .745; the logits' mean has odds sqrt(99) = 9.9498744: .9086748
    logits = [rows(p).log() for p in ((0.99, 0.01), (0.5, 0.5))]
    mixture = MixtureTarget(tuple(DenseLogits(z, 2) for z in logits), (0.5, 0.5))
    assert log_probs(mixture, 2, 1.0).exp()[0, 0].item() == pytest.approx(0.745, abs=1e-12)
    mean = DenseLogits(sum(logits) / 2, 2)
    assert log_probs(mean, 2, 1.0).exp()[0, 0].item() == pytest.approx(0.9086748, abs=1e-7)


def test_weights_of_a_mixture():
    parts = teachers()
    alone = log_probs(MixtureTarget(parts, (0.0, 1.0, 0.0)), 7, 1.0)
    assert_close(alone, log_probs(parts[1], 7, 1.0))
    quarter = MixtureTarget(parts[:2], (0.25, 0.75))
    expected = 0.25 * parts[0].logits_BTV.softmax(-1) + 0.75 * parts[1].dense().logits_BTV.softmax(
        -1
    )
    assert_close(log_probs(quarter, 7, 1.0).exp(), expected, rtol=1e-12, atol=1e-12)
    for weights in ((0.5, 0.6), (1.5, -0.5), (1.0,)):
        with pytest.raises(ValueError, match="weights"):
            MixtureTarget(parts[:2], weights)
    with pytest.raises(ValueError, match="tail renorm or smooth"):
        MixtureTarget((parts[0], sparse("bucket")), (0.5, 0.5))


def test_draws_give_the_dense_gradient_on_average_and_a_top_k_does_not():
    """RS-KD, arXiv 2503.16870: E[c_i / N] = p_i, and the gradient q - c / N is linear in it."""
    torch.manual_seed(0)
    teacher = torch.randn(1, 12, dtype=F64) * 2
    p_V = teacher.softmax(-1)
    student = torch.randn(1, 12, dtype=F64)
    many, draws = 20_000, 10

    def gradient(target, count):
        leaf = student.expand(count, -1).clone().requires_grad_()
        forward_kl.of_rows(leaf, target).sum().backward()
        return leaf.grad.mean(0, keepdim=True)

    ids = p_V.expand(many, -1).multinomial(draws, replacement=True)
    counts = torch.zeros(many, 12, dtype=F64).scatter_add_(-1, ids, torch.ones(ids.shape).double())
    kept = counts.topk(10)  # ids that were drawn at most 10 times, each once
    sampled = SparseTarget(kept.indices, kept.values / draws, 12, "renorm")
    full = gradient(DenseLogits(teacher, 12), 1)
    # a mean over 20,000 rows of 10 draws: standard error at most sqrt(.25 / 200,000) = .0011
    assert (gradient(sampled, many) - full).abs().max() < 0.005
    top = p_V.topk(4)
    biased = gradient(SparseTarget(top.indices, top.values, 12, "renorm"), 1)
    assert (biased - full).abs().max() > 0.01


def test_gold_probability_of_every_kind():
    teacher = rows((0.1, 0.2, 0.15, 0.5, 0.05, 0.9)).log()  # 5 shared entries, one of padding
    gold = torch.tensor([3])

    def of(target, token=3, temperature=1.0):
        return gold_probability(target, torch.tensor([token]), temperature).item()

    dense = DenseLogits(teacher, 5)
    hidden = HiddenTarget(teacher, Head(torch.eye(6, dtype=F64)), 5)
    assert of(dense) == pytest.approx(0.5) and of(hidden) == pytest.approx(0.5)
    assert of(dense, 5) == 0.0  # gold beyond the shared entries
    # p^2 renormalised: .25 / (.01 + .04 + .0225 + .25 + .0025)
    assert of(dense, 3, 0.5) == pytest.approx(0.25 / 0.325)
    assert of(MixtureTarget((dense, sparse("renorm")), (0.5, 0.5))) == pytest.approx(
        0.5 * 0.5 + 0.5 * 5 / 7
    )
    # listed: itself; unlisted: .3 over three tokens, nothing for draws
    for tail in TAILS:
        listed, unlisted = (5 / 7, 0.0) if tail == "renorm" else (0.5, 0.1)
        assert of(sparse(tail)) == pytest.approx(listed)
        assert of(sparse(tail), 4) == pytest.approx(unlisted)
        assert of(sparse(tail), 5) == 0.0
    assert gold_probability(dense, gold).shape == (1,)
    for tail in ("smooth", "renorm"):
        for token in range(5):
            whole = sparse_probs(sparse(tail), 5)[0, token].item()
            assert of(sparse(tail), token) == pytest.approx(whole)
