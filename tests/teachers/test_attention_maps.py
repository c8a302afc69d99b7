"""Recorded attention: the scores of the model's own softmax, and a model that stays what it was."""

import threading

import pytest
import torch
from conftest import tiny_llama
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    GptOssConfig,
    GptOssModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from llmkd.errors import RecipeError
from llmkd.teachers.attention_maps import NAME, open_maps, recording
from llmkd.teachers.inside import Inside, Wanted, look_inside

LAYERS, HEADS = 3, 4
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
DECODER = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
DISTIL = {"dim": 16, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32}
GPT = {"n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODELS = {
    "bert": (BertModel, BertConfig, SIZES),
    "roberta": (RobertaModel, RobertaConfig, {**SIZES, "pad_token_id": 0}),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig,
        {**DISTIL, "vocab_size": 40, "initializer_range": 0.3},
    ),
    "electra": (ElectraModel, ElectraConfig, {**SIZES, "embedding_size": 8}),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig,
        # every second layer sees two tokens to each side
        {**SIZES, **MODERN, "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "llama": (LlamaModel, LlamaConfig, DECODER),
    "qwen2": (
        Qwen2Model,
        Qwen2Config,
        {**DECODER, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "gpt2": (
        GPT2Model,
        GPT2Config,
        {
            **GPT,
            "vocab_size": 40,
            "initializer_range": 0.3,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gemma2": (
        Gemma2Model,
        Gemma2Config,
        {**DECODER, "head_dim": 4, "attn_logit_softcapping": 2.0, "sliding_window": 3},
    ),
    "t5": (  # a bias by distance
        T5EncoderModel,
        T5Config,
        {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": LAYERS}
        | {"num_heads": HEADS, "relative_attention_num_buckets": 8, "dropout_rate": 0.0},
    ),
}
DROPOUT = {"bert": "attention_probs_dropout_prob", "distilbert": "attention_dropout"}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 11], [7, 5, 9, 9, 6, 3, 2]])
PADDED = {
    None: None,
    "right": torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]]),
    "left": torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]]),
}
every_model = pytest.mark.parametrize("kind", MODELS)
every_side = pytest.mark.parametrize("side", PADDED)
close = {"rtol": 1e-4, "atol": 2e-6}


def pair(kind, **changes):
    """The same model twice: eager, and switched to recorded maps."""
    model_type, config_type, options = MODELS[kind]
    torch.manual_seed(0)
    eager = model_type._from_config(
        config_type(**{**options, **changes}), attn_implementation="eager"
    )
    switched = model_type(config_type(**{**options, **changes}))
    switched.load_state_dict(eager.state_dict())
    return eager.eval(), switched.eval()


def features(side):
    return (
        {"input_ids": IDS} if side is None else {"input_ids": IDS, "attention_mask": PADDED[side]}
    )


def real_pairs(side):
    """[B, 1, T, T]: query and key are both tokens."""
    mask = torch.ones_like(IDS) if side is None else PADDED[side]
    return (mask[:, None, :, None] & mask[:, None, None, :]).bool()


def everything(layers=LAYERS):
    return Wanted(tuple(range(layers + 1)), tuple(range(1, layers + 1)))


@every_model
@every_side
@torch.no_grad()
def test_scores_after_mask_and_softmax_are_the_eager_models_attention(kind, side):
    eager, switched = pair(kind)
    open_maps(switched, "attn")
    seen = look_inside(switched, features(side), everything())
    plain = eager(**features(side), output_attentions=True)
    assert set(seen.scores) == set(seen.visible) == {1, 2, 3}
    real = real_pairs(side)
    for layer, theirs in enumerate(plain.attentions, 1):
        visible = seen.visible[layer].expand(theirs.shape)
        assert visible.dtype == torch.bool and seen.scores[layer].shape == theirs.shape
        ours = seen.scores[layer].masked_fill(~visible, -1e9).softmax(-1)
        queries = real.any(-1, keepdim=True)
        assert_close(ours * queries, theirs * queries, **close)
        # what the mask hides is what the model gives nothing to
        assert torch.equal((visible & real), (theirs > 0) & real)
        assert theirs[real.expand(theirs.shape)].std() > 0.02  # attention is not flat


def test_the_models_show_every_kind_of_visibility():
    """Else the test above compares the same mask again and again."""
    hidden = {}
    for kind in ("bert", "llama", "qwen2", "modernbert"):
        _, model = pair(kind)
        open_maps(model, "attn")
        seen = look_inside(model, features("right"), everything()).visible
        hidden[kind] = [(~v.expand(2, 1, 7, 7)[0]).sum().item() for v in seen.values()]
    assert hidden["bert"] == [0, 0, 0]
    assert hidden["llama"] == [21, 21, 21]  # 7 * 6 / 2 above the diagonal
    assert hidden["qwen2"] == [21, 31, 31]  # and 4 + 3 + 2 + 1 more than two tokens back
    assert hidden["modernbert"] == [0, 20, 0]  # 4 + 3 + 2 + 1 on either side


@every_model
@every_side
@torch.no_grad()
def test_hidden_states_stay_those_of_the_plain_model(kind, side):
    eager, switched = pair(kind)
    open_maps(switched, "attn")
    plain = eager(**features(side), output_hidden_states=True).hidden_states
    real = real_pairs(side)[:, 0].any(-1)
    for wanted in (everything(), Wanted((0, 3), (2,)), Wanted((0, 1, 2, 3))):
        seen = look_inside(switched, features(side), wanted)
        assert set(seen.hidden) == set(wanted.hidden) and set(seen.scores) == set(wanted.attention)
        for layer, states in seen.hidden.items():
            assert_close(states[real], plain[layer][real], rtol=1e-3, atol=1e-5)
    assert_close(
        switched(**features(side)).last_hidden_state[real], plain[-1][real], rtol=1e-3, atol=1e-5
    )


@every_model
@every_side
def test_gradients_stay_those_of_the_plain_model(kind, side):
    models = pair(kind, **({DROPOUT[kind]: 0.0} if kind in DROPOUT else {}))
    open_maps(models[1], "attn")
    real, slopes = real_pairs(side)[:, 0].any(-1), []
    pull = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for model in models:
        with recording(frozenset({1, 3})):
            states = model(**features(side)).last_hidden_state
        (states[real] @ pull).sum().backward()
        slopes.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert slopes[0].keys() == slopes[1].keys() and len(slopes[0]) > 10
    largest = max(slope.abs().max().item() for slope in slopes[0].values())
    for name, slope in slopes[0].items():
        assert_close(slopes[1][name], slope, rtol=1e-3, atol=1e-5 * largest)


@every_model
def test_a_loss_on_scores_alone_reaches_the_layer_and_those_below(kind):
    _, model = pair(kind)
    open_maps(model, "attn")
    look_inside(model, features("right"), Wanted(attention=(2,))).scores[
        2
    ].square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    blocks = {part for n in moved for part in n.split(".") if part.isdigit()}
    assert blocks == {"0", "1"}


def test_attention_dropout_acts_in_training_and_spares_the_scores():
    _, model = pair("bert", attention_probs_dropout_prob=0.9, hidden_dropout_prob=0.0)
    open_maps(model, "attn")
    assert not model.training  # the question left the mode alone
    calm = look_inside(model, features(None), everything(1))
    wild = look_inside(model.train(), features(None), everything(1))
    assert_close(wild.scores[1], calm.scores[1])
    assert (wild.hidden[1] - calm.hidden[1]).abs().max() > 0.1
    open_maps(model, "attn")
    assert model.training


def test_nothing_leaks_out_of_the_context():
    _, model = pair("bert")
    open_maps(model, "attn")
    with recording(frozenset({1})) as recorder:
        model(**features(None))
    kept = recorder.scores[1]
    model(**features("right"))
    assert recorder.calls == LAYERS and recorder.scores[1] is kept and set(recorder.scores) == {1}
    with pytest.raises(RuntimeError, match="on the way"), recording(frozenset({1})) as broken:
        raise RuntimeError("on the way")
    model(**features(None))
    assert broken.calls == 0


def test_a_teacher_asked_inside_a_students_pass_is_recorded_apart():
    _, student = pair("bert")
    _, teacher = pair("llama")
    for model in (student, teacher):
        open_maps(model, "attn")
    alone = [
        look_inside(model, features("right"), Wanted(attention=layers)).scores[2]
        for model, layers in ((student, (2,)), (teacher, (1, 2)))
    ]
    with recording(frozenset({2})) as outer:
        asked = []
        student.encoder.layer[0].register_forward_hook(
            lambda *_: asked.append(
                look_inside(teacher, features("right"), Wanted(attention=(1, 2)))
            )
        )
        student(**features("right"))
    assert set(outer.scores) == {2} and outer.calls == LAYERS
    assert torch.equal(outer.scores[2], alone[0])
    assert torch.equal(asked[0].scores[2], alone[1])


def test_threads_record_apart():
    """As under data parallelism in one process."""
    _, model = pair("bert")
    open_maps(model, "attn")
    other = threading.Thread(target=lambda: model(**features(None)))
    with recording(frozenset({1})) as recorder:
        other.start()
        other.join()
    assert recorder.calls == 0


def test_a_task_model_gives_logits_beside_the_rest():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()
    plain = model(**features("right")).logits
    open_maps(model, "attn")
    seen = look_inside(model, features("right"), Wanted((3,), (1,), logits=True))
    assert_close(seen.logits, plain)
    assert look_inside(model, features("right"), Wanted((3,))).logits is None


def test_the_inside_survives_being_flattened():
    _, model = pair("bert")
    open_maps(model, "attn")
    seen = look_inside(model, features("right"), Wanted((0, 3), (1, 2)))
    again = Inside.of_flat(seen.flat())
    assert seen.flat().keys() == {
        *("hidden.0", "hidden.3", "scores.1", "scores.2", "visible.1", "visible.2")
    }
    for part in ("hidden", "scores", "visible"):
        one, two = getattr(seen, part), getattr(again, part)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert again.logits is None
    whole = Inside(logits=torch.ones(2, 3))
    assert torch.equal(Inside.of_flat(whole.flat()).logits, torch.ones(2, 3))


def test_a_switched_model_is_saved_and_loaded_as_a_plain_one(tmp_path):
    _, model = pair("bert")
    open_maps(model, "attn")
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = BertModel.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert_close(again(**features("right")).last_hidden_state, model(**features("right"))[0])


def test_bfloat16_models_are_recorded():
    model = tiny_llama().to(torch.bfloat16).eval()
    open_maps(model, "attn")
    with torch.no_grad():
        seen = look_inside(model, features("left"), everything(2))
    assert seen.scores[1].dtype == torch.bfloat16 and seen.scores[1].isfinite().all()


def deberta():
    return DebertaV2Model(DebertaV2Config(**SIZES, relative_attention=True))


def mpnet():
    return MPNetModel(MPNetConfig(**SIZES))


def gpt_oss():
    sinks = {**DECODER, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssModel(GptOssConfig(**sinks))
    for layer in model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, 3.0)
    return model


@pytest.mark.parametrize(
    "make, words",
    [
        (deberta, "deberta-v2.*0 of 3 layers can be recorded"),  # does not use the interface
        (mpnet, "mpnet.*0 of 3 layers can be recorded"),
        (gpt_oss, "gpt_oss.*more than scores, a mask and a softmax"),  # a learned sink beside keys
    ],
)
def test_a_model_without_such_maps_is_refused_and_left_as_it_was(make, words):
    torch.manual_seed(0)
    model = make().eval()
    before, plain = model.config._attn_implementation, model(input_ids=IDS).last_hidden_state
    with pytest.raises(RecipeError, match=rf"(?s)^attn: .*{words}.*--attn none"):
        open_maps(model, "attn")
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=IDS).last_hidden_state, plain)


def test_nan_weights_are_no_reason_to_accept_a_model():
    _, model = pair("bert")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.fill_(float("nan"))
    with pytest.raises(RecipeError, match="attn"):
        open_maps(model, "attn")
