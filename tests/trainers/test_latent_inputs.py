"""`LatentDistillTrainer` from plain models, and what a caller may get wrong."""

import pytest
import torch
from latent_kit import tiny_bert
from test_latent_trainer import make
from transformers import BertConfig, BertModel

from llmkd.errors import RecipeError


def test_plain_models_become_student_and_teacher(tmp_path):
    student = tiny_bert(1, layers=2, width=8)
    trainer = make(tmp_path, student=student, teacher=tiny_bert(2), max_steps=1)
    assert trainer.model.body is student and trainer.model.projections["shared"].weight.shape == (
        16,
        8,
    )
    before = trainer.model.projections["shared"].weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.projections["shared"].weight, before)


@pytest.mark.parametrize(
    "options, losses, words",
    [
        ({"student": tiny_bert(1)}, ["hard"], "has no task head"),
        ({"peft_config": object()}, ["latent"], "peft_config"),
    ],
    ids=["head", "adapter"],
)
def test_what_a_caller_may_get_wrong_is_said(tmp_path, options, losses, words):
    with pytest.raises(RecipeError, match=words):
        make(tmp_path, losses=losses, kind="single_label", **options)


def test_another_vocabulary_is_refused(tmp_path):
    other = BertModel(BertConfig(vocab_size=7, hidden_size=16, num_attention_heads=2))
    with pytest.raises(RecipeError, match="different tokens"):
        make(tmp_path, student=other, teacher=tiny_bert(2))
