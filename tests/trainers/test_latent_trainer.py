"""LatentDistillTrainer: what a step minimises, what it reads, whom it asks, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_llama, token_rows
from datasets import Dataset
from latent_kit import CLASSES, TASKS, bert_rows, latent_args, student_of, tiny_bert
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from llmkd.errors import DataError, NonFiniteError, RecipeError, TeacherError
from llmkd.evaluation.task_metrics import task_scores
from llmkd.labels import class_plan
from llmkd.labels.classes import write_class_store
from llmkd.models.latent_student import LatentStudent, new_projections
from llmkd.objectives.prediction import soft_loss
from llmkd.teachers.latent import ClassTeachers, LatentTeacher
from llmkd.teachers.stored_classes import StoredClasses
from llmkd.trainers import LatentDistillTrainer
from llmkd.trainers.checkpoints import last_whole_checkpoint
from llmkd.types import DenseLogits

ALL = ("latent", "soft", "hard")


def make(folder, losses=("latent",), kind=None, **parts):
    """A trainer; `parts` are its own arguments (student, teacher, rows, ...) and settings."""
    own = {
        "model": parts.pop("student", None) or student_of(kind=kind),
        "teacher": parts.pop("teacher", ...),
        "train_dataset": parts.pop("rows", None) or bert_rows(kind=kind),
        "eval_dataset": bert_rows(7, kind=kind, seed=5),
        "soft_teachers": parts.pop("soft_teachers", None),
        "callbacks": parts.pop("callbacks", None),
        "task_metrics": parts.pop("task_metrics", None),
        "processing_class": parts.pop("processing_class", None),
        "peft_config": parts.pop("peft_config", None),
    }
    if own["teacher"] is ...:
        head = {None: "none", "token": "token"}.get(kind, "sequence")
        own["teacher"] = LatentTeacher(tiny_bert(7, kind=kind), head=head)
    return LatentDistillTrainer(args=latent_args(folder, **parts), losses=losses, kind=kind, **own)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# by hand: every row alone, so that nothing is padded, in float64


def queries_and_keys(model, row):
    """Hidden states [T, D], raw attention scores [A, T, T] and logits of one row."""
    model = model.double().eval()
    layers = model.base_model.encoder.layer
    kept, hooks = {}, []
    for number, layer in enumerate(layers, 1):
        for name in ("query", "key"):
            linear = getattr(layer.attention.self, name)
            hooks.append(
                linear.register_forward_hook(
                    lambda _, __, out, at=(number, name): kept.__setitem__(at, out[0])
                )
            )
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    scores, heads = {}, model.config.num_attention_heads
    for number in range(1, len(layers) + 1):
        q, k = (
            kept[number, name].reshape(len(row["input_ids"]), heads, -1).transpose(0, 1)
            for name in ("query", "key")
        )
        scores[number] = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return [h[0] for h in out.hidden_states], scores, getattr(out, "logits", None)


def by_hand(student, teacher, rows, kind=None):
    """Means of the parts of the loss over `rows`."""
    w = student.projections["shared"].weight.detach().double()
    sums, tokens, places = dict.fromkeys(("attn", "hidden", "soft", "hard"), 0.0), 0, 0
    for row in rows:
        own, own_scores, logits = queries_and_keys(student.body, row)
        theirs, their_scores, target = queries_and_keys(teacher, row)
        tokens += len(row["input_ids"])
        for s, t in ((0, 0), (1, 2), (2, 4)):
            sums["hidden"] += (own[s] @ w.T - theirs[t]).square().mean(-1).sum().item()
            if s:
                gap = own_scores[s] - their_scores[t]
                sums["attn"] += gap.square().mean((0, 2)).sum().item()
        if kind is not None:
            soft, hard, count = prediction_by_hand(kind, logits[0], target[0], row["labels"])
            sums["soft"], sums["hard"] = sums["soft"] + soft, sums["hard"] + hard
            places += count
    found = {name: sums[name] / tokens for name in ("attn", "hidden")}
    return found if kind is None else found | {n: sums[n] / places for n in ("soft", "hard")}


def prediction_by_hand(kind, own, theirs, label):
    """Soft (KL) and hard loss of one example, and how many places it counts for."""
    if kind == "regression":
        return (own - theirs).square().item(), (own - label).square().item(), 1
    if kind == "multi_label":
        p, q, y = theirs.sigmoid(), own.sigmoid(), torch.tensor(label)
        soft = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        hard = -(y * q.log() + (1 - y) * (1 - q).log())
        return soft.mean().item(), hard.mean().item(), 1
    log_p, log_q = theirs.log_softmax(-1), own.log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "single_label":
        return soft.item(), -log_q[label].item(), 1
    counted = [place for place, gold in enumerate(label) if gold != -100]
    hard = -sum(log_q[place, label[place]] for place in counted)
    return soft[counted].sum().item(), hard.item(), len(counted)


@pytest.mark.parametrize("kind", [None, *TASKS])
def test_logged_parts_are_means_by_hand(tmp_path, kind):
    losses = ALL if kind else ("latent",)
    trainer = make(tmp_path, losses, kind, learning_rate=0.0, max_steps=3, logging_steps=3)
    expected = by_hand(student_of(kind=kind), tiny_bert(7, kind=kind), bert_rows(kind=kind), kind)
    trainer.train()
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert {n: line[n] for n in expected} == pytest.approx(expected, rel=1e-5)
    assert all(value > 1e-3 for value in expected.values())
    tokens = sum(map(len, bert_rows()["input_ids"]))
    assert trainer.state.num_input_tokens_seen == tokens


def test_the_loss_is_the_weighted_sum_of_the_parts(tmp_path):
    given = {"attn_weight": 0.5, "hidden_weight": 2.0, "soft_weight": 3.0, "hard_weight": 0.25}
    trainer = make(tmp_path, ALL, "single_label", **given)
    trainer.train()
    for line in (line for line in trainer.state.log_history if "loss" in line):
        mixed = sum(line[name.split("_")[0]] * weight for name, weight in given.items())
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)


@pytest.mark.parametrize("kind", [None, *TASKS])
@pytest.mark.parametrize("batch, accumulate", [(2, 2), (1, 4)])
def test_accumulation_does_not_move_the_update(tmp_path, kind, batch, accumulate):
    losses, size = (ALL if kind else ("latent",)), {"max_steps": 1, "learning_rate": 1.0}
    whole = make(tmp_path / "a", losses, kind, **size)
    split = make(
        tmp_path / "b",
        losses,
        kind,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **size,
    )
    before = weights(whole)
    whole.train(), split.train()
    moved = 0.0
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=0, atol=2e-6, msg=name)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 0.1
    assert whole.state.num_input_tokens_seen == split.state.num_input_tokens_seen


def test_one_step_is_the_gradient_of_the_means(tmp_path):
    # float64 and no padding: each row alone, its sums over the tokens of all four
    rows = bert_rows(4, kind="single_label")
    trainer = make(tmp_path, ALL, "single_label", rows=rows, max_steps=1, learning_rate=1.0)
    student, teacher = student_of(kind="single_label").double(), tiny_bert(7, kind="single_label")
    tokens, loss = sum(map(len, rows["input_ids"])), 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            target = teacher.double().eval()(input_ids=ids, output_hidden_states=True)
        own = student.body(input_ids=ids, output_hidden_states=True)
        for s, t in ((0, 0), (1, 2), (2, 4)):
            gap = student.projections["shared"](own.hidden_states[s]) - target.hidden_states[t]
            loss = loss + gap.square().mean(-1).sum() / tokens
        log_p, log_q = target.logits.log_softmax(-1), own.logits.log_softmax(-1)
        loss = loss + (log_p.exp() * (log_p - log_q)).sum() / 4 - log_q[0, row["labels"]] / 4
    loss.backward()
    trainer.args.attn_weight = 0.0  # its own test is above
    trainer.train()
    for name, before in student.named_parameters():
        expected = before.detach() - before.grad
        after = dict(trainer.model.named_parameters())[name].double()
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_latent_stages_read_no_labels(tmp_path):
    plain = bert_rows()
    missing = plain.add_column("labels", [None] * len(plain))
    broken = plain.add_column("labels", [float("nan")] * len(plain))
    results = []
    for name, rows in (("a", plain), ("b", missing), ("c", broken)):
        trainer = make(tmp_path / name, rows=rows, kind="regression")
        trainer.train()
        results.append((weights(trainer), trainer.evaluate(rows)["eval_loss"]))
    for found, loss in results[1:]:
        assert_equal(found, results[0][0])
        assert loss == results[0][1]


def test_what_takes_no_part_stays_as_it_is(tmp_path):
    trainer = make(tmp_path, weight_decay=0.5, optim="adamw_torch")
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not value.equal(before[name])}
    still = before.keys() - changed
    assert still == {"body.pooler.dense.weight", "body.pooler.dense.bias"}


def test_a_stage_with_a_head_trains_the_pooler_again(tmp_path):
    student = student_of(kind="single_label")
    make(tmp_path / "a", student=student, rows=bert_rows()).train()
    trainer = make(tmp_path / "b", ("hard",), "single_label", student=student, teacher=None)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not value.equal(before[name])}
    assert "body.bert.pooler.dense.weight" in changed
    assert not any(name.startswith("projections") for name in changed)


def test_teacher_is_frozen_in_eval_mode_and_unchanged(tmp_path):
    teacher = tiny_bert(7, kind="single_label").train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    held = LatentTeacher(teacher, head="sequence")
    trainer = make(tmp_path, ALL, "single_label", teacher=held)
    trainer.train()
    assert held.forwards == 2
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert_equal(dict(teacher.state_dict()), before)


def test_the_same_model_has_no_latent_loss(tmp_path):
    body = tiny_bert(7)
    student = LatentStudent(tiny_bert(7))  # no projection: equal widths
    trainer = make(tmp_path, student=student, teacher=LatentTeacher(body), max_steps=1)
    scores = trainer.evaluate()
    assert scores["eval_attn"] < 1e-10 and scores["eval_hidden"] < 1e-10
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 1e-10


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path, stop):
    settings = {
        "max_steps": 4,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 1,
    }

    def dropping():
        made = student_of(kind="single_label")
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return made

    whole = make(tmp_path / "a", ALL, "single_label", student=dropping(), **settings)
    whole.train()
    again = make(tmp_path / "b", ALL, "single_label", student=dropping(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert_equal(weights(again), weights(whole))
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_held_out_metrics_are_means_by_hand(tmp_path, kind, batch):
    held_out = bert_rows(7, kind=kind, seed=5)
    expected = by_hand(student_of(kind=kind), tiny_bert(7, kind=kind), held_out, kind)
    trainer = make(
        tmp_path,
        ALL,
        kind,
        per_device_eval_batch_size=batch,
        hard_weight=0.5,
        task_metrics=lambda outputs, labels: task_scores(kind, outputs, labels),
    )
    scores = trainer.evaluate()
    assert {n: scores[f"eval_{n}"] for n in expected} == pytest.approx(expected, rel=1e-5)
    mixed = sum(expected.values()) - 0.5 * expected["hard"]
    assert scores["eval_loss"] == pytest.approx(mixed, rel=1e-5)
    outputs, labels = [], []
    for row in held_out:
        logits = queries_and_keys(student_of(kind=kind).body, row)[2][0].numpy()
        gold = np.asarray(row["labels"])
        outputs.append(logits[gold != -100] if kind == "token" else logits)
        labels.append(gold[gold != -100] if kind == "token" else gold)
    join = np.concatenate if kind == "token" else np.stack
    for name, value in task_scores(kind, join(outputs), join(labels)).items():
        if name != "loss":
            assert scores[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("form", ["kl", "mse", "nkd"])
def test_every_soft_loss_of_every_task(tmp_path, kind, form):
    settings = {"soft": form, "soft_temperature": 2.0, "t2_scale": True, "nkd_gamma": 1.0}
    if form == "nkd" and kind in ("multi_label", "regression"):
        with pytest.raises(RecipeError, match=f"nkd.*needs one gold class; the task is {kind}"):
            make(tmp_path, ("soft",), kind, **settings)
        return
    trainer = make(tmp_path, ("soft",), kind, max_steps=6, **settings)
    total, places = 0.0, 0
    for row in bert_rows(7, kind=kind, seed=5):
        own, theirs = (
            queries_and_keys(model, row)[2]
            for model in (student_of(kind=kind).body, tiny_bert(7, kind=kind))
        )
        labels = torch.tensor([row["labels"]])
        term = soft_loss(
            kind,
            own,
            DenseLogits(theirs, theirs.shape[-1]),
            labels,
            form=form,
            temperature=2.0,
            t2_scale=True,
            gamma=1.0,
        )
        total, places = total + term.total.item(), places + int(term.count)
    assert trainer.evaluate()["eval_soft"] == pytest.approx(total / places, rel=1e-5)
    before = trainer.evaluate(bert_rows(kind=kind))["eval_soft"]
    trainer.train()
    assert trainer.evaluate(bert_rows(kind=kind))["eval_soft"] < before


def test_one_class_teacher_is_the_stages_own(tmp_path):
    own = make(tmp_path / "a", ALL, "single_label")
    named = make(
        tmp_path / "b",
        ALL,
        "single_label",
        teacher=LatentTeacher(tiny_bert(7, kind="single_label").bert),
        soft_teachers=ClassTeachers([LatentTeacher(tiny_bert(7, kind="single_label"))]),
    )
    own.train(), named.train()
    for name, value in weights(own).items():  # recorded layers round otherwise than SDPA's
        torch.testing.assert_close(weights(named)[name], value, rtol=0, atol=1e-6, msg=name)


def test_several_teachers_are_averaged_in_probability(tmp_path):
    kind, models = (
        "single_label",
        [tiny_bert(7, kind="single_label"), tiny_bert(8, kind="single_label")],
    )
    teachers = ClassTeachers([LatentTeacher(model) for model in models], [1.0, 3.0])
    trainer = make(tmp_path, ("soft",), kind, teacher=None, soft_teachers=teachers)
    total, rows = 0.0, bert_rows(7, kind=kind, seed=5)
    scores = trainer.evaluate()
    for row in rows:
        log_q = queries_and_keys(student_of(kind=kind).body, row)[2][0].log_softmax(-1)
        one, other = (
            queries_and_keys(tiny_bert(seed, kind=kind), row)[2][0].softmax(-1) for seed in (7, 8)
        )
        p = 0.25 * one + 0.75 * other
        total += (p * (p.log() - log_q)).sum().item()
    assert scores["eval_soft"] == pytest.approx(total / len(rows), rel=1e-5)
    trainer.train()
    assert all(not p.requires_grad for model in models for p in model.parameters())


@pytest.mark.parametrize("kind", ["single_label", "regression", "multi_label", "token"])
def test_stored_classes_are_the_live_teacher(tmp_path, kind):
    rows, teacher = bert_rows(kind=kind), tiny_bert(7, kind=kind).eval()
    outputs = TASKS[kind][1]

    def answer(batch):
        return torch.nn.utils.rnn.pad_sequence(
            [teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in batch],
            batch_first=True,
        )

    plan = class_plan(
        label_names=[f"c{i}" for i in range(outputs)],
        teacher={"id": "t", "fingerprint": "f"},
        tokenizer_digest="t",
        rows_fingerprint="r",
        max_length=16,
        total_rows=len(rows),
        per="token" if kind == "token" else "row",
    )
    write_class_store(
        tmp_path / "s", rows=rows, answer=answer, plan=plan, batch_size=4, main=True, quiet=True
    )
    stored = ClassTeachers([StoredClasses(tmp_path / "s")])
    one = make(tmp_path / "a", ALL, kind, soft_teachers=stored)
    live = make(tmp_path / "b", ALL, kind)
    one.train(), live.train()
    for name, value in weights(live).items():
        torch.testing.assert_close(weights(one)[name], value, rtol=0, atol=1e-6, msg=name)
    # the store holds the training rows; on others the soft loss is not known, all else is
    scores, expected = one.evaluate(), live.evaluate()
    assert "eval_soft" not in scores
    assert scores["eval_hard"] == pytest.approx(expected["eval_hard"], rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["teacher", "soft"])
def test_teacher_weights_that_are_not_numbers_stop_before_the_first_step(tmp_path, bad, which):
    teacher = tiny_bert(7, kind="single_label")
    with torch.no_grad():
        teacher.bert.encoder.layer[3].output.dense.weight[0, 0] = bad
    held = LatentTeacher(teacher, head="sequence")
    parts = {"teacher": held} if which == "teacher" else {"soft_teachers": ClassTeachers([held])}
    trainer = make(tmp_path, ALL, "single_label", **parts)
    before = weights(trainer)
    with pytest.raises(TeacherError, match=r"layer\.3\.output\.dense\.weight holds NaN"):
        trainer.train()
    assert_equal(weights(trainer), before)


def test_non_finite_loss_stops_with_step_rows_and_rate(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    model.projections["shared"].weight[0, 0] = float("nan")

    trainer = make(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, callbacks=[Poison()])
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3 .*rows \[8, 9, 10, 11\]"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("attn", ["mse_scores", "mse_probs", "kl_probs"])
def test_two_decoders_learn_their_attention(tmp_path, attn):
    def body(seed, **shape):
        return tiny_llama(seed, **shape).model

    rows = token_rows()
    made = new_projections("per_layer", layers=range(3), student_width=8, teacher_width=16, seed=0)
    trainer = make(
        tmp_path,
        student=LatentStudent(body(1), made),
        teacher=LatentTeacher(body(7, width=16)),
        rows=rows,
        attn=attn,
        attn_weight=10.0,
        max_steps=24,
        optim="adamw_torch",
        learning_rate=0.02,
    )
    one, two = (trainer.evaluate(rows.select(some)) for some in ([2], [2, 5]))
    alone = trainer.evaluate(rows.select([5]))
    sizes = [len(rows[place]["input_ids"]) for place in (2, 5)]
    assert sizes[0] != sizes[1]
    mean = (one["eval_attn"] * sizes[0] + alone["eval_attn"] * sizes[1]) / sum(sizes)
    assert two["eval_attn"] == pytest.approx(mean, rel=1e-5)  # padding changes nothing
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    assert after["eval_attn"] < 0.9 * before["eval_attn"]
    assert after["eval_hidden"] < 0.9 * before["eval_hidden"]


def test_other_heads_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(RecipeError, match=r"student_heads: 4: .*the teacher has 2") as caught:
        make(tmp_path, student=student_of(heads=4))
    assert "--student_heads 2" in str(caught.value) and "--attn none" in str(caught.value)
    make(tmp_path, student=student_of(heads=4), attn="none").train()


def test_gradient_checkpointing_goes_with_hidden_states_alone(tmp_path):
    with pytest.raises(RecipeError, match="gradient_checkpointing") as caught:
        make(tmp_path, gradient_checkpointing=True)
    assert "--attn none" in str(caught.value)
    plain = make(tmp_path / "a", attn="none", kind="single_label", losses=ALL)
    saving = make(
        tmp_path / "b", attn="none", kind="single_label", losses=ALL, gradient_checkpointing=True
    )
    plain.train(), saving.train()
    assert saving.model.body.is_gradient_checkpointing
    assert "attn" not in plain.state.log_history[0]
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["single_label", "token"])
def test_bf16_autocast_is_near_float32(tmp_path, kind):
    whole, half = (
        make(tmp_path / name, ALL, kind, bf16=bf16, max_steps=3)
        for name, bf16 in (("a", False), ("b", True))
    )
    whole.train(), half.train()
    assert all(value.dtype == torch.float32 for value in weights(half).values())
    lines = [[x for x in t.state.log_history if "loss" in x] for t in (whole, half)]
    for exact, rough in zip(*lines, strict=True):
        for name in ("loss", "attn", "hidden", "soft", "hard"):
            assert rough[name] == pytest.approx(exact[name], rel=0.03, abs=0.01)
    assert lines[0] != lines[1]


class Padding:
    """A tokenizer of which only the padding matters."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id


@pytest.mark.parametrize("own, tokenizers", [(3, None), (0, None), (3, 0), (None, 3)])
def test_a_decoder_is_read_at_its_last_token_whatever_the_padding(tmp_path, own, tokenizers):
    # the model looks for padding by an id of its own: rows must be padded with that very one
    def classifier(seed, layers, padding):
        torch.manual_seed(seed)
        config = LlamaConfig(**LLAMA, num_hidden_layers=layers, pad_token_id=padding)
        return LlamaForSequenceClassification(config)

    rows = token_rows(6, low=3, high=14).map(lambda row: {"labels": row["row"] % CLASSES})
    rows = rows.map(lambda row: {"input_ids": [*row["input_ids"], 7]})
    student, teacher = classifier(1, 1, own), classifier(7, 2, 5)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            own_logits, target = (
                model.eval().score(model.model(input_ids=ids).last_hidden_state[0, -1])
                for model in (student, teacher)
            )
        log_p, log_q = target.log_softmax(-1), own_logits.log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    trainer = make(
        tmp_path,
        ("soft", "hard"),
        "single_label",
        student=LatentStudent(student),
        teacher=LatentTeacher(teacher, head="sequence"),
        rows=rows,
        processing_class=Padding(tokenizers),
    )
    assert trainer.evaluate(rows)["eval_soft"] == pytest.approx(total / len(rows), rel=1e-5)


LLAMA = {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "num_labels": CLASSES,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

REFUSED = {
    "no losses": ({"losses": ()}, r"losses: \(\): must be a list"),
    "unknown loss": ({"losses": ("latent", "sft")}, "of latent, soft, hard"),
    "latent of nobody": ({"teacher": None}, "the latent loss compares with a teacher's insides"),
    "soft of nobody": (
        {"losses": ("soft",), "kind": "single_label", "teacher": None},
        "the soft loss needs a teacher's classes",
    ),
    "no head": (
        {"losses": ("soft",), "kind": "single_label", "teacher": LatentTeacher(tiny_bert(7))},
        "has no head for the task",
    ),
    "no task": ({"losses": ("hard",)}, "kind: None: no such task"),
    "nothing latent": ({"attn": "none", "hidden": False}, "leave no latent loss"),
    "uneven layers": ({"student": student_of(layers=3)}, "cannot be shared out evenly"),
    "deeper student": ({"student": student_of(layers=6)}, r"must lie in 1\.\.4"),
    "unknown form": ({"attn": "mse_score"}, "known: mse_scores"),
    "unknown soft": ({"soft": "kld"}, "known: kl, mse, nkd"),
    "negative weight": ({"attn_weight": -1.0}, "must be at least 0"),
    "cold": ({"soft_temperature": 0.0}, "must be above 0"),
    "compiled maps": ({"torch_compile": True}, "recorded while the model runs once"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, what):
    parts, words = REFUSED[what]
    with pytest.raises((RecipeError, TeacherError), match=words):
        make(tmp_path, **parts)


def test_rows_without_what_a_loss_needs(tmp_path):
    rows = Dataset.from_list([{"input_ids": [2, 6, 3], "row": 0}] * 4)
    trainer = make(tmp_path, ("hard",), "single_label", teacher=None, rows=rows)
    with pytest.raises(DataError, match="rows without labels have no hard loss"):
        trainer.train()
    make(tmp_path, ("soft",), "single_label", rows=rows).train()  # these need none
