"""Log-probabilities of given tokens: the fused form is the plain one, gradients included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.errors import RecipeError
from llmkd.objectives import sequence
from llmkd.objectives.sequence import fused_token_log_probs, token_log_probs
from llmkd.types import Head

F64 = torch.float64


@pytest.fixture(params=[3, 16, 100], ids=lambda rows: f"chunks of {rows}")
def chunked(request, monkeypatch):
    """Few rows at a time, so that some are projected again in the backward pass."""
    monkeypatch.setattr(sequence, "chunk_rows", lambda *_: request.param)


def parts(rows=23, vocab=11, width=5, *, dtype=F64, bias=True, trains=True, seed=0):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=make, dtype=F64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=make, dtype=F64).to(dtype)
    row = torch.randn(vocab, generator=make, dtype=F64).to(dtype) if bias else None
    ids = torch.randint(0, vocab, (rows,), generator=make)
    outer = torch.randn(rows, generator=make, dtype=F64)
    for tensor in (weight, row):
        if tensor is not None:
            tensor.requires_grad_(trains)
    return hidden, weight, row, ids, outer


def test_plain_form_by_hand():
    # log softmax of (0, log 2, log 5): probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]] * 2)
    found = token_log_probs(logits, torch.tensor([2, 0]))
    assert found.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_values_and_gradients_are_the_plain_ones(chunked, softcap, scale, bias, trains):
    hidden, weight, row, ids, outer = parts(bias=bias, trains=trains)
    leaves = [t for t in (hidden, weight, row) if t is not None and t.requires_grad]
    head = Head(weight, row, scale, softcap)
    plain = token_log_probs(head(hidden), ids)
    fused = fused_token_log_probs(hidden, head, ids)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad((plain * outer).sum(), leaves)
    found = torch.autograd.grad((fused * outer).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_gradcheck(chunked, softcap, trains):
    hidden, weight, row, ids, _ = parts(9, trains=trains)
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_token_log_probs(h, Head(w, b, 0.7, softcap), ids),
        (hidden, weight, row),
    )


def test_two_passes_may_share_a_buffer(chunked):
    # the second forward takes the block away before the first one's backward
    blocks, found = {}, []
    made = [parts(seed=seed, bias=False) for seed in (0, 1)]
    sums = [
        (fused_token_log_probs(h, Head(w), ids, blocks=blocks) * outer).sum()
        for h, w, _, ids, outer in made
    ]
    for total, (hidden, weight, _, ids, outer) in zip(sums, made, strict=True):
        found = torch.autograd.grad(total, (hidden, weight))
        plain = (token_log_probs(Head(weight)(hidden), ids) * outer).sum()
        for one, other in zip(found, torch.autograd.grad(plain, (hidden, weight)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_backward_twice_is_the_same_twice(chunked):
    hidden, weight, _, ids, outer = parts(bias=False)
    total = (fused_token_log_probs(hidden, Head(weight), ids) * outer).sum()
    one = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    two = torch.autograd.grad(total, (hidden, weight))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-13)


def test_a_frozen_head_is_projected_once_and_its_weight_has_no_gradient(monkeypatch):
    hidden, weight, row, ids, outer = parts(trains=False)
    calls = []
    whole = sequence.LogitBuffers.logits
    monkeypatch.setattr(
        sequence.LogitBuffers, "logits", lambda *a: calls.append(len(a[2])) or whole(*a)
    )
    monkeypatch.setattr(sequence, "add_product", lambda *_, **__: pytest.fail("weight product"))
    (fused_token_log_probs(hidden, Head(weight, row), ids) * outer).sum().backward()
    assert calls == [len(hidden)] and weight.grad is None


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_bfloat16_sums_in_float32(chunked, trains):
    hidden, weight, _, ids, outer = parts(
        64, 500, 32, dtype=torch.bfloat16, bias=False, trains=trains
    )
    found = fused_token_log_probs(hidden, Head(weight), ids)
    exact = token_log_probs(Head(weight.double())(hidden.double()), ids)
    assert found.dtype == torch.float32
    # a product of bfloat16 rounds to 2^-8 of logits of about 30
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.2)
    leaves = [hidden, weight] if trains else [hidden]
    grads = torch.autograd.grad((found * outer).sum(), leaves)
    wanted = torch.autograd.grad((exact * outer).sum(), leaves)
    for one, other in zip(grads, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        gap = (one.double() - other.double()).norm() / other.double().norm()
        assert gap < 0.05


def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtype():
    hidden, weight, _, ids, outer = parts(dtype=torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = fused_token_log_probs(hidden, Head(weight), ids)
    exact = token_log_probs(Head(weight)(hidden), ids)
    torch.testing.assert_close(narrow, exact, rtol=0, atol=0.2)
    assert narrow.dtype == torch.float32 and not torch.equal(narrow, exact)
    for grad in torch.autograd.grad((narrow * outer).sum(), (hidden, weight)):
        assert grad.dtype == torch.float32


def test_no_gradient_no_graph():
    hidden, weight, row, ids, _ = parts()
    with torch.no_grad():
        found = fused_token_log_probs(hidden, Head(weight, row), ids)
    assert not found.requires_grad
    torch.testing.assert_close(found, token_log_probs(Head(weight, row)(hidden), ids))


def test_no_rows_are_no_error():
    hidden, weight, row, _, _ = parts()
    ids = torch.zeros(0, dtype=torch.int64)
    found = fused_token_log_probs(hidden[:0], Head(weight, row), ids)
    assert found.shape == (0,)
    found.sum().backward()
    assert weight.grad.abs().sum() == 0 and row.grad.abs().sum() == 0


def test_memory_below_one_is_refused():
    hidden, weight, row, ids, _ = parts()
    with pytest.raises(RecipeError, match="head_memory_mib: 0"):
        fused_token_log_probs(hidden, Head(weight, row), ids, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 30), st.floats(-60, 60), st.integers(0, 9))
def test_large_logits_stay_finite_and_sum_to_one(rows, vocab, size, seed):
    hidden, weight, _, ids, _ = parts(rows, vocab, 3, bias=False, seed=seed)
    with torch.no_grad():
        weight.mul_(size)
    ids = torch.arange(vocab)
    each = [
        fused_token_log_probs(row.expand(vocab, -1), Head(weight), ids).exp().sum()
        for row in hidden
    ]
    torch.testing.assert_close(torch.stack(each), torch.ones(rows, dtype=F64))
