"""Students made from a teacher: shapes, new weights, copied layers, task heads."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from llmkd.errors import RecipeError
from llmkd.models.student import (
    StudentShape,
    body_of,
    check_heads,
    copy_layers,
    new_student,
    student_config,
    with_task_head,
)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GPT = {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 40}
DECODER = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
TEACHERS = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**{**SIZES, "pad_token_id": 1}),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=40, dim=16, n_layers=4, n_heads=4, hidden_dim=32, max_position_embeddings=64
    ),
    "electra": lambda: ElectraConfig(**SIZES, embedding_size=8),
    "modernbert": lambda: ModernBertConfig(**SIZES, **MODERN, global_attn_every_n_layers=2),
    "deberta": lambda: DebertaV2Config(**SIZES, relative_attention=True, attention_head_size=4),
    "llama": lambda: LlamaConfig(**DECODER),
    "qwen2": lambda: Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "gpt2": lambda: GPT2Config(**GPT, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: GPTNeoXConfig(**{**SIZES, "rotary_pct": 0.5}),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [7, 5, 9, 9, 6, 3]])
every = pytest.mark.parametrize("kind", TEACHERS)


def refused(key, *parts):
    """`pytest.raises` for a RecipeError that begins with `key` and has `parts` and a way out."""
    return pytest.raises(
        RecipeError, match=rf"(?s)^{key}: " + "".join(f"(?=.*{p})" for p in parts) + ".*\n  - "
    )


def same(a, b):
    """Both modules have the same tensors under the same names, bit for bit."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def part(model, *without):
    return {
        name: tensor
        for name, tensor in body_of(model).state_dict().items()
        if not set(without) & set(name.split("."))
    }


@every
def test_a_smaller_student_runs_is_reloaded_and_keeps_the_vocabulary(kind, tmp_path):
    teacher = TEACHERS[kind]()
    before = teacher.to_dict()
    config = student_config(StudentShape(student_layers=2, student_hidden_size=8), teacher)
    assert teacher.to_dict() == before and type(config) is type(teacher)
    assert config.num_hidden_layers == 2 and config.hidden_size == 8
    assert config.num_attention_heads == 4  # the teacher's
    for key in ("vocab_size", "max_position_embeddings", "pad_token_id"):
        assert getattr(config, key) == getattr(teacher, key)
    model = new_student(config, seed=0, head="none").eval()
    out = model(input_ids=IDS, output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, 6, 8) and len(out.hidden_states) == 3
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(again(input_ids=IDS).last_hidden_state, out.last_hidden_state)


def test_the_paper_student_of_bert_base():
    config = student_config(
        StudentShape(student_layers=4, student_hidden_size=312, student_intermediate_size=1200),
        BertConfig(),
    )
    # 312 (30522 + 512 + 2 + 2) embeddings and their norm; 4 layers of 4 (312² + 312) attention,
    # 2 * 312 * 1200 + 1200 + 312 FFN, 2 * 624 norms; pooler 312² + 312
    attention, ffn = 4 * (312 * 312 + 312), 2 * 312 * 1200 + 1200 + 312
    expected = 312 * 31038 + 4 * (attention + ffn + 1248) + 312 * 312 + 312
    with torch.device("meta"):
        assert sum(p.numel() for p in BertModel(config).parameters()) == expected == 14_350_248


def test_ffn_keeps_the_teachers_ratio_in_eights():
    made = [
        student_config(StudentShape(student_hidden_size=w), BertConfig()).intermediate_size
        for w in (312, 384, 768)
    ]
    assert made == [1248, 1536, 3072]
    teacher = BertConfig(**{**SIZES, "intermediate_size": 30})
    shape = StudentShape(student_hidden_size=12, student_heads=4)
    assert student_config(shape, teacher).intermediate_size == 24  # 22.5 is nearer to 24 than 16
    assert student_config(StudentShape(), teacher).intermediate_size == 30  # same width: untouched
    assert student_config(StudentShape(student_hidden_size=8), GPT2Config(**GPT)).n_inner is None
    wide = StudentShape(student_hidden_size=8, student_intermediate_size=40)
    assert student_config(wide, GPT2Config(**GPT)).n_inner == 40
    assert student_config(wide, TEACHERS["distilbert"]()).hidden_dim == 40


@pytest.mark.parametrize(
    "heads, values, new, expected",
    # ratio 2 kept; then 6 heads: 3; 4 heads at ratio 3: 1 1/3 -> 1; 6 at 4 of 8: 3; one stays one
    [(4, 2, 8, 4), (4, 2, 6, 3), (6, 2, 4, 1), (8, 4, 6, 3), (8, 6, 6, 3), (8, 1, 16, 1)],
)
def test_key_value_heads_keep_the_ratio_and_divide_the_heads(heads, values, new, expected):
    teacher = LlamaConfig(
        **{
            **DECODER,
            "hidden_size": 96,
            "num_attention_heads": heads,
            "num_key_value_heads": values,
        }
    )
    config = student_config(StudentShape(student_heads=new), teacher)
    assert config.num_key_value_heads == expected and config.head_dim == 96 // new
    new_student(config, seed=0, head="causal")(input_ids=IDS)


def test_a_head_width_of_its_own_keeps_its_proportion():
    teacher = Qwen3Config(**DECODER, head_dim=8)  # twice 16 / 4
    assert student_config(StudentShape(student_layers=2), teacher).head_dim == 8
    config = student_config(StudentShape(student_hidden_size=12, student_heads=2), teacher)
    assert config.head_dim == 12  # twice 12 / 2
    new_student(config, seed=0, head="causal")(input_ids=IDS)


def test_widths_beside_the_hidden_size_follow_it():
    shape = StudentShape(student_hidden_size=8)
    assert student_config(shape, TEACHERS["electra"]()).embedding_size == 8
    joined = ElectraConfig(**SIZES, embedding_size=16)
    assert student_config(shape, joined).embedding_size == 8
    assert student_config(StudentShape(student_hidden_size=12), joined).embedding_size == 12
    assert student_config(shape, TEACHERS["deberta"]()).pooler_hidden_size == 8


def test_lists_with_an_entry_a_layer_are_cut_or_follow_the_copied_layers():
    full, slides = "full_attention", "sliding_attention"
    modern, qwen = TEACHERS["modernbert"](), TEACHERS["qwen2"]()
    assert modern.layer_types == [full, slides] * 2
    assert qwen.layer_types == [full, full, slides, slides]
    random = StudentShape(student_layers=3)
    assert student_config(random, modern).layer_types == [full, slides, full]
    copied = StudentShape(student_init="copy", student_copy_layers=[1, 3, 4])
    assert student_config(copied, modern).layer_types == [full, full, slides]
    uniform = StudentShape(student_init="copy", student_layers=2)
    assert student_config(uniform, qwen).layer_types == [full, slides]
    # two entries and two layers, yet no list of layers
    teacher = DebertaV2Config(
        **{**SIZES, "num_hidden_layers": 2}, relative_attention=True, pos_att_type="p2c|c2p"
    )
    assert student_config(StudentShape(student_layers=1), teacher).pos_att_type == ["p2c", "c2p"]


def test_a_student_is_neither_quantized_nor_of_the_teachers_dtype_or_name():
    teacher = TEACHERS["bert"]()
    teacher.dtype, teacher.name_or_path = torch.bfloat16, "some/teacher"
    teacher.architectures = ["BertForMaskedLM"]
    teacher.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = student_config(StudentShape(student_layers=2), teacher)
    assert not hasattr(config, "quantization_config")
    assert (config.dtype, config.name_or_path, config.architectures) == (None, "", None)
    assert new_student(config, seed=0, head="none").dtype == torch.float32
    assert config.dtype is None  # new_student leaves its config alone


@pytest.mark.parametrize(
    "settings, key, part_",
    [
        ({"student_layers": 0}, "student_layers", "at least 1"),
        ({"student_heads": True}, "student_heads", "whole number"),
        ({"student_hidden_size": 8.0}, "student_hidden_size", "whole number"),
        ({"student_init": "coppy"}, "student_init", "random, copy"),
        ({"student_copy_layers": [1, 2]}, "student_copy_layers", "--student_init copy"),
        ({"student_init": "copy", "student_copy_layers": "[0]"}, "student_copy_layers", "is 1"),
        ({"student_init": "copy", "student_copy_layers": "[]"}, "student_copy_layers", "list"),
        ({"student_init": "copy", "student_copy_layers": "3"}, "student_copy_layers", "list"),
        ({"student_name_or_path": "x", "student_heads": 2}, "student_heads", "has its own"),
        ({"student_name_or_path": "x", "student_init": "copy"}, "student_init", "has its own"),
        ({"student_revision": "main"}, "student_revision", "not set"),
    ],
)
def test_wrong_recipe_values_are_refused_at_once(settings, key, part_):
    with refused(key, part_):
        StudentShape(**settings)


@pytest.mark.parametrize(
    "settings, key, parts",
    [
        ({"student_layers": 5}, "student_layers", ["1..4"]),
        ({"student_heads": 3}, "student_heads", ["no multiple of 3", "--student_heads 1, 2, 4"]),
        (
            {"student_hidden_size": 10},
            "student_hidden_size",
            ["no multiple of 4", "--student_hidden_size 8 or 12", "--student_heads 1, 2, 5"],
        ),
        ({"student_init": "copy", "student_layers": 3}, "student_copy_layers", ["evenly"]),
        ({"student_init": "copy", "student_heads": 2}, "student_heads", ["its size is 4"]),
        (
            {"student_init": "copy", "student_hidden_size": 8},
            "student_hidden_size",
            ["its size is 16", "--student_init random"],
        ),
        (
            {"student_init": "copy", "student_intermediate_size": 40},
            "student_intermediate_size",
            ["its size is 32"],
        ),
        (
            {"student_init": "copy", "student_layers": 1, "student_copy_layers": "[1, 2]"},
            "student_copy_layers",
            ["names 2 layers"],
        ),
        ({"student_init": "copy", "student_copy_layers": [2, 9]}, "student_copy_layers", ["1..4"]),
    ],
)
def test_sizes_that_do_not_fit_the_teacher_are_refused(settings, key, parts):
    with refused(key, *parts):
        student_config(StudentShape(**settings), TEACHERS["bert"]())


def test_sizes_that_make_no_model_are_refused():
    with refused("student_hidden_size", "even: rotary"):  # heads of width 3 have no pairs to turn
        student_config(StudentShape(student_hidden_size=12), TEACHERS["llama"]())
    with refused("student_hidden_size", "even: rotary"):
        student_config(StudentShape(student_hidden_size=12), TEACHERS["modernbert"]())
    lame = LlamaConfig(**DECODER)
    lame.vocab_size = -1
    with refused("student_layers", "makes no llama"):
        student_config(StudentShape(student_layers=2), lame)
    with refused("student_layers", "encoder and a decoder"):
        student_config(StudentShape(student_layers=2), T5Config())


def test_copy_may_name_the_teachers_own_sizes():
    shape = StudentShape(
        student_init="copy",
        student_layers=2,
        student_hidden_size=16,
        student_heads=4,
        student_intermediate_size=32,
    )
    assert student_config(shape, TEACHERS["bert"]()).num_hidden_layers == 2
    assert shape.copied_layers(4) == (2, 4)
    by_list = StudentShape(student_init="copy", student_copy_layers="[1, 3, 4]")
    assert student_config(by_list, TEACHERS["bert"]()).num_hidden_layers == 3
    last = StudentShape(student_init="copy", student_copy_layers="last", student_layers=2)
    assert last.copied_layers(4) == (3, 4)


def test_a_named_student_brings_its_own_config(tmp_path):
    BertConfig(**{**SIZES, "num_hidden_layers": 3}).save_pretrained(tmp_path)
    shape = StudentShape(student_name_or_path=str(tmp_path))
    assert student_config(shape, TEACHERS["bert"]()).num_hidden_layers == 3
    with pytest.raises(RecipeError, match=r"^student_name_or_path"):
        student_config(StudentShape(student_name_or_path=str(tmp_path / "no")), TEACHERS["bert"]())


@every
def test_the_same_seed_gives_the_same_weights(kind):
    config = TEACHERS[kind]()
    one, two, other = (new_student(config, seed=s, head="none") for s in (3, 3, 4))
    assert same(one, two) and not same(one, other)


def test_heads_and_labels_of_a_new_student():
    config = TEACHERS["bert"]()
    assert type(new_student(config, seed=0, head="none")) is BertModel
    assert new_student(config, seed=0, head="none").pooler is not None
    model = new_student(
        config,
        seed=0,
        head="sequence",
        label_names=["bad", "so so", "good"],
        problem_type="multi_label_classification",
    )
    assert model.config.id2label == {0: "bad", 1: "so so", 2: "good"}
    assert model.config.label2id["good"] == 2 and config.num_labels == 2
    assert model.config.problem_type == "multi_label_classification"
    assert model(input_ids=IDS).logits.shape == (2, 3)
    tagger = new_student(config, seed=0, head="token", num_labels=5)
    assert tagger(input_ids=IDS).logits.shape == (2, 6, 5)
    decoder = new_student(TEACHERS["llama"](), seed=0, head="causal")
    assert decoder(input_ids=IDS).logits.shape == (2, 6, 40)
    with refused("head", "known: none"):
        new_student(config, seed=0, head="mlm")
    with refused("num_labels", "2 labels are named"):
        new_student(config, seed=0, head="sequence", num_labels=3, label_names=["a", "b"])
    with refused("head", "distilbert has no such model", "none, sequence, token"):
        new_student(TEACHERS["distilbert"](), seed=0, head="causal")


LISTS = {"gpt2": "h", "llama": "layers", "qwen2": "layers", "gpt_neox": "layers"}
LISTS |= {"modernbert": "layers", "distilbert": "transformer.layer"}


@every
def test_copied_layers_are_bitwise_the_teachers(kind):
    teacher = new_student(TEACHERS[kind](), seed=1, head="none")
    config = student_config(
        StudentShape(student_init="copy", student_copy_layers=[1, 3]), teacher.config
    )
    student = new_student(config, seed=2, head="none")
    copy_layers(student, teacher, (1, 3))
    name = LISTS.get(kind, "encoder.layer")
    ours, theirs = student.get_submodule(name), teacher.get_submodule(name)
    assert len(ours) == 2 and same(ours[0], theirs[0]) and same(ours[1], theirs[2])
    assert not same(ours[1], theirs[1])  # layers do differ
    rest = {n for n in student.state_dict() if not n.startswith(f"{name}.")}
    assert rest == {n for n in teacher.state_dict() if not n.startswith(f"{name}.")}
    assert all(torch.equal(student.state_dict()[n], teacher.state_dict()[n]) for n in rest)


@every
def test_copying_every_layer_gives_the_teachers_function(kind):
    teacher = new_student(TEACHERS[kind](), seed=1, head="none").eval()
    shape = StudentShape(student_init="copy")
    student = new_student(student_config(shape, teacher.config), seed=2, head="none").eval()
    copy_layers(student, teacher, shape.copied_layers(4))
    theirs = teacher(input_ids=IDS).last_hidden_state
    assert torch.equal(student(input_ids=IDS).last_hidden_state, theirs)
    with torch.no_grad():
        next(iter(teacher.parameters())).zero_()  # a copy, not the teacher's own tensors
    assert not same(student, teacher)


def test_copying_takes_the_teachers_body_and_output_embeddings():
    teacher = new_student(TEACHERS["llama"](), seed=1, head="causal")
    student = new_student(teacher.config, seed=2, head="causal")
    copy_layers(student, teacher, (1, 2, 3, 4))
    assert same(student, teacher) and not teacher.config.tie_word_embeddings
    tuned = new_student(TEACHERS["bert"](), seed=1, head="sequence", num_labels=3)
    body = new_student(TEACHERS["bert"](), seed=2, head="none")
    copy_layers(body, tuned, (1, 2, 3, 4))
    assert same(body, tuned.bert)


def test_modernbert_first_layer_takes_a_later_layer_without_its_norm():
    teacher = new_student(TEACHERS["modernbert"](), seed=1, head="none")
    shape = StudentShape(student_init="copy", student_layers=2)
    student = new_student(student_config(shape, teacher.config), seed=2, head="none")
    copy_layers(student, teacher, shape.copied_layers(4))
    assert same(student.layers[0].attn, teacher.layers[1].attn)
    assert same(student.layers[1], teacher.layers[3])


def test_a_tensor_of_another_shape_stops_the_copy_before_it_begins():
    teacher = new_student(TEACHERS["bert"](), seed=1, head="none")
    config = student_config(StudentShape(student_intermediate_size=40), teacher.config)
    student = new_student(config, seed=2, head="none")
    with refused("student_init", "encoder.layer.0.intermediate.dense.weight", r"\(40, 16\)"):
        copy_layers(student, teacher, (1, 2, 3, 4))
    assert same(student, new_student(config, seed=2, head="none"))
    for layers in ((1, 2), (0, 1, 2, 3), (1, 2, 3, 5)):
        with refused("student_copy_layers", "4 layers"):
            copy_layers(student, teacher, layers)


def test_a_bert_without_pooler_leaves_the_students_new_one():
    teacher = BertModel(TEACHERS["bert"](), add_pooling_layer=False)
    student = new_student(TEACHERS["bert"](), seed=2, head="none")
    fresh = new_student(TEACHERS["bert"](), seed=2, head="none")
    copy_layers(student, teacher, (1, 2, 3, 4))
    assert same(student.pooler, fresh.pooler) and same(student.encoder, teacher.encoder)


@every
@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression", "token"])
def test_a_task_head_keeps_the_body_and_is_new_from_the_seed(kind, task):
    body = new_student(TEACHERS[kind](), seed=1, head="none").eval()
    names = ["score"] if task == "regression" else ["a", "b", "c"]
    one, two, other = (
        with_task_head(body, kind=task, label_names=names, seed=s) for s in (5, 5, 6)
    )
    for name, tensor in body_of(one).state_dict().items():
        assert torch.equal(tensor, body.state_dict()[name]), name
    missing = body.state_dict().keys() - body_of(one).state_dict().keys()
    assert all("pooler" in name for name in missing)
    assert same(one, two) and not same(one, other)  # only the heads can differ
    shape = (2, 6, 3) if task == "token" else (2, len(names))
    assert one(input_ids=IDS).logits.shape == shape
    assert one.config.num_labels == len(names) and one.config.id2label[0] == names[0]
    assert one.config.label2id == {n: i for i, n in enumerate(names)}
    assert not one.training and body.config.problem_type is None
    hf = {
        "single_label": "single_label_classification",
        "multi_label": "multi_label_classification",
    }
    assert one.config.problem_type == {**hf, "regression": "regression"}.get(task)
    next(body_of(one).parameters()).data.zero_()
    assert not torch.equal(*(next(m.parameters()) for m in (body_of(one), body)))


def test_berts_pooler_comes_along_and_the_body_comes_back():
    body = new_student(TEACHERS["bert"](), seed=1, head="none")
    model = with_task_head(body, kind="single_label", label_names=["no", "yes"], seed=0)
    assert same(body_of(model), body) and body_of(body) is body
    again = with_task_head(model, kind="regression", seed=0)  # another task on the same body
    assert same(body_of(again), body) and again.config.num_labels == 1
    assert again.config.problem_type == "regression"
    tagger = with_task_head(body, kind="token", label_names=["O"], seed=0)
    assert "pooler.dense.weight" not in body_of(tagger).state_dict()
    poolerless = with_task_head(tagger, kind="single_label", label_names=["no", "yes"], seed=0)
    assert part(poolerless, "pooler").keys() == part(tagger).keys()
    assert all(torch.equal(part(poolerless)[n], part(tagger)[n]) for n in part(tagger))


def test_a_task_model_follows_the_body_in_dtype_and_mode_and_reloads(tmp_path):
    body = new_student(TEACHERS["roberta"](), seed=1, head="none").to(torch.bfloat16).train()
    model = with_task_head(body, kind="multi_label", label_names=["x", "y"], seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.training
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(again, model) and again.config.id2label == {0: "x", 1: "y"}
    assert again.config.problem_type == "multi_label_classification"


def test_a_decoder_classifies_the_last_token_before_its_padding():
    config = GPT2Config(**GPT, bos_token_id=1, eos_token_id=[2, 3])
    body = new_student(config, seed=1, head="none").eval()
    model = with_task_head(body, kind="single_label", label_names=["no", "yes"], seed=0)
    assert model.config.pad_token_id == 2 and body.config.pad_token_id is None
    padded = torch.cat([IDS, torch.full((2, 2), 2)], dim=1)
    mask = (padded != 2).long()
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask).logits, model(input_ids=IDS).logits
    )
    endless = new_student(
        LlamaConfig(**{**DECODER, "eos_token_id": None, "pad_token_id": None}), seed=1, head="none"
    )
    with refused("pad_token_id", "neither a padding token nor an end"):
        with_task_head(endless, kind="regression", seed=0)


@pytest.mark.parametrize(
    "task, names, key",
    [
        ("ranking", ["a", "b"], "kind"),
        ("single_label", ["a"], "label_names"),
        ("single_label", [], "label_names"),
        ("token", [], "label_names"),
        ("multi_label", ["a", "a"], "label_names"),
    ],
)
def test_wrong_tasks_are_refused(task, names, key):
    body = new_student(TEACHERS["bert"](), seed=1, head="none")
    with refused(key):
        with_task_head(body, kind=task, label_names=names, seed=0)


def test_heads_must_agree_where_attention_maps_are_matched():
    teacher = TEACHERS["bert"]()
    check_heads(student_config(StudentShape(student_hidden_size=8), teacher), teacher)
    check_heads(TEACHERS["distilbert"](), teacher)  # another type's name for the same number
    student = student_config(StudentShape(student_heads=2), teacher)
    with refused("student_heads", "head by head", "--student_heads 4", "--attn none"):
        check_heads(student, teacher)


def test_sizes_may_come_from_a_distilbert_with_fixed_positions():
    teacher = TEACHERS["distilbert"]()
    teacher.sinusoidal_pos_embds = True
    config = student_config(StudentShape(student_layers=2, student_hidden_size=8), teacher)
    weight = new_student(config, seed=0, head="none").embeddings.position_embeddings.weight
    assert weight[0].tolist() == [0, 1] * 4  # sin 0, cos 0


@every
def test_under_zero3_weights_are_whole_until_an_engine_shares_them_out(kind):
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    plain = new_student(TEACHERS[kind](), seed=1, head="none")
    switch = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    body = new_student(student_config(StudentShape(), TEACHERS[kind]()), seed=1, head="none")
    assert same(body, plain)
    model = with_task_head(body, kind="regression", seed=0)
    assert part(model).keys() <= part(plain).keys()
    assert all(torch.equal(part(model)[n], part(plain)[n]) for n in part(model))
    assert is_deepspeed_zero3_enabled() and switch.is_zero3()
