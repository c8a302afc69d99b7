"""Top-k and sampled labels: what is stored, what comes back, and that draws are unbiased."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labels_kit import zipf_logits

from llmkd.errors import NonFiniteError, RecipeError
from llmkd.labels import Dense, Layout, Sampled, TopK, encoding_from, make_encoding


def dense(ids, probs, vocab):
    """[..., K] -> [..., vocab], float64."""
    return torch.zeros(*ids.shape[:-1], vocab, dtype=torch.float64).scatter_add_(
        -1, ids, probs.double()
    )


def one_row(encoding, logits, row=0):
    columns = encoding.encode(logits, row=row)
    for name, kind in encoding.columns.items():
        assert columns[name].dtype == kind and columns[name].ndim == 1
    assert set(columns) == set(encoding.columns)
    ids, probs = encoding.decode([columns], Layout((len(logits),), (0,), len(logits)))
    return ids[0], probs[0]


def test_top_k_by_hand():
    # p = .5, .3, .15, .05: the two likeliest and a tail of .2
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    for bits in (8, 16):
        ids, probs = one_row(TopK(2, 4, value_bits=bits), logits)
        assert ids.tolist() == [[1, 3]]
        assert probs[0].tolist() == pytest.approx([0.5, 0.3], rel=1e-3)
        assert 1 - probs.sum().item() == pytest.approx(0.2, rel=1e-3)


def test_temperature_divides_the_logits():
    # p ** (1 / 2) of .8, .2 is .894, .447; scaled to 1: .6667, .3333
    _, probs = one_row(TopK(2, 2, temperature=2.0), torch.tensor([[0.8, 0.2]]).log())
    assert probs[0].tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-3)


@pytest.mark.parametrize("vocab", [5, 64, 700, 70_001])
@pytest.mark.parametrize("bits, worst", [(16, 0.006), (8, 0.06)])
def test_top_k_comes_back(vocab, bits, worst):
    logits, k = zipf_logits(12, vocab), min(vocab, 33)
    ids, probs = one_row(TopK(k, vocab, value_bits=bits), logits)
    p = logits.double().softmax(-1)
    best, wanted = p.topk(k)
    assert torch.equal(ids, wanted)  # no ties in these
    big = best > 2e-9  # where 8-bit codes begin
    assert ((probs - best).abs() / best)[big].max() < worst
    assert torch.allclose(probs.sum(-1).double(), best.sum(-1), atol=2e-3)


def test_top_k_finds_ties_and_minus_infinity():
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, [3, 500, 999]] = 1.0
    for bits in (8, 16):
        ids, probs = one_row(TopK(5, 1000, value_bits=bits), logits)
        whole = dense(ids, probs, 1000)[0]
        assert whole[[3, 500, 999]].tolist() == pytest.approx([1 / 3] * 3, rel=1e-2)
        assert whole.sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("vocab, k", [(70, 70), (70, 9), (1000, 12), (130, 100)])
@pytest.mark.parametrize("bits", [8, 16])
def test_more_entries_than_finite_logits_list_tokens_that_exist(vocab, k, bits):
    logits = torch.full((3, vocab), float("-inf"))
    logits[:, [2, vocab - 1, 40]] = torch.tensor([1.0, 0.0, 2.0])
    logits[1] = zipf_logits(1, vocab)[0]
    ids, probs = one_row(TopK(k, vocab, value_bits=bits), logits)
    assert all(len(set(row)) == k and max(row) < vocab for row in ids.tolist())
    assert ids[0, :3].tolist() == [40, 2, vocab - 1]
    wanted = torch.tensor([2.0, 1.0, 0.0]).softmax(-1)
    assert torch.allclose(probs[0, :3], wanted, atol=2e-3) and probs[0, 3:].sum() < 1e-6


def test_draws_by_hand():
    # 4 points on .5, .25, .25: 2, 1, 1 whatever the offset
    ids, probs = one_row(Sampled(4, 3), torch.tensor([[0.25, 0.5, 0.25]]).log())
    assert ids.tolist() == [[1, 0, 2]]  # drawn more than once first, then by id
    assert probs.tolist() == [[0.5, 0.25, 0.25]]


@given(
    vocab=st.sampled_from([1, 2, 63, 64, 65, 300, 70_001, 200_000]),
    draws=st.sampled_from([1, 2, 20, 255]),
    seed=st.integers(0, 2**40),
    sampling=st.sampled_from(["systematic", "multinomial"]),
)
@settings(max_examples=25, deadline=None)
def test_draws_come_back(vocab, draws, seed, sampling):
    logits = zipf_logits(6, vocab, seed % 7)
    encoding = Sampled(draws, vocab, sampling=sampling, seed=seed)
    ids, probs = one_row(encoding, logits)
    counts = dense(ids, probs, vocab) * draws
    assert torch.allclose(counts, counts.round(), atol=1e-4) and ids.max() < vocab
    assert torch.equal(counts.sum(-1).round(), torch.full((6,), float(draws), dtype=torch.float64))
    if sampling == "systematic":  # floor(N p) or one more; slack for a float32 softmax
        expected = logits.double().softmax(-1) * draws
        assert ((counts - expected).abs() < 1 + 1e-3).all()


@pytest.mark.parametrize("sampling", ["systematic", "multinomial"])
def test_draws_are_unbiased_and_as_noisy_as_theory_says(sampling):
    # 20,000 labels of one distribution. Each c_i / N has mean p_i. Its variance is p (1 - p) / N
    # for independent draws; systematic ones give floor(N p) or one more: f (1 - f) / N^2 with f
    # the fraction of N p, which is never more.
    tries, draws, vocab = 20_000, 12, 130
    logits = zipf_logits(1, vocab, 3)
    p = logits.double().softmax(-1)[0]
    ids, probs = one_row(
        Sampled(draws, vocab, sampling=sampling, seed=5), logits.expand(tries, -1).contiguous()
    )
    drawn = dense(ids, probs, vocab)
    error = (p * (1 - p) / draws / tries).sqrt()  # standard error of independent draws
    assert ((drawn.mean(0) - p).abs() < 4.5 * error + 1e-9).all()
    fraction = (draws * p).frac()
    independent = p * (1 - p) / draws
    theory = fraction * (1 - fraction) / draws**2 if sampling == "systematic" else independent
    assert drawn.var(0).sum().item() == pytest.approx(theory.sum().item(), rel=0.03)
    assert (fraction * (1 - fraction) / draws**2 <= independent + 1e-12).all()


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    # 150,000 entries of p = 1.3e-6 behind one of 0.8: a float32 running sum would lose or double
    # them. Their halves must be hit alike: 200 x 250 draws, .2 of them rare, split evenly.
    vocab = 150_001
    logits = torch.zeros(1, vocab)
    logits[0, 0] = np.log(4 * (vocab - 1))
    encoding = Sampled(250, vocab, seed=2)
    ids, probs = one_row(encoding, logits.expand(200, -1))
    rare = (ids > 0) & (probs > 0)
    assert (probs * rare).sum(-1).mean().item() == pytest.approx(0.2, abs=0.001)
    first = ((ids <= vocab // 2) & rare).sum() / rare.sum()
    assert first.item() == pytest.approx(0.5, abs=0.005)


def test_a_row_does_not_depend_on_pieces_or_company():
    logits = zipf_logits(50, 4000)
    for encoding in (
        Sampled(30, 4000, seed=9),
        Sampled(30, 4000, sampling="multinomial"),
        TopK(20, 4000),
        Dense(4000),
    ):
        whole = encoding.encode(logits, row=7)
        pieces = [
            encoding.reduce(logits[a:b], row=7, start=a) for a, b in ((0, 1), (1, 33), (33, 50))
        ]
        joined = encoding.pack(*pieces)
        assert all(np.array_equal(whole[name], joined[name]) for name in whole)
    other = Sampled(30, 4000, seed=9).encode(logits, row=8)
    assert not np.array_equal(other["ids"], Sampled(30, 4000, seed=9).encode(logits, row=7)["ids"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padding_of_the_head_is_never_listed(dtype):
    logits = zipf_logits(9, 100).to(dtype)
    logits[:, 70:] = 50.0  # what lies beyond `shared` is no token
    for encoding in (Sampled(40, 70), TopK(30, 70)):
        ids, probs = one_row(encoding, logits)
        assert ids[probs > 0].max() < 70
        assert probs.sum(-1).max() <= 1 + 1e-5


@pytest.mark.parametrize(
    "encoding", [Sampled(20, 70_000), TopK(7, 70_000), TopK(7, 70_000, 1.0, 8)]
)
def test_rows_of_a_batch_lie_where_they_should(encoding):
    logits = [zipf_logits(n, 70_000, n) for n in (4, 6, 1)]
    columns = [encoding.encode(value, row=i) for i, value in enumerate(logits)]
    ids, probs = encoding.decode(columns, Layout((4, 6, 1), (3, 1, 6), 7))
    assert ids.dtype == torch.int64 and probs.dtype == torch.float32
    assert ids.shape == probs.shape and ids.shape[:2] == (3, 7)
    for b, (length, start) in enumerate(((4, 3), (6, 1), (1, 6))):
        alone = dense(*one_row(encoding, logits[b], row=b), 70_000)
        assert torch.equal(dense(ids, probs, 70_000)[b, start : start + length], alone)
    assert probs[0, :3].sum() == probs[1, 0].sum() == probs[2, :6].sum() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("encoding", [Sampled(5, 90), TopK(5, 90), Dense(90)])
def test_a_teacher_without_numbers(encoding, value):
    logits = zipf_logits(6, 90)
    logits[4, 17] = value
    with pytest.raises(NonFiniteError, match=r"1 of 6 tokens.*first is token 4"):
        encoding.encode(logits)


def test_counts_that_do_not_add_up_are_damage():
    encoding = Sampled(20, 300)
    columns = encoding.encode(zipf_logits(5, 300))
    layout = Layout((5,), (0,), 5)
    with pytest.raises(ValueError, match="do not fit together"):
        encoding.decode([{**columns, "many": columns["many"] + np.uint8(1)}], layout)
    with pytest.raises(ValueError, match="add up to 20 draws"):
        encoding.decode([{**columns, "counts": columns["counts"] + np.uint8(1)}], layout)
    with pytest.raises(ValueError, match="outside the 300 shared"):
        encoding.decode([{**columns, "ids": columns["ids"] + np.uint16(300)}], layout)


def test_bytes_a_token():
    logits = zipf_logits(200, 49_152)
    sizes = {
        name: sum(column.nbytes for column in encoding.encode(logits).values()) / 200
        for name, encoding in {
            "20 draws": Sampled(20, 49_152),
            "top 20": TopK(20, 49_152),
            "top 20, 8 bits": TopK(20, 49_152, value_bits=8),
        }.items()
    }
    assert sizes["20 draws"] < 26  # 10 ids on these; real text is more peaked
    assert sizes["top 20"] == 20 * 4 + 2 and sizes["top 20, 8 bits"] == 20 * 3 + 6


def test_settings_make_the_encoding_again():
    for encoding in (
        TopK(9, 99, 2.0, 8),
        Sampled(9, 99, 0.5, "multinomial", 3),
        make_encoding("hidden", shared=99, width=8, dtype="bfloat16"),
        make_encoding("lowrank", shared=99, rank=3),
        make_encoding("dense", shared=99, dtype="float16", per="row"),
    ):
        again = encoding_from(
            encoding.settings(), shared=99, temperature=encoding.temperature, seed=3
        )
        assert type(again) is type(encoding) and again.settings() == encoding.settings()
        assert again.temperature == encoding.temperature and again.shared == 99


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": "topk", "k": 301}, "label_k: 301"),
        ({"name": "topk", "k": 0}, "label_k: 0: must be at least 1"),
        ({"name": "topk", "value_bits": 4}, "label_value_bits: 4"),
        ({"name": "sampled", "draws": 256}, "label_draws: 256"),
        ({"name": "sampled", "sampling": "greedy"}, "label_sampling: 'greedy'"),
        ({"name": "sampled", "temperature": 0.0}, "teacher_temperature: 0.0"),
        ({"name": "hidden", "dtype": "int4", "width": 8}, "label_dtype: 'int4'"),
        ({"name": "lowrank", "rank": 0}, "label_rank: 0"),
        ({"name": "dense", "dtype": "int8"}, "label_dtype: 'int8'"),
        ({"name": "topK"}, "did you mean 'topk'"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(RecipeError, match=words):
        make_encoding(**settings, shared=300)
