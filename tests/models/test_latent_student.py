"""The student of a latent stage: projections, what is frozen, its state, and losses of whole models
that must vanish or stay.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from llmkd.errors import RecipeError
from llmkd.models.latent_student import LatentStudent, new_projections, split_state
from llmkd.objectives.latent import ATTENTION_FORMS
from llmkd.objectives.prediction import hard_loss, soft_loss
from llmkd.teachers.inside import Inside, Wanted, look_inside
from llmkd.trainers.latent_losses import LatentPlan, latent_terms
from llmkd.types import DenseLogits

LAYERS = 3
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 11], [7, 5, 9, 9, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
ALL = Wanted((0, 1, 2, 3), (1, 2, 3))
PLAN = LatentPlan(((0, 0), (1, 1), (2, 2), (3, 3)), ((1, 1), (2, 2), (3, 3)))
every_form = pytest.mark.parametrize("form", sorted(ATTENTION_FORMS))
MODELS = {
    "bert": lambda seed: made(BertModel, BertConfig(**SIZES), seed),
    "roberta": lambda seed: made(RobertaModel, RobertaConfig(**SIZES), seed),
    "llama": lambda seed: made(LlamaModel, LlamaConfig(**SIZES, num_key_value_heads=2), seed),
}


def made(kind, config, seed=0):
    torch.manual_seed(seed)
    return kind(config).eval()


def bert(seed=0, **options):
    return made(BertModel, BertConfig(**{**SIZES, **options}), seed)


def student(body, how="none", width=16, seed=0):
    own = body.config.hidden_size
    return LatentStudent(
        body,
        new_projections(how, layers=range(4), student_width=own, teacher_width=width, seed=seed),
    )


def identity(model):
    """W = 1 in every projection."""
    with torch.no_grad():
        for linear in model.projections.values():
            nn.init.eye_(linear.weight)
    return model


def terms(model, teacher, batch, form="mse_scores", wanted=ALL):
    """attn and hidden of one batch."""
    model.want(wanted)
    ours = Inside.of_flat(model(**batch))
    with torch.no_grad():
        theirs = look_inside(teacher, batch, wanted)
    mask = batch["attention_mask"].bool()
    return latent_terms(PLAN, ours, theirs, mask, form)


def opened(model):
    """A teacher whose maps can be recorded."""
    LatentStudent(model).want(ALL)
    return model


@every_form
@pytest.mark.parametrize("how", ["shared", "per_layer", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_teacher_as_student_has_no_latent_loss_and_no_gradient(kind, how, form):
    teacher = MODELS[kind](0)
    model = identity(student(copy.deepcopy(teacher), how))
    found = terms(model, opened(teacher), BATCH, form)
    sum(term.total for term in found.values()).backward()
    assert found["attn"].count.item() == found["hidden"].count.item() == 11
    for term in found.values():
        assert term.total.item() == 0
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(slopes) > 20 and max(slope.abs().max().item() for slope in slopes) < 1e-4
    other = student(MODELS[kind](1), how)
    apart = terms(other, teacher, BATCH, form)
    sum(term.total for term in apart.values()).backward()
    assert all(term.total > 0.1 for term in apart.values())
    largest = max(p.grad.abs().max().item() for p in other.parameters() if p.grad is not None)
    assert largest > 0.1


@every_form
@pytest.mark.parametrize(
    "kind, left, right",
    [("bert", 0, 3), ("roberta", 0, 2), ("roberta", 3, 0), ("llama", 0, 2), ("llama", 2, 1)],
)
def test_more_padding_changes_no_loss_of_whole_models(kind, left, right, form):
    """Left padding moves BERT's absolute positions, so it is asked on the right alone."""
    teacher, model = opened(MODELS[kind](0)), student(MODELS[kind](1), "shared")
    pad = (left, right)
    wide = {name: nn.functional.pad(values, pad) for name, values in BATCH.items()}
    one, two = (terms(model, teacher, batch, form) for batch in (BATCH, wide))
    for name in ("attn", "hidden"):
        assert_close(two[name].total, one[name].total, rtol=1e-4, atol=0)
        assert two[name].count == one[name].count


@pytest.mark.parametrize("kind", ["single_label", "token"])
def test_more_padding_changes_no_prediction_loss_of_whole_models(kind):
    config = BertConfig(**SIZES, num_labels=3)
    heads = {"single_label": BertForSequenceClassification, "token": BertForTokenClassification}
    ours, theirs = (made(heads[kind], config, seed) for seed in (0, 1))
    labels = torch.tensor([2, 0])
    if kind == "token":
        labels = torch.tensor([[0, 1, 2, -100, 1, 0, 2], [1, 1, 2, 0, -100, -100, -100]])
    found = []
    for extra in (0, 4):
        batch = {name: nn.functional.pad(values, (0, extra)) for name, values in BATCH.items()}
        gold = nn.functional.pad(labels, (0, extra), value=-100) if kind == "token" else labels
        model = LatentStudent(ours)
        model.want(Wanted(logits=True))
        logits = model(**batch)["logits"]
        with torch.no_grad():
            answer = look_inside(theirs, batch, Wanted(logits=True)).logits
        soft = soft_loss(kind, logits, DenseLogits(answer, 3), gold)
        hard = hard_loss(kind, logits, gold)
        found.append((soft.total, hard.total, soft.count.float(), hard.count.float()))
    assert found[0][0] > 0.01
    assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_heads_in_another_order_in_both_models_change_nothing_in_one_they_do():
    """Rows of Q, K, V and columns of O move together, so the model's outputs stay."""

    def turned(model):
        model = copy.deepcopy(model)
        order = torch.arange(16).view(4, 4)[torch.tensor([2, 0, 3, 1])].reshape(-1)
        with torch.no_grad():
            for layer in model.encoder.layer:
                own = layer.attention.self
                for linear in (own.query, own.key, own.value):
                    linear.weight.copy_(linear.weight[order])
                    linear.bias.copy_(linear.bias[order])
                out = layer.attention.output.dense
                out.weight.copy_(out.weight[:, order])
        return model

    one, two = bert(1), bert(0)
    plain = terms(student(copy.deepcopy(one)), opened(two), BATCH)
    both = terms(student(turned(one)), opened(turned(two)), BATCH)
    single = terms(student(turned(one)), opened(two), BATCH)
    for found in (both, single):
        assert_close(found["hidden"].total, plain["hidden"].total, rtol=1e-4, atol=0)
    assert_close(both["attn"].total, plain["attn"].total, rtol=1e-4, atol=0)
    assert (single["attn"].total - plain["attn"].total).abs() > 0.01 * plain["attn"].total


def test_one_projection_serves_all_layers_or_each_has_its_own_or_none():
    body = bert(hidden_size=8)
    plain = look_inside(body, BATCH, Wanted((0, 1, 2, 3))).hidden
    shared, each = student(body, "shared"), student(body, "per_layer")
    assert list(shared.projections) == ["shared"] and list(each.projections) == ["0", "1", "2", "3"]
    for model in (shared, each):
        model.want(Wanted((0, 2, 3)))
        seen = Inside.of_flat(model(**BATCH)).hidden
        assert set(seen) == {0, 2, 3}
        for layer, states in seen.items():
            name = "shared" if model is shared else str(layer)
            weight = model.projections[name].weight
            assert weight.shape == (16, 8) and model.projections[name].bias is None
            assert states.shape == (2, 7, 16)
            assert_close(states, plain[layer] @ weight.T)
    assert len({p.data_ptr() for p in each.projections.parameters()}) == 4
    none = LatentStudent(body)
    none.want(Wanted((1,)))
    assert_close(none(**BATCH)["hidden.1"], plain[1])


def test_projections_come_from_the_seed_alone_and_keep_a_states_size():
    sizes = {"layers": [1, 2], "student_width": 200, "teacher_width": 300}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (new_projections("per_layer", **sizes, seed=s) for s in (3, 3, 4))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        again = new_projections("per_layer", **sizes, seed=3)
    for name in ("1", "2"):
        assert torch.equal(one[name].weight, two[name].weight)
        assert torch.equal(one[name].weight, again[name].weight)
        assert not torch.equal(one[name].weight, other[name].weight)
    assert not torch.equal(one["1"].weight, one["2"].weight)
    assert one["1"].weight.std().item() == pytest.approx(200**-0.5, rel=0.02)
    torch.set_rng_state(before)
    states = torch.randn(50, 200)
    assert one["1"](states).std().item() == pytest.approx(states.std().item(), rel=0.05)


def test_wrong_projections_are_refused():
    sizes = {"layers": [1], "student_width": 8, "teacher_width": 16, "seed": 0}
    with pytest.raises(RecipeError, match=r"(?s)^projection: .*8 wide, the teacher 16.*shared"):
        new_projections("none", **sizes)
    with pytest.raises(RecipeError, match=r"(?s)^projection: .*'each'.*per_layer"):
        new_projections("each", **sizes)
    assert len(new_projections("none", **{**sizes, "student_width": 16})) == 0


def trained(model):
    """Names of what learns."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_what_takes_no_part_is_frozen_and_thawed_when_it_does():
    model = student(bert(hidden_size=8), "per_layer")
    everything = {name for name, _ in model.named_parameters()}
    pooler = {"body.pooler.dense.weight", "body.pooler.dense.bias"}
    projections = {f"projections.{n}.weight" for n in range(4)}
    assert pooler < everything and projections < everything
    model.want(ALL)
    assert trained(model) == everything - pooler
    model.want(Wanted((1, 3), (1,)))
    assert trained(model) == everything - pooler - {f"projections.{n}.weight" for n in (0, 2)}
    model.want(Wanted(attention=(1,)))
    assert trained(model) == everything - pooler - projections
    model.want(Wanted((1, 2, 3, 0), logits=True))
    assert trained(model) == everything


@pytest.mark.parametrize("wanted", [ALL, Wanted((3,), logits=True), Wanted((1, 2, 3), (3,))])
def test_all_that_learns_gets_a_gradient(wanted):
    """Else data-parallel ranks would wait for it. Layers above the last one wanted are none."""
    model = student(made(BertForSequenceClassification, BertConfig(**SIZES)), "shared")
    model.want(wanted)
    sum(values.float().sum() for values in model(**BATCH).values()).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


def test_a_head_that_is_not_asked_rests():
    model = LatentStudent(made(BertForSequenceClassification, BertConfig(**SIZES)))
    model.want(ALL)
    assert {n.split(".")[1] for n in trained(model)} == {"bert"}
    assert not any("pooler" in name for name in trained(model))
    model.want(Wanted(logits=True))
    assert {n.split(".")[1] for n in trained(model)} == {"bert", "classifier"}
    assert any("pooler" in name for name in trained(model))


def test_what_was_frozen_before_stays_frozen():
    base = bert()
    base.encoder.requires_grad_(False)  # as LoRA leaves it
    model = LatentStudent(base)
    model.want(Wanted((1,), logits=True))
    assert {n.split(".")[1] for n in trained(model)} == {"embeddings", "pooler"}


@pytest.mark.parametrize("how", ["shared", "per_layer", "none"])
def test_its_state_is_split_saved_and_loaded(how, tmp_path):
    model = student(bert(hidden_size=8 if how != "none" else 16), how)
    model.want(ALL)
    body, projections = split_state(model.state_dict())
    assert body.keys() == model.body.state_dict().keys()
    assert set(projections) == {f"projections.{name}.weight" for name in model.projections}
    model.body.save_pretrained(tmp_path, state_dict=body)
    again = student(BertModel.from_pretrained(tmp_path).eval(), how, seed=1)
    if projections:
        save_file(projections, tmp_path / "projections.safetensors")
        found = load_file(tmp_path / "projections.safetensors")
        missing = again.load_state_dict(found, strict=False)
        assert not missing.unexpected_keys and all(
            name.startswith("body.") for name in missing.missing_keys
        )
    again.want(ALL)
    one, two = model(**BATCH), again(**BATCH)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("projection" in name or name.startswith("body.") for name in saved)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")  # the older name
def test_it_is_where_its_weights_are_and_passes_checkpointing_on():
    model = LatentStudent(bert().train())
    assert model.device == torch.device("cpu") and model.config is model.body.config
    assert model._no_split_modules == model.body._no_split_modules
    model.gradient_checkpointing_enable()
    assert model.body.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.body.is_gradient_checkpointing


def test_a_model_without_maps_is_refused_by_name():
    from transformers import DebertaV2Config, DebertaV2Model

    model = LatentStudent(made(DebertaV2Model, DebertaV2Config(**SIZES)))
    model.want(Wanted((1, 2)))
    assert model(**BATCH)["hidden.2"].shape == (2, 7, 16)
    with pytest.raises(RecipeError, match=r"(?s)^attn: .*deberta-v2.*--attn none"):
        model.want(Wanted((1, 2), (1,)))
