"""SaltTrainer: stages, switch, resume, teachers of other sizes, adapters."""

import math

import pytest
import torch
from conftest import VOCAB, salt_args, tiny_llama, token_rows

from llmkd import SaltTrainer
from llmkd.data import PackedCollator
from llmkd.errors import NonFiniteError, RecipeError, TeacherError
from llmkd.objectives.token import ce_kd, shift_labels
from llmkd.teachers import LiveTeacher
from llmkd.trainers.checkpoints import MARK, last_whole_checkpoint
from llmkd.types import DenseLogits


def make(folder, *, model=None, teacher=None, rows=None, callbacks=None, **settings):
    teacher = teacher if teacher is not None else tiny_llama(7)
    return SaltTrainer(
        model or tiny_llama(1),
        salt_args(folder, **settings),
        teacher=teacher,
        train_dataset=rows or token_rows(),
        eval_dataset=token_rows(9, seed=5),
        callbacks=callbacks,
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_one_step_is_the_plain_objective(tmp_path):
    # one SGD step against the naive float64 form, divided by all target tokens
    rows = token_rows(4)
    trainer = make(
        tmp_path,
        rows=rows,
        max_steps=1,
        kd_ratio=1.0,
        kd_weight=0.6,
        optim="sgd",
        max_grad_norm=0.0,
    )
    student, teacher = tiny_llama(1).double(), tiny_llama(7).double()
    batch = PackedCollator(0)([rows[i] for i in range(4)])
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    gold = shift_labels(batch["labels"])
    with torch.no_grad():
        target = DenseLogits(teacher(**inputs).logits, VOCAB)
    term = ce_kd(student(**inputs).logits, target, gold != -100, gold_BT=gold, kd_weight=0.6)
    (term.total / term.count).backward()
    trainer.train()
    for (name, after), before in zip(
        trainer.model.named_parameters(), student.parameters(), strict=True
    ):
        expected = before.detach() - 0.05 * before.grad
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch, accumulate", [(2, 2), (1, 4)])
def test_accumulation_does_not_move_the_update(tmp_path, batch, accumulate):
    settings = {"max_steps": 1, "kd_ratio": 1.0, "optim": "sgd", "max_grad_norm": 0.0}
    whole = make(tmp_path / "a", per_device_train_batch_size=4, **settings)
    split = make(
        tmp_path / "b",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    whole.train(), split.train()
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=0, atol=2e-7)


def test_salt_is_rkd_up_to_the_switch_and_asks_nobody_after(tmp_path):
    from transformers import TrainerCallback

    seen = {}

    class Snap(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, args, state, control, model=None, **_):
            kept = {k: v.clone() for k, v in model.state_dict().items()}
            seen[self.name, state.global_step] = kept

    salt = make(tmp_path / "a", kd_ratio=0.5, max_steps=6, callbacks=[Snap("salt")])
    rkd = make(tmp_path / "b", kd_ratio=1.0, max_steps=6, callbacks=[Snap("rkd")])
    salt.train(), rkd.train()
    for step in (1, 2, 3):
        assert_equal(seen["salt", step], seen["rkd", step])
    assert any(not torch.equal(v, seen["rkd", 4][k]) for k, v in seen["salt", 4].items())
    assert salt.teacher.forwards == 3 and rkd.teacher.forwards == 6


def test_the_teacher_leaves_memory_at_the_switch(tmp_path):
    import gc
    import weakref

    from transformers import TrainerCallback

    alive = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            gc.collect()
            alive.append(watched() is not None)

    teacher = tiny_llama(7)
    watched = weakref.ref(teacher)
    trainer = make(tmp_path, teacher=teacher, kd_ratio=0.5, max_steps=4, callbacks=[Look()])
    del teacher
    trainer.train()
    assert alive == [True, True, False, False]


@pytest.mark.parametrize("settings", [{"kd_ratio": 0.0}, {"kd_ratio": 1.0, "kd_weight": 0.0}])
def test_without_a_share_of_kd_it_is_plain_training(tmp_path, settings):
    from transformers import Trainer

    kd = make(tmp_path / "a", **settings)
    kd.train()
    assert kd.teacher is None
    args = salt_args(tmp_path / "b", remove_unused_columns=False)
    plain = Trainer(tiny_llama(1), args, train_dataset=token_rows(), data_collator=WithoutRows())
    plain.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(kd)[name], value, rtol=1e-4, atol=1e-5)


class WithoutRows(PackedCollator):
    def __init__(self):
        super().__init__(0)

    def __call__(self, rows):
        batch = super().__call__(rows)
        batch.pop("rows")
        return batch


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("transition", ["step", "linear", "linear_ratio"])
def test_resume_around_the_switch_is_bitwise_the_uninterrupted_run(tmp_path, stop, transition):
    settings = {
        "kd_ratio": 0.5,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "transition": transition,
        "kd_weight": 0.6,
    }
    whole = make(tmp_path / "a", **settings)
    whole.train()
    again = make(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert_equal(weights(again), weights(whole))
    assert again.teacher.forwards == max(0, 3 - stop)
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


def test_resumed_after_its_stage_the_teacher_is_never_read(tmp_path):
    settings = {"kd_ratio": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "teacher"
    tiny_llama(7).save_pretrained(folder)
    make(tmp_path / "a", teacher=LiveTeacher(folder), **settings).train()
    (folder / "model.safetensors").unlink()
    again = make(tmp_path / "b", teacher=LiveTeacher(folder), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.state.global_step == 4


def test_teacher_is_frozen_in_eval_mode_and_unchanged(tmp_path):
    teacher = tiny_llama(7)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer = make(tmp_path, teacher=teacher, kd_ratio=1.0)
    trainer.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert_equal(dict(teacher.state_dict()), before)


@pytest.mark.parametrize("student_vocab, teacher_vocab", [(300, 304), (312, 300), (304, 312)])
def test_padded_heads_are_aligned_not_refused(tmp_path, tokenizer, student_vocab, teacher_vocab):
    # what lies beyond the tokenizer has no meaning: huge logits there must change nothing
    teacher = tiny_llama(7, vocab=teacher_vocab, tied=False)
    noisy = tiny_llama(7, vocab=teacher_vocab, tied=False)
    with torch.no_grad():
        noisy.lm_head.weight[len(tokenizer) :] += 50.0
    results = []
    for name, source in (("a", teacher), ("b", noisy)):
        trainer = SaltTrainer(
            tiny_llama(1, vocab=student_vocab),
            salt_args(tmp_path / name, kd_ratio=1.0),
            teacher=source,
            train_dataset=token_rows(vocab=290),
            processing_class=tokenizer,
        )
        assert trainer.teacher.shared == 300
        trainer.train()
        results.append(weights(trainer))
    assert_equal(*results)


def test_another_vocabulary_size_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TeacherError, match="processing_class=tokenizer"):
        make(tmp_path, teacher=tiny_llama(7, vocab=VOCAB + 2), kd_ratio=1.0)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, tokenizer):
    from conftest import sentences

    from llmkd.data import train_bpe

    folder = tmp_path / "teacher"
    tiny_llama(7, vocab=300).save_pretrained(folder)
    train_bpe(sentences(60, seed=9)[:5] + ["zebra quux"] * 50, 300, folder)
    with pytest.raises(TeacherError, match=r"another tokenizer.*tokens differ") as caught:
        LiveTeacher(folder).check(300, tokenizer)
    assert "--tokenizer_name_or_path" in str(caught.value)


def test_too_small_a_teacher_head_is_refused(tokenizer):
    with pytest.raises(TeacherError, match="fewer than the tokenizer's 300"):
        LiveTeacher(tiny_llama(7, vocab=200)).check(300, tokenizer)


def test_no_teacher_for_a_kd_stage(tmp_path):
    with pytest.raises(RecipeError, match="need a teacher"):
        SaltTrainer(tiny_llama(1), salt_args(tmp_path), train_dataset=token_rows())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_teacher_weights_that_are_not_numbers_stop_before_the_first_step(tmp_path, bad):
    teacher = tiny_llama(7)
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    trainer = make(tmp_path, teacher=teacher, kd_ratio=1.0)
    before = weights(trainer)
    with pytest.raises(TeacherError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        trainer.train()
    assert_equal(weights(trainer), before)


def test_non_finite_loss_stops_with_step_rows_and_rate(tmp_path):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.norm.weight[0] = float("nan")

    trainer = make(
        tmp_path, kd_ratio=0.0, save_strategy="steps", save_steps=1, callbacks=[Poison()]
    )
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3 .*rows \[8, 9, 10, 11\]"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"


def test_non_finite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    trainer = make(tmp_path, kd_ratio=0.0)
    trainer.model.model.embed_tokens.weight.register_hook(lambda g: g * float("inf"))
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        trainer.train()
    assert_equal(weights(trainer), before)


def test_held_out_metrics_are_means_over_tokens(tmp_path):
    trainer = make(tmp_path, kd_ratio=0.0, per_device_eval_batch_size=2)
    trainer.bytes_per_token = 2.5
    scores = trainer.evaluate()
    nats = hits = count = 0
    for row in token_rows(9, seed=5):
        ids = torch.tensor([row["input_ids"]])
        log_q = trainer.model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        gold = ids[0, 1:]
        nats -= log_q.gather(-1, gold[:, None]).sum().item()
        hits += (log_q.argmax(-1) == gold).sum().item()
        count += len(gold)
    assert scores["eval_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert scores["eval_accuracy"] == pytest.approx(hits / count)
    assert scores["eval_tokens"] == count
    assert scores["eval_bits_per_byte"] == pytest.approx(nats / count / math.log(2) / 2.5, rel=1e-6)


def test_packing_does_not_change_what_documents_cost(tmp_path):
    from datasets import Dataset

    documents = [row["input_ids"] for row in token_rows(8, seed=5)]
    packed = [
        {
            "input_ids": [t for ids in documents[i : i + 4] for t in ids],
            "seq_lengths": [*map(len, documents[i : i + 4])],
        }
        for i in (0, 4)
    ]
    alone = [{"input_ids": ids} for ids in documents]
    scores, losses = [], []
    for name, rows in (("packed", packed), ("alone", alone)):
        rows = Dataset.from_list(rows)
        size = {"per_device_train_batch_size": len(rows), "max_steps": 1}
        trainer = make(tmp_path / name, rows=rows, kd_ratio=1.0, **size)
        scores.append(trainer.evaluate(rows))
        trainer.train()
        losses.append(trainer.state.log_history[-2]["loss"])
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_log_lines_hold_means_per_token_and_the_weight_used(tmp_path):
    trainer = make(tmp_path, kd_ratio=0.5, kd_weight=0.6, max_steps=4)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["kd_weight"] for line in lines] == [0.6, 0.6, 0.0, 0.0]
    for line in lines[:2]:
        mixed = 0.4 * line["ce"] + 0.6 * (line["kl"] + line["teacher_entropy"])
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)
    assert lines[3]["loss"] == pytest.approx(lines[3]["ce"], rel=1e-6)
    expected = sum(len(token_rows()[i]["input_ids"]) - 1 for i in range(16))
    assert trainer.state.num_input_tokens_seen == expected


@pytest.mark.parametrize("logging, saving, evaluating", [(3, 2, 5), (7, 3, 2), (500, 4, 3)])
def test_tokens_are_counted_whatever_the_rhythm(tmp_path, logging, saving, evaluating):
    settings = {"kd_ratio": 0.3, "max_steps": 6, "logging_steps": logging}
    settings |= {"save_strategy": "steps", "save_steps": saving}
    settings |= {"eval_strategy": "steps", "eval_steps": evaluating}
    trainer = make(tmp_path / "a", **settings)
    trainer.train()
    lengths = [len(ids) - 1 for ids in token_rows()["input_ids"]]
    assert trainer.state.num_input_tokens_seen == sum(lengths)
    stop = saving * (5 // saving)
    again = make(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert again.state.num_input_tokens_seen == sum(lengths)


def test_eval_lines_know_their_tokens_between_log_lines(tmp_path):
    import json

    from llmkd.trainers.callbacks import MetricsFile

    trainer = make(
        tmp_path,
        kd_ratio=0.0,
        max_steps=5,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=3,
        callbacks=[MetricsFile(tmp_path)],
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lengths = [len(ids) - 1 for ids in token_rows()["input_ids"]]
    tokens = [x["tokens"] for x in lines if "eval_loss" in x]
    assert tokens == [sum(lengths[:12]), sum(lengths[:20])]  # after step 3 and at the end


def test_weights_that_overflowed_are_never_marked_whole(tmp_path):
    # with clipping off nothing looks at the gradient; the update itself overflows
    trainer = make(
        tmp_path,
        kd_ratio=0.0,
        max_grad_norm=0.0,
        learning_rate=1e38,
        optim="sgd",
        save_strategy="steps",
        save_steps=1,
        max_steps=6,
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    for folder in tmp_path.glob(f"checkpoint-*/{MARK}"):
        from safetensors.torch import load_file

        kept = load_file(folder.parent / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in kept.values())


def test_plain_training_arguments_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(RecipeError, match="takes a SaltConfig"):
        SaltTrainer(tiny_llama(1), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_student_trains_only_its_adapter(tmp_path, checkpointing):
    from peft import LoraConfig

    model = tiny_llama(1)
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = SaltTrainer(
        model,
        salt_args(tmp_path, kd_ratio=0.5, gradient_checkpointing=checkpointing),
        teacher=tiny_llama(7),
        train_dataset=token_rows(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    after = trainer.model.state_dict()
    for name, value in frozen.items():
        inner = name.replace("q_proj.", "q_proj.base_layer.").replace(
            "v_proj.", "v_proj.base_layer."
        )
        assert torch.equal(after[f"base_model.model.{inner}"], value), name
    assert any(v.abs().sum() > 0 for k, v in after.items() if "lora_B" in k)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = make(tmp_path / "a", kd_ratio=0.5)
    saving = make(tmp_path / "b", kd_ratio=0.5, gradient_checkpointing=True)
    plain.train(), saving.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_runs_and_stays_close(tmp_path):
    wide = make(tmp_path / "a", kd_ratio=0.5, max_steps=2)
    narrow = make(tmp_path / "b", kd_ratio=0.5, max_steps=2, bf16=True)
    wide.train(), narrow.train()
    one, other = wide.state.log_history[0]["loss"], narrow.state.log_history[0]["loss"]
    assert other == pytest.approx(one, rel=2e-2) and other != one


def test_users_own_collator_with_padding_and_attention_mask(tmp_path, tokenizer):
    from transformers import DataCollatorForLanguageModeling

    rows = token_rows(vocab=290)
    left, right = [], []
    for side, kept in (("left", left), ("right", right)):
        tokenizer.padding_side = side
        trainer = SaltTrainer(
            tiny_llama(1, vocab=300),
            salt_args(tmp_path / side, kd_ratio=1.0, max_steps=2),
            teacher=tiny_llama(7, vocab=300),
            train_dataset=rows.remove_columns("row"),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )
        trainer.train()
        kept.extend(line["loss"] for line in trainer.state.log_history if "loss" in line)
    tokenizer.padding_side = "right"
    assert left == pytest.approx(right, rel=2e-4)


def test_a_checkpoint_without_its_mark_is_not_resumed_from(tmp_path):
    make(tmp_path, kd_ratio=0.0, save_strategy="steps", save_steps=2).train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / MARK).unlink()
    assert last_whole_checkpoint(tmp_path, clean=True).name == "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_no_pickle_of_the_arguments_is_written(tmp_path):
    make(tmp_path, kd_ratio=0.0, save_strategy="steps", save_steps=2).train()
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("kd_ratio", 1.2),
        ("kd_ratio", -0.1),
        ("kd_weight", 2),
        ("teacher_temperature", 0),
        ("student_temperature", -1),
        ("transition", "cosinus"),
        ("transition_hold", 1.5),
        ("average_tokens_across_devices", False),
        ("save_total_limit", 1),
    ],
)
def test_settings_out_of_range_name_key_and_value(tmp_path, key, value):
    with pytest.raises(RecipeError) as caught:
        salt_args(tmp_path, **{key: value})
    assert key in str(caught.value) and repr(value) in str(caught.value)


def test_ids_and_folders_are_taken_for_models(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "student")
    tiny_llama(7).save_pretrained(tmp_path / "teacher")
    named = SaltTrainer(
        str(tmp_path / "student"),
        salt_args(tmp_path / "a", kd_ratio=1.0),
        teacher=str(tmp_path / "teacher"),
        train_dataset=token_rows(),
    )
    given = make(tmp_path / "b", kd_ratio=1.0)
    named.train(), given.train()
    assert_equal(weights(named), weights(given))
