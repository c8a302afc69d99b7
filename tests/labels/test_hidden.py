"""Hidden and low-rank labels: exact to rounding, and the directions that matter kept."""

import pytest
import torch
from labels_kit import zipf_logits

from llmkd.errors import NonFiniteError, RecipeError, TeacherError
from llmkd.labels import Hidden, Layout, LowRank, fit_lowrank
from llmkd.labels.hidden import GROUP, wider_head
from llmkd.types import Head


def states(tokens, width, seed=0):
    make = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=make)
    values[:, 0] *= 25  # final hidden states have a few loud channels
    return values


def back(encoding, values):
    columns = encoding.encode(values)
    assert {name: column.dtype.type for name, column in columns.items()} == encoding.columns
    return encoding.decode([columns], Layout((len(values),), (0,), len(values)))[0]


def kl(teacher, student):
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_float32_is_bitwise():
    values = states(9, 37)
    values[0, :3] = torch.tensor([-0.0, 1e-42, 3.4e38])
    assert torch.equal(
        back(Hidden(37, 99, "float32"), values).view(torch.int32), values.view(torch.int32)
    )


def test_bfloat16_is_bitwise_for_a_bfloat16_teacher():
    values = states(9, 37).bfloat16()
    found = back(Hidden(37, 99, "bfloat16"), values)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.int16), values.view(torch.int16))
    assert torch.equal(back(Hidden(37, 99, "bfloat16"), values.float()), values)


@pytest.mark.parametrize("width", [1, 63, 64, 128, 200])
def test_int8_is_within_half_a_step_of_its_group(width):
    values = states(11, width)
    found = back(Hidden(width, 99), values)
    for first in range(0, width, GROUP):
        group, same = values[:, first : first + GROUP], found[:, first : first + GROUP]
        step = group.abs().amax(-1, keepdim=True) / 127
        assert ((group - same).abs() <= step * 0.5001).all()
    zero = back(Hidden(width, 99), torch.zeros(2, width))
    assert torch.equal(zero, torch.zeros(2, width))


def test_rows_of_a_batch_lie_where_they_should():
    for dtype in ("float32", "bfloat16", "int8"):
        encoding = Hidden(70, 99, dtype)
        rows = [encoding.encode(states(n, 70, n)) for n in (2, 3)]
        found = encoding.decode(rows, Layout((2, 3), (2, 0), 4))
        assert torch.equal(found[0, 2:], back(encoding, states(2, 70, 2)))
        assert torch.equal(found[1, :3], back(encoding, states(3, 70, 3)))
        assert not found[0, :2].any() and not found[1, 3].any()
        with pytest.raises(ValueError, match="do not fit together"):
            encoding.decode(rows, Layout((3, 2), (0, 0), 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_teacher_without_numbers(dtype):
    values = states(4, 8)
    values[2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="first is token 2"):
        Hidden(8, 99, dtype).encode(values)


def test_head_and_labels_meet_in_the_wider_type():
    head = Head(torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16), 0.5)
    assert wider_head(head, "bfloat16").weight.dtype == torch.bfloat16
    wide = wider_head(head, "int8")
    assert wide.weight.dtype == wide.bias.dtype == torch.float32 and wide.scale == 0.5


def test_full_rank_is_exact_and_folds_scale_and_bias():
    hidden = states(400, 12)
    make = torch.Generator().manual_seed(1)
    head = Head(torch.randn(50, 12, generator=make) / 4, torch.randn(50, generator=make), 0.25)
    fit = fit_lowrank(hidden, head, 12)
    codec = fit.codec(50, "float32")
    assert kl(head(hidden), fit.head(back(codec, hidden))) < 1e-9
    assert fit.expected_kl == pytest.approx(0, abs=1e-9)
    assert fit.head.scale == 1 and fit.head.weight.shape == (50, 12)


def test_the_fit_keeps_what_moves_probabilities_not_what_is_loud():
    # channel 0 is loud, but the head reads it with one weight for every token: it moves nothing.
    # The other 3 channels carry everything: rank 3 is enough, and PCA of h would waste one on 0.
    hidden = states(500, 4)
    make = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 4, generator=make)
    weight[:, 0] = 2.0
    head = Head(weight)
    fit = fit_lowrank(hidden, head, 3)
    assert kl(head(hidden), fit.head(back(fit.codec(40, "float32"), hidden))) < 1e-7


def test_more_directions_cost_less_and_less_than_plain_pca():
    make = torch.Generator().manual_seed(1)
    hidden = states(3000, 24) * torch.linspace(1, 0.1, 24)
    weight = torch.randn(200, 24, generator=make) * torch.linspace(0.05, 0.6, 24)
    head, costs = Head(weight), []
    for rank in (4, 12, 20):
        fit = fit_lowrank(hidden[:2000], head, rank, shared=200)
        logits = fit.head(back(fit.codec(200, "float32"), hidden[2000:]))
        costs.append(kl(head(hidden[2000:]), logits))
        centred = hidden[:2000] - hidden[:2000].mean(0)
        basis = torch.linalg.svd(centred, full_matrices=False)[2][:rank]
        plain = (hidden[2000:] - hidden[:2000].mean(0)) @ basis.T @ basis + hidden[:2000].mean(0)
        assert costs[-1] < kl(head(hidden[2000:]), head(plain))
    assert costs[0] > costs[1] > costs[2] > 0
    # second order is close where little is dropped
    assert fit.expected_kl == pytest.approx(costs[-1], rel=0.3)


def test_int8_coefficients_cost_little():
    hidden = states(600, 16)
    head = Head(zipf_logits(16, 80).T.contiguous() / 3)
    fit = fit_lowrank(hidden, head, 16)
    assert kl(head(hidden), fit.head(back(fit.codec(80), hidden))) < 1e-2


def test_mistakes():
    head = Head(torch.ones(9, 4))
    with pytest.raises(RecipeError, match=r"label_rank: 5: .* 4 numbers"):
        fit_lowrank(states(20, 4), head, 5)
    with pytest.raises(TeacherError, match="softcap 30"):
        fit_lowrank(states(20, 4), Head(torch.ones(9, 4), softcap=30.0), 2)
    with pytest.raises(TeacherError, match="NaN"):
        fit_lowrank(states(20, 4) * float("nan"), head, 2)
    with pytest.raises(ValueError, match="needs the fit"):
        LowRank(2, 9).encode(states(3, 4))
