"""The teacher's embeddings in a narrower student: principal directions, worked by hand."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from llmkd.errors import RecipeError
from llmkd.models.embeddings import take_embeddings


def bert(width: int, *, vocab: int = 30, positions: int = 12, seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=positions,
        pad_token_id=0,
    )
    return BertModel(config)


def test_directions_are_those_with_most_of_the_teacher():
    # All words lie on the axes 1 and 3 of four, and more on 3: the first direction is axis 3.
    teacher, student = bert(4), bert(2, seed=1)
    words = torch.zeros(30, 4)
    words[1:15, 1] = 1.0
    words[15:, 3] = torch.where(torch.arange(15) % 2 == 0, 3.0, -3.0)
    with torch.no_grad():
        teacher.embeddings.word_embeddings.weight.copy_(words)
    size = student.embeddings.word_embeddings.weight.std().item()
    basis = take_embeddings(student, teacher)
    torch.testing.assert_close(basis.abs(), torch.tensor([[0.0, 0, 0, 1], [0, 1, 0, 0]]))
    made = student.embeddings.word_embeddings.weight
    torch.testing.assert_close(made / made.std() * (words @ basis.T).std(), words @ basis.T)
    assert made.std().item() == pytest.approx(size, rel=1e-5)


def test_every_table_is_cut_the_same_way_and_padding_stays_zero():
    teacher, student = bert(8), bert(4, seed=1)
    basis = take_embeddings(student, teacher)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    ratios = []
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        own = getattr(student.embeddings, name).weight
        theirs = getattr(teacher.embeddings, name).weight @ basis.T
        rows = slice(1, None) if name == "word_embeddings" else slice(None)
        ratios.append((own[rows] / theirs[rows]).flatten())
    ratio = torch.cat(ratios)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert not student.embeddings.word_embeddings.weight[0].any()


def test_at_equal_width_nothing_is_lost():
    teacher, student = bert(8), bert(8, seed=1)
    basis = take_embeddings(student, teacher)
    back = student.embeddings.word_embeddings.weight @ basis  # what the projection begins with
    theirs = teacher.embeddings.word_embeddings.weight
    torch.testing.assert_close(back / back.std(), theirs / theirs.std(), rtol=1e-4, atol=1e-4)


def test_decoders_have_one_table():
    def llama(width: int) -> LlamaModel:
        return LlamaModel(
            LlamaConfig(
                vocab_size=20, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, intermediate_size=8,
            )
        )  # fmt: skip

    teacher, student = llama(8), llama(4)
    basis = take_embeddings(student, teacher)
    assert basis.shape == (4, 8) and basis.dtype == torch.float32


@pytest.mark.parametrize(
    "student, words",
    [(bert(16), "16 dimensions are more than the teacher's 8"), (bert(4, positions=20), "(20, 4)")],
    ids=["wider", "more positions"],
)
def test_what_cannot_be_cut_is_refused(student, words):
    before = student.embeddings.word_embeddings.weight.clone()
    with pytest.raises(RecipeError) as caught:
        take_embeddings(student, bert(8))
    assert "student_embeddings" in str(caught.value) and words in str(caught.value)
    assert torch.equal(student.embeddings.word_embeddings.weight, before)
