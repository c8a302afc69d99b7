"""IrepoTrainer: what a step minimises, where references come from, what is logged and refused."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_llama
from datasets import Dataset
from pair_kit import irepo_args, pair_rows
from peft import LoraConfig, get_peft_model

from llmkd import IrepoTrainer
from llmkd.data.pair_collator import PairCollator
from llmkd.errors import DataError, NonFiniteError, RecipeError
from llmkd.models.log_probs import completion_log_probs
from llmkd.trainers.irepo_reference import FILE

LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}


def make(folder, **parts):
    """A trainer; `parts` are its own arguments (model, rows, ...) and settings."""
    own = {
        "model": parts.pop("model", None) or tiny_llama(1),
        "train_dataset": parts.pop("rows", None) or pair_rows(),
        "eval_dataset": parts.pop("held_out", None) or pair_rows(7, seed=9),
        "peft_config": parts.pop("peft_config", None),
        "callbacks": parts.pop("callbacks", None),
    }
    return IrepoTrainer(args=irepo_args(folder, **parts), **own)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def both_sums(model, rows):
    """[N, 2] nats, by the library's own function; it has a test of its own."""
    prompts = [[*x] for x in rows["prompt_ids"]]
    sides = [completion_log_probs(model, prompts, [[*x] for x in rows[f"ids_{k}"]]) for k in (1, 2)]
    return np.stack(sides, 1)


def with_columns(rows, name, values):
    for side in (1, 2):
        rows = rows.add_column(f"{name}_{side}", values[:, side - 1])
    return rows


# what a step is


def test_one_step_is_the_gradient_of_the_mean_by_hand(tmp_path):
    # float64, each row alone and unpadded, whole logits; a reference that is not the start
    rows, beta = pair_rows(4), 0.3
    rows = with_columns(rows, "ref_logps", both_sums(tiny_llama(5), rows))
    trainer = make(tmp_path, rows=rows, max_steps=1, learning_rate=0.01, beta=beta)
    model, loss = tiny_llama(1).double(), 0.0
    for row in rows:
        delta = 0.0
        for side, sign in ((1, 1.0), (2, -1.0)):
            ids, start = row["prompt_ids"] + row[f"ids_{side}"], len(row["prompt_ids"])
            log_q = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            own = sum(log_q[at - 1, ids[at]] for at in range(start, len(ids)))
            delta = delta + sign * (own - row[f"ref_logps_{side}"])
        loss = loss + (beta * delta - row["pref_logit"]) ** 2 / 4
    loss.backward()
    trainer.train()
    assert lines(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    moved = 0.0
    for name, before in model.named_parameters():
        after = dict(trainer.model.named_parameters())[name].double()
        step = 0.01 * before.grad
        torch.testing.assert_close(after, before.detach() - step, rtol=1e-5, atol=1e-6, msg=name)
        moved = max(moved, step.abs().max().item())
    assert moved > 0.01


@pytest.mark.parametrize("loss", ["irepo", "dpo", "robust_dpo"])
@pytest.mark.parametrize("batch, accumulate", [(2, 2), (1, 4)])
def test_accumulation_does_not_move_the_update(tmp_path, loss, batch, accumulate):
    settings = {"loss": loss, "max_steps": 2, "learning_rate": 0.2}
    if loss == "robust_dpo":
        settings["flip_rate"] = 0.2
    whole = make(tmp_path / "a", **settings)
    split = make(
        tmp_path / "b",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    before = weights(whole)
    whole.train(), split.train()
    moved = 0.0
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=0, atol=5e-6, msg=name)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 0.02
    for one, other in zip(lines(whole), lines(split), strict=True):
        names = ("loss", "accuracy", "margin", "target", "logratio_reference")
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, abs=1e-5)
    tokens = [len(row["ids_1"]) + len(row["ids_2"]) for row in pair_rows()][:8]
    assert whole.state.num_input_tokens_seen == split.state.num_input_tokens_seen == sum(tokens)


def test_a_small_last_batch_is_a_mean_over_its_own_pairs(tmp_path):
    # ten pairs, four a step: the third step has two, and each weighs one half
    rows = pair_rows(10)
    trainer = make(tmp_path, rows=rows, learning_rate=0.0)
    trainer.train()
    squares = np.square(rows["pref_logit"])
    wanted = [squares[:4].mean(), squares[4:8].mean(), squares[8:].mean()]
    assert [line["loss"] for line in lines(trainer)] == pytest.approx(wanted, rel=1e-5)


def test_at_the_first_step_the_policy_is_its_reference(tmp_path):
    trainer = make(tmp_path, learning_rate=0.0)
    trainer.train()
    for line in lines(trainer):
        assert abs(line["logratio_reference"]) < 1e-4 and abs(line["margin"]) < 1e-4


def test_a_columns_batch_mates_change_nothing(tmp_path):
    # a row's loss beside short rows is its loss beside a long one
    rows = pair_rows(4)
    long = Dataset.from_list([*rows, {**rows[0], "ids_1": [3] * 50}])
    rows, long = (with_columns(r, "ref_logps", np.zeros((len(r), 2))) for r in (rows, long))
    trainer = make(tmp_path, rows=rows, per_device_eval_batch_size=8)
    collate, found = PairCollator(0), []
    for some in (rows, long):
        batch = collate([{**row} for row in some])
        found.append(trainer.log_ratios(trainer.model.eval(), batch)["reference"][:4])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_length_normalize_divides_log_ratios_by_tokens(tmp_path):
    rows = with_columns(pair_rows(), "ref_logps", both_sums(tiny_llama(5), pair_rows()))
    held = with_columns(pair_rows(7, seed=9), "ref_logps", np.zeros((7, 2)))
    trainer = make(tmp_path, rows=rows, held_out=held, length_normalize=True, beta=1.0)
    sums = both_sums(tiny_llama(1), held)
    lengths = np.array([[len(row["ids_1"]), len(row["ids_2"])] for row in held])
    delta = (sums / lengths) @ [1, -1]
    wanted = np.square(delta - np.array(held["pref_logit"])).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_the_plain_head_gives_the_same_run(tmp_path, fused):
    one = make(tmp_path / "a")
    other = make(tmp_path / "b", fused_head=fused, head_memory_mib=1)
    one.train(), other.train()
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=1e-5)


def test_loss_dpo_is_trls_on_the_same_pairs(tmp_path):
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from llmkd.data import train_bpe

    words = "the cat sat on a mat and two dogs ran far from home while it rained".split()
    make_text = np.random.default_rng(0)

    def text(low, high):
        return "".join(f" {w}" for w in make_text.choice(words, make_text.integers(low, high)))

    tokenizer: PreTrainedTokenizerFast = train_bpe([text(5, 9)] * 40, 300, tmp_path / "tok")
    texts = [{"prompt": "say" + text(1, 6), "chosen": text(2, 9), "rejected": text(2, 9)}
             for _ in range(8)]  # fmt: skip
    quiet = {"report_to": "none", "use_cpu": True, "max_grad_norm": 0.0, "optim": "sgd"}
    quiet |= {
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
    }
    quiet |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    theirs = DPOTrainer(
        tiny_llama(1, vocab=300),
        args=DPOConfig(
            str(tmp_path / "trl"),
            beta=0.2,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=False,
            train_sampling_strategy="sequential",
            **quiet,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    made = theirs.train_dataset
    rows = Dataset.from_list(
        [
            {
                # every other pair the other way round, with its sign: nothing may change
                "prompt_ids": row["prompt_ids"],
                "ids_1": row["chosen_ids" if place % 2 else "rejected_ids"],
                "ids_2": row["rejected_ids" if place % 2 else "chosen_ids"],
                "pref_logit": 2.0 if place % 2 else -2.0,
            }
            for place, row in enumerate(made)
        ]
    )
    args = irepo_args(tmp_path / "ours", loss="dpo", beta=0.2, learning_rate=0.1, max_steps=2)
    ours = IrepoTrainer(tiny_llama(1, vocab=300), args, train_dataset=rows)
    theirs.train(), ours.train()
    losses = [[line["loss"] for line in lines(t)] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0][1] - math.log(2)) > 1e-3
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=0, atol=1e-5)
    assert lines(ours)[1]["margin"] == pytest.approx(lines(theirs)[1]["rewards/margins"], abs=1e-5)


# references


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_the_loss_is_measured_from_the_reference_named(tmp_path, reference):
    rows = pair_rows()
    sums = {
        "ref_logps": both_sums(tiny_llama(5), rows),
        "initial_logps": both_sums(tiny_llama(6), rows),
    }
    for name, values in sums.items():
        rows = with_columns(rows, name, values)
    trainer = make(tmp_path, rows=rows, reference=reference, learning_rate=0.0, max_steps=1)
    trainer.train()
    own, used = (
        both_sums(tiny_llama(1), rows),
        "initial_logps" if reference == "initial" else "ref_logps",
    )
    ratio = (own - sums[used])[:4]
    delta = ratio @ [1, -1]
    (line,) = lines(trainer)
    wanted = np.square(0.1 * delta - np.array(rows["pref_logit"])[:4]).mean()
    assert line["loss"] == pytest.approx(wanted, rel=1e-4)
    assert line["logratio_reference"] == pytest.approx(ratio.mean(), rel=1e-4)
    far = (own - sums["initial_logps"])[:4].mean()
    assert line["logratio_initial"] == pytest.approx(far, rel=1e-4)


def test_missing_references_are_those_of_the_model_it_began_with(tmp_path):
    rows = with_columns(pair_rows(), "ref_logps", both_sums(tiny_llama(1), pair_rows()))
    held = with_columns(
        pair_rows(7, seed=9), "ref_logps", both_sums(tiny_llama(1), pair_rows(7, seed=9))
    )
    given = make(tmp_path / "a", rows=rows, held_out=held)
    made = make(tmp_path / "b", reference_batch_size=3)
    given.train(), made.train()
    for name, value in weights(given).items():
        torch.testing.assert_close(weights(made)[name], value, rtol=0, atol=1e-5)
    one, other = given.evaluate(), made.evaluate()
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-5)
    assert "logratio_initial" not in lines(given)[0]  # nobody knows the initial policy


def test_references_are_taken_without_dropout_and_so_is_the_step(tmp_path):
    def dropping():
        model = tiny_llama(1)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    still = make(tmp_path / "a", model=dropping(), learning_rate=0.0)
    still.train()
    assert abs(lines(still)[0]["logratio_reference"]) < 1e-4
    shaken = make(tmp_path / "b", model=dropping(), learning_rate=0.0, disable_dropout=False)
    shaken.train()
    assert abs(lines(shaken)[0]["logratio_reference"]) > 1e-2


def test_before_training_the_model_is_its_own_reference(tmp_path):
    scores = make(tmp_path).evaluate()
    assert scores["eval_margin"] == 0.0 and scores["eval_accuracy"] == 0.5
    wanted = np.square(pair_rows(7, seed=9)["pref_logit"]).mean()
    assert scores["eval_loss"] == pytest.approx(wanted)


def test_rows_that_come_after_training_need_references(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    late = pair_rows(4, seed=3)
    with pytest.raises(DataError, match=r"ref_logps_1: None: .*the model has moved since"):
        trainer.evaluate(late)
    known = with_columns(late, "ref_logps", both_sums(tiny_llama(1), late))
    assert trainer.evaluate(known)["eval_pairs"] == 4


def test_several_held_out_sets(tmp_path):
    sets = {"one": pair_rows(3, seed=3), "two": pair_rows(5, seed=4)}
    trainer = make(tmp_path, held_out=sets, eval_strategy="steps", eval_steps=3)
    trainer.train()
    found = {k: v for line in trainer.state.log_history for k, v in line.items()}
    assert (found["eval_one_pairs"], found["eval_two_pairs"]) == (3, 5)
    assert found["eval_one_logratio_reference"] != 0.0


def test_a_fresh_adapter_trains_from_its_base(tmp_path):
    model = tiny_llama(1)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    trainer = make(tmp_path, model=model, peft_config=LoraConfig(**LORA), learning_rate=0.5)
    trainer.train()
    after = trainer.model.state_dict()
    for name, value in frozen.items():
        for part in ("q_proj", "v_proj"):
            name = name.replace(f"{part}.", f"{part}.base_layer.")
        assert torch.equal(after[f"base_model.model.{name}"], value), name
    assert any(v.abs().sum() > 0 for k, v in after.items() if "lora_B" in k)
    first, *_, last = lines(trainer)
    assert abs(first["logratio_initial"]) < 1e-4
    assert last["logratio_initial"] == pytest.approx(last["logratio_reference"])
    assert abs(last["logratio_initial"]) > 1e-4


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_a_trained_adapter_has_two_references(tmp_path, reference):
    # iteration 2: previous is the adapter it starts with, initial is the base without one
    def second():
        torch.manual_seed(3)
        model = get_peft_model(tiny_llama(1), LoraConfig(**LORA))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        return model

    trainer = make(tmp_path, model=second(), reference=reference, learning_rate=0.0)
    trainer.train()
    far = (both_sums(second(), pair_rows()) - both_sums(tiny_llama(1), pair_rows()))[:4].mean()
    first = lines(trainer)[0]
    assert abs(far) > 0.01 and first["logratio_initial"] == pytest.approx(far, abs=1e-4)
    near = far if reference == "initial" else 0.0
    assert first["logratio_reference"] == pytest.approx(near, abs=1e-4)


# resuming


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [1, 2])
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path, stop, adapted):
    settings = {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 1,
    }

    def begin(folder):
        torch.manual_seed(0)
        return make(folder, peft_config=LoraConfig(**LORA) if adapted else None, **settings)

    whole = begin(tmp_path / "a")
    whole.train()
    again = begin(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert_equal(weights(again), weights(whole))
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    for one, other in zip(lines(again), lines(whole), strict=True):
        assert one["loss"] == other["loss"] and one["margin"] == other["margin"]
    assert again.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    in_place = begin(tmp_path / "a")
    in_place.args.max_steps = 4
    in_place.train(resume_from_checkpoint=True)
    assert in_place.state.global_step == 4


def test_a_resume_without_its_references_is_refused(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    held = json.loads((folder / FILE).read_text())
    other = make(tmp_path, rows=pair_rows(seed=4))
    with pytest.raises(DataError, match="made with other pairs"):
        other.train(resume_from_checkpoint=str(folder))
    assert len(held["ref_logps"]) == 12 + 7
    (folder / FILE).unlink()
    with pytest.raises(RecipeError, match=f"holds no {FILE}"):
        make(tmp_path).train(resume_from_checkpoint=str(folder))


# the log, held out


def test_held_out_metrics_are_means_over_pairs(tmp_path):
    held = pair_rows(7, seed=9)
    refs = both_sums(tiny_llama(5), held)
    held = with_columns(held, "ref_logps", refs)
    ratio = both_sums(tiny_llama(1), held) - refs
    delta, logit = ratio @ [1, -1], np.array(held["pref_logit"])
    for batch in (1, 3, 7):
        scores = make(tmp_path, held_out=held, per_device_eval_batch_size=batch).evaluate()
        assert scores["eval_loss"] == pytest.approx(np.square(0.1 * delta - logit).mean(), rel=1e-5)
        right = (np.sign(delta) == np.sign(logit)).mean()
        assert scores["eval_accuracy"] == pytest.approx(right) and 0 < right < 1
        margin = (0.1 * delta * np.sign(logit)).mean()
        assert scores["eval_margin"] == pytest.approx(margin, rel=1e-4)
        assert scores["eval_logratio_reference"] == pytest.approx(ratio.mean(), rel=1e-4)


def test_training_learns_the_preferences(tmp_path):
    rows = pair_rows(8)
    settings = {"optim": "adamw_torch", "learning_rate": 0.02, "max_steps": 60, "beta": 0.5}
    trainer = make(tmp_path, rows=rows, held_out=rows, per_device_train_batch_size=8, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.05 * before and after["eval_accuracy"] == 1.0


@pytest.mark.parametrize(
    "loss, means",
    [
        ("irepo", "IPO at tau = beta / (2 |logit|) = 0.01667"),
        ("soft_dpo", "label_smoothing 0.04743"),
    ],
)
def test_hard_labels_are_warned_of(tmp_path, caplog, loss, means):
    with caplog.at_level(logging.WARNING, "llmkd"):
        make(tmp_path, rows=pair_rows(hard=True), loss=loss)
    (said,) = [r.getMessage() for r in caplog.records if "hard labels" in r.getMessage()]
    assert means in said
    caplog.clear()
    with caplog.at_level(logging.WARNING, "llmkd"):
        make(tmp_path)
        make(tmp_path, rows=pair_rows(hard=True), loss="dpo")
    assert not [r for r in caplog.records if "hard labels" in r.getMessage()]


def test_rows_of_like_length_together(tmp_path):
    rows = pair_rows(64, seed=2)
    trainer = make(tmp_path, rows=rows, train_sampling_strategy="group_by_length")
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(64))
    length = [len(r["prompt_ids"]) + max(len(r["ids_1"]), len(r["ids_2"])) for r in rows]
    spread = np.ptp([[length[i] for i in order[at : at + 4]] for at in range(0, 64, 4)], axis=1)
    assert spread.mean() < 2 < np.ptp(length)


def test_bf16_autocast_keeps_references_exact(tmp_path):
    trainer = make(tmp_path, bf16=True, learning_rate=0.0)
    trainer.train()
    assert trainer.references.tables["ref_logps"].dtype == torch.float64
    for line in lines(trainer):  # the same batches of other rows: bf16's rounding, not more
        assert abs(line["logratio_reference"]) < 0.2


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = make(tmp_path / "a"), make(tmp_path / "b", gradient_checkpointing=True)
    plain.train(), saving.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=1e-5, atol=1e-6)


# what is refused


def broken(**changes):
    rows = [dict(row) for row in pair_rows(6)]
    rows[4] |= changes
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "rows, words",
    [
        (broken(pref_logit=float("nan")), "pref_logit = nan.*row 4"),
        (broken(pref_logit=float("inf")), "pref_logit = inf.*row 4"),
        (broken(ids_1=[]), "ids_1.*row 4 has no tokens"),
        (broken(prompt_ids=[]), "prompt_ids.*row 4 has no tokens"),
        (broken(ids_2=[1, VOCAB]), f"ids_2 holds id {VOCAB}.*row 4.*has {VOCAB} entries"),
        (broken(ids_2=[-1]), "ids_2 holds id -1.*row 4"),
        (broken(ids_1=[1] * 70), r"7\d tokens.*row 4: prompt_ids and ids_1 are longer than 64"),
        (pair_rows(6).remove_columns("ids_2"), "ids_2.*no such column"),
        (pair_rows(6).select([]), "no pair to train on"),
        (pair_rows(6).add_column("ref_logps_1", [0.0] * 6), "one of the two columns is missing"),
        (
            with_columns(pair_rows(6), "ref_logps", np.full((6, 2), np.nan)),
            "ref_logps_1 = nan.*row 0",
        ),
    ],
)
@pytest.mark.parametrize("key", ["rows", "held_out"])
def test_broken_pairs_stop_before_anything(tmp_path, rows, words, key):
    name = "train_dataset" if key == "rows" else "eval_dataset"
    with pytest.raises(DataError, match=f"(?s){name}: .*({words})"):
        IrepoTrainer(
            tiny_llama(1),
            irepo_args(tmp_path),
            **{"train_dataset": pair_rows(), name: rows},
        )


def test_the_row_is_named_beyond_the_first_thousand(tmp_path):
    rows = [dict(row) for row in pair_rows(8)] * 200
    rows[1234] = {**rows[1234], "ids_1": [VOCAB + 3]}
    with pytest.raises(DataError, match=f"holds id {VOCAB + 3}.*row 1234"):
        make(tmp_path, rows=Dataset.from_list(rows))


def test_max_length_is_a_window_of_its_own(tmp_path):
    with pytest.raises(DataError, match="are longer than 9"):
        make(tmp_path, max_length=9)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"loss": "irpo"}, "loss: 'irpo'.*did you mean 'irepo'"),
        ({"beta": 0.0}, "beta: 0.0"),
        ({"beta": None}, "beta: None"),
        ({"beta": float("nan")}, "beta: nan"),
        ({"reference": "base"}, "reference: 'base'.*previous, initial"),
        ({"huber": -1.0}, "huber: -1.0"),
        ({"huber": 1.0, "loss": "dpo"}, "huber: 1.0: the loss dpo does not read it.*irepo"),
        ({"flip_rate": 0.1}, "flip_rate: 0.1: the loss irepo does not read it.*robust_dpo"),
        ({"loss": "robust_dpo"}, "flip_rate: None: the loss robust_dpo needs it"),
        ({"loss": "robust_dpo", "flip_rate": 0.5}, "flip_rate: 0.5"),
        ({"max_length": 1}, "max_length: 1"),
        ({"reference_batch_size": 0}, "reference_batch_size: 0"),
        ({"head_memory_mib": 0}, "head_memory_mib: 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1"),
        ({"save_total_limit": 1}, "save_total_limit: 1"),
    ],
)
def test_settings_out_of_range_name_key_and_value(tmp_path, settings, words):
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        irepo_args(tmp_path, **settings)


def test_other_arguments_and_streams_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(RecipeError, match="takes an IrepoConfig"):
        IrepoTrainer(tiny_llama(1), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(DataError, match=r"pairs are a datasets\.Dataset"):
        make(tmp_path, rows=pair_rows().to_iterable_dataset())


def test_a_loss_that_is_no_number_stops_with_the_rows(tmp_path):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                with torch.no_grad():
                    model.model.norm.weight[0] = float("nan")

    trainer = make(tmp_path, callbacks=[Poison()])
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 2 .*rows \[4, 5, 6, 7\]"):
        trainer.train()


def test_a_folder_is_taken_for_a_model(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "policy")
    named = make(tmp_path / "a", model=str(tmp_path / "policy"))
    given = make(tmp_path / "b")
    named.train(), given.train()
    assert_equal(weights(named), weights(given))
