"""Teachers of task models: what they answer, that they stay frozen, several of them as one."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
)

from llmkd.errors import RecipeError, TeacherError
from llmkd.teachers.inside import Wanted
from llmkd.teachers.latent import ClassTeachers, LatentTeacher
from llmkd.types import DenseLogits, MixtureTarget

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 11], [7, 5, 9, 9, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
WITH_MORE = {**BATCH, "labels": torch.tensor([1, 0]), "rows": torch.tensor([3, 8])}


def model(kind=BertForSequenceClassification, seed=0, **options):
    torch.manual_seed(seed)
    return kind(BertConfig(**SIZES, **options))


def cpu():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path):
    model(num_labels=3).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_it_answers_with_what_is_wanted_and_leaves_labels_and_rows_alone():
    own = model(num_labels=3)
    plain = copy.deepcopy(own).eval()(**BATCH, output_hidden_states=True)
    teacher = LatentTeacher(own, head="sequence", wanted=Wanted((0, 3), (2,), True))
    teacher.load(cpu())
    seen = teacher(WITH_MORE)
    assert set(seen.hidden) == {0, 3} and set(seen.scores) == set(seen.visible) == {2}
    assert_close(seen.logits, plain.logits)
    for layer, states in seen.hidden.items():
        assert_close(states, plain.hidden_states[layer])
    assert seen.scores[2].shape == (2, 4, 7, 7) and teacher.forwards == 1
    classes = teacher.classes(BATCH)
    assert isinstance(classes, DenseLogits) and classes.shared == 3
    assert torch.equal(classes.logits_BTV, seen.logits) and teacher.forwards == 2


def test_it_is_frozen_and_calm_though_its_model_came_in_training():
    own = model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    weights = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    teacher = LatentTeacher(own, head="sequence", wanted=Wanted((3,), (1, 2, 3), True))
    teacher.load(cpu())
    one, two = teacher(BATCH), teacher(BATCH)
    assert not own.training and not any(p.requires_grad for p in own.parameters())
    for values in (one.hidden[3], one.scores[1], one.logits):
        assert not values.requires_grad
    assert torch.equal(one.logits, two.logits) and torch.equal(one.scores[3], two.scores[3])
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.state_dict().items())


def test_maps_are_switched_on_only_where_they_are_wanted():
    torch.manual_seed(0)
    teacher = LatentTeacher(
        DebertaV2Model(DebertaV2Config(**SIZES)), wanted=Wanted((1, 3)), key="teacher"
    )
    teacher.load(cpu())
    assert teacher(BATCH).hidden[3].shape == (2, 7, 16)
    teacher.wanted = Wanted((1, 3), (1,))
    with pytest.raises(RecipeError, match=r"(?s)^teacher: .*deberta-v2.*--attn none"):
        teacher.load(cpu())


def test_more_may_be_wanted_once_it_is_loaded():
    """One teacher scored on the task first, then compared inside; two stages after one another."""
    teacher = LatentTeacher(model(), head="sequence", wanted=Wanted(logits=True))
    teacher.load(cpu())
    before = teacher(BATCH)
    assert not before.scores
    teacher.wanted = Wanted((1,), (1, 3), True)
    teacher.load(cpu())
    after = teacher(BATCH)
    assert set(after.scores) == {1, 3}
    assert_close(after.logits, before.logits)
    direct = LatentTeacher(model(), head="sequence", wanted=Wanted(logits=True))
    direct.load(cpu())
    direct.wanted = Wanted(attention=(2,))
    assert set(direct(BATCH).scores) == {2}  # even without another load


def test_it_is_loaded_from_a_folder_when_asked_and_let_go_after(folder):
    teacher = LatentTeacher(str(folder), head="sequence", wanted=Wanted((1,), (1,), True))
    assert not teacher.loaded and teacher.name == str(folder)
    assert teacher.config().num_labels == 3 and not teacher.loaded
    with pytest.raises(RuntimeError, match="load"):
        teacher(BATCH)
    accelerator = cpu()
    teacher.load(accelerator)
    first, kept = teacher(BATCH), teacher.model
    teacher.load(accelerator)
    assert teacher.model is kept and teacher.loaded
    assert_close(first.logits, model(num_labels=3).eval()(**BATCH).logits)
    teacher.release()
    assert not teacher.loaded and teacher.name == str(folder)
    teacher.release()  # twice is no harm
    teacher.load(accelerator)
    again = teacher(BATCH)
    assert torch.equal(again.logits, first.logits) and torch.equal(again.scores[1], first.scores[1])


def test_names():
    own = model()
    assert LatentTeacher(own).name == "BertForSequenceClassification"
    own.config._name_or_path = "some/teacher"
    assert LatentTeacher(own).name == "some/teacher" and LatentTeacher("a/b").name == "a/b"
    assert LatentTeacher(own).config() is own.config


def test_a_folder_without_the_head_or_with_nan_is_refused(tmp_path):
    model(BertModel).save_pretrained(tmp_path / "body")
    with pytest.raises(TeacherError, match=r"(?s)^teacher_model_name_or_path: .*no head"):
        LatentTeacher(str(tmp_path / "body"), head="sequence").load(cpu())
    LatentTeacher(str(tmp_path / "body"), head="none").load(cpu())
    broken = model()
    with torch.no_grad():
        broken.classifier.bias[0] = float("nan")
    with pytest.raises(TeacherError, match=r"classifier\.bias"):
        LatentTeacher(broken).load(cpu())
    with pytest.raises(RecipeError, match=r"^here: "):
        LatentTeacher(str(tmp_path / "nothing"), key="here").config()


def test_one_class_teacher_answers_alone():
    teachers = ClassTeachers([LatentTeacher(model(num_labels=3), head="sequence")])
    teachers.load(cpu())
    assert teachers.weights == (1.0,)
    found = teachers(WITH_MORE)
    assert isinstance(found, DenseLogits) and found.logits_BTV.shape == (2, 3)
    tagger = ClassTeachers([LatentTeacher(model(BertForTokenClassification), head="token")])
    tagger.load(cpu())
    assert tagger(BATCH).logits_BTV.shape == (2, 7, 2)


def test_several_class_teachers_are_a_mixture_with_their_weights():
    made = [model(seed=seed, num_labels=3) for seed in (0, 1)]
    for own, name in zip(made, "ab", strict=True):
        own.config._name_or_path = name
    alone = [copy.deepcopy(own).eval()(**BATCH).logits for own in made]
    teachers = ClassTeachers([LatentTeacher(own, head="sequence") for own in made], [1, 3])
    teachers.load(cpu())
    found = teachers(BATCH)
    assert isinstance(found, MixtureTarget) and found.weights == (0.25, 0.75)
    for part, logits in zip(found.parts, alone, strict=True):
        assert_close(part.logits_BTV, logits)
    assert teachers.name == "a + b"
    assert ClassTeachers(teachers.teachers).weights == (0.5, 0.5)
    teachers.release()
    assert not any(teacher.loaded for teacher in teachers.teachers)


def test_a_stored_answer_counts_like_a_live_one():
    class Stored:
        """As `StoredClasses`: logits for the rows of a batch."""

        name = "store"

        def load(self, accelerator):
            pass

        def __call__(self, inputs):
            return torch.tensor([[float(row), 0.0] for row in inputs["rows"].tolist()])

        release = load

    live = LatentTeacher(model(), head="sequence")
    teachers = ClassTeachers([live, Stored()])
    teachers.load(cpu())
    found = teachers(WITH_MORE)
    assert found.parts[1].logits_BTV.tolist() == [[3.0, 0.0], [8.0, 0.0]]
    assert_close(found.parts[0].logits_BTV, live.classes(BATCH).logits_BTV)


@pytest.mark.parametrize(
    "weights", [[1.0], [0.0, 0.0], [1.0, -0.5], [1.0, float("nan")], [1.0, float("inf")], []]
)
def test_weights_that_cannot_be_are_refused(weights):
    pair = [LatentTeacher("a"), LatentTeacher("b")]
    with pytest.raises(RecipeError, match=r"^teachers: .*one finite weight >= 0 for each of 2"):
        ClassTeachers(pair, weights)
    with pytest.raises(RecipeError, match="for each of 0"):
        ClassTeachers([])
