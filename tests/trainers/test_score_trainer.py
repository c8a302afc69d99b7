"""ScoreTrainer: what a step minimises, pairs, images, what is logged, resumed and refused."""

import logging
import math

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from score_trainer_kit import LEVELS, score_args, score_rows

from llmkd.data.score_collator import NOBODY, ScoreCollator, draw_partners, in_pairs
from llmkd.errors import DataError
from llmkd.trainers.score import ScoreTrainer
from llmkd.trainers.score_losses import TABLE

LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
SINGLE = {"fidelity_weight": 0.0}
IDS, VALUES = torch.tensor(LEVELS.ids_L), torch.tensor(LEVELS.values_L).double()


def make(folder, **parts):
    """A trainer; `parts` are its own arguments (model, rows, ...) and settings."""
    own = {
        "model": parts.pop("model", None) or tiny_llama(1),
        "train_dataset": parts.pop("rows", None) or score_rows(),
        "eval_dataset": parts.pop("held_out", None) or score_rows(7, seed=9),
        "peft_config": parts.pop("peft_config", None),
        "metrics": parts.pop("metrics", None),
        "levels": parts.pop("levels", LEVELS),
    }
    return ScoreTrainer(args=score_args(folder, **parts), **own)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=name, **tolerance)


def assert_moved(one, other, least=1e-2):
    assert max((value - other[name]).abs().max().item() for name, value in one.items()) > least


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def phi(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def naive(model, rows, partners=(), *, closed=False, std_mode="fixed1"):
    """The official formulas in float64, each row alone and unpadded: CE summed, tokens, KL summed,
    fidelity summed, in-level summed, and each row's mean, std and probabilities.
    """
    ce, tokens, kl, inside, scored = 0.0, 0, 0.0, 0.0, []
    for row in rows:
        log_q = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for at, label in enumerate(row["labels"]):
            if label != -100 and at != row["level_at"]:
                ce, tokens = ce - log_q[at - 1, label], tokens + 1
        own = log_q[row["level_at"] - 1][IDS]
        q = own.exp() / own.exp().sum()
        seen = q.log() if closed else own
        kl = kl + sum(t * (math.log(t) - seen[i]) for i, t in enumerate(row["target"]))
        inside = inside + torch.clamp(1 - own.exp().sum(), min=0.01)
        mean = (q * VALUES).sum()
        scored.append((mean, (q * (VALUES - mean) ** 2).sum().sqrt(), q))
    fid = 0.0
    for a, b in partners:
        (m_a, s_a, _), (m_b, s_b, _) = scored[a], scored[b]
        t_a, t_b = rows[a], rows[b]
        spread = math.sqrt(t_a["score_std"] ** 2 + t_b["score_std"] ** 2 + 1e-8)
        true = torch.tensor((t_a["score_mean"] - t_b["score_mean"]) / spread).double()
        free = (s_a**2 + s_b**2 + 1e-8).sqrt()
        below = {"fixed1": math.sqrt(2), "pred": free, "target": spread}
        below["pred_detached"] = free.detach()
        p, g = phi((m_a - m_b) / below[std_mode]), phi(true)
        fid = fid + 1 - (p * g + 1e-8).sqrt() - ((1 - p) * (1 - g) + 1e-8).sqrt()
    return ce, tokens, kl, fid, inside, scored


def pairs_of(rows, seed=0, step=0, place=0):
    """The pairs that the trainer draws from a micro-batch."""
    groups, able = np.array([row["group_id"] for row in rows]), np.ones(len(rows), bool)
    partners = draw_partners(groups, able, [seed, step, 0, place])
    return [(a, int(b)) for a, b in enumerate(partners) if b != NOBODY]


# what a step is


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_over": "closed"},
        {"std_mode": "pred"},
        {"std_mode": "pred_detached"},
        {"std_mode": "target", "in_level_weight": 0.3},
        SINGLE,
        {"fused_head": False},
        {"level_weight": 0.0},
    ],
    ids=str,
)
def test_one_step_is_the_gradient_of_the_official_loss_by_hand(tmp_path, settings):
    rows = score_rows(4)
    trainer = make(tmp_path, rows=rows, max_steps=1, learning_rate=0.5, **settings)
    args, model = trainer.args, tiny_llama(1).double()
    pairs = pairs_of(rows) if args.fidelity_weight else []
    assert len(pairs) == (4 if args.fidelity_weight else 0)
    ce, tokens, kl, fid, inside, _ = naive(
        model, list(rows), pairs, closed=args.kl_over == "closed", std_mode=args.std_mode
    )
    # (CE + KL) of A plus (CE + KL) of B, where every row is once on either side
    sides = 2 if pairs else 1
    loss = args.level_weight * sides * (ce / tokens + kl / 4)
    loss = loss + args.in_level_weight * sides * inside / 4 + fid / max(len(pairs), 1)
    loss.backward()
    trainer.train()
    (line,) = lines(trainer)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if args.level_weight:
        assert line["level_kl"] == pytest.approx(kl.item() / 4, rel=1e-5)
        assert line["answer_ce"] == pytest.approx(ce.item() / tokens, rel=1e-5)
    moved = 0.0
    for name, before in model.named_parameters():
        after = dict(trainer.model.named_parameters())[name].double()
        step = 0.5 * before.grad
        torch.testing.assert_close(after, before.detach() - step, rtol=1e-4, atol=1e-6, msg=name)
        moved = max(moved, step.abs().max().item())
    assert moved > 0.01


def test_the_defaults_are_the_official_releases(tmp_path):
    args = score_args(tmp_path)
    assert (args.fidelity_weight, args.level_weight, args.in_level_weight) == (1.0, 0.05, 0.0)
    assert (args.kl_over, args.std_mode, args.pair_loss) == ("full", "fixed1", "fidelity")


@pytest.mark.parametrize("loss", [SINGLE, {}, {"pair_loss": "binary_bce"}], ids=str)
def test_accumulation_does_not_move_the_update(tmp_path, loss):
    # groups of two rows, so that micro-batches of two and of four draw the same pairs
    rows = score_rows(12, groups=2, run=2)
    settings = {"rows": rows, "learning_rate": 0.5, "max_steps": 2, **loss}
    whole = make(tmp_path / "a", **settings)
    before = weights(whole)
    split = make(
        tmp_path / "b",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    whole.train(), split.train()
    assert_close(weights(split), weights(whole), rtol=0, atol=5e-6)
    assert_moved(weights(whole), before)
    for one, other in zip(lines(whole), lines(split), strict=True):
        names = [n for n in one if n not in ("epoch", "grad_norm")]
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, abs=1e-5)
    answers = sum(label != -100 for row in list(rows)[:8] for label in row["labels"])
    assert whole.state.num_input_tokens_seen == split.state.num_input_tokens_seen == answers


def test_single_rows_accumulate_to_a_batch(tmp_path):
    whole = make(tmp_path / "a", **SINGLE)
    split = make(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **SINGLE
    )
    whole.train(), split.train()
    assert_close(weights(split), weights(whole), rtol=0, atol=5e-6)


def test_padding_changes_nothing(tmp_path):
    rows = score_rows(4)
    long = {**rows[0], "input_ids": [3] * 40 + rows[0]["input_ids"]}
    long |= {"labels": [-100] * 40 + rows[0]["labels"], "level_at": rows[0]["level_at"] + 40}
    trainer = make(tmp_path)
    collate, found = ScoreCollator(0), []
    for some in (list(rows), [*rows, long]):
        found.append(trainer.answer(trainer.model.eval(), collate(some)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other[:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_nan_in_padding_changes_nothing(tmp_path, fused):
    def poisoned():
        model, seen = tiny_llama(1), {}
        first, last = model.model.embed_tokens, model.model.norm if fused else model.lm_head

        def remember(module, args, out):
            seen["padding"] = torch.zeros_like(args[0], dtype=torch.bool)
            for row, length in enumerate(lengths[len(args[0])]):
                seen["padding"][row, length:] = True

        def spoil(module, args, out):
            if out.shape[:2] != seen["padding"].shape:
                return out  # a look at a few tokens
            return out.masked_fill(seen["padding"][..., None], float("nan"))

        first.register_forward_hook(remember)
        last.register_forward_hook(spoil)
        return model

    rows = score_rows(4)
    lengths = {4: [len(ids) for ids in rows["input_ids"]], 1: [99]}
    assert len(set(lengths[4])) > 1
    settings = {"rows": rows, "max_steps": 2, "fused_head": fused}
    clean, spoilt = (
        make(tmp_path / "a", **settings),
        make(tmp_path / "b", model=poisoned(), **settings),
    )
    clean.train(), spoilt.train()
    assert_close(weights(spoilt), weights(clean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_and_fused_head_agree_tied_padded_or_not(tmp_path, tied):
    # a head of 48 rows for a vocabulary of 40: the padding takes part in the softmax, as anywhere
    def model():
        return tiny_llama(3, vocab=VOCAB + 8, tied=tied)

    one = make(tmp_path / "a", model=model())
    other = make(tmp_path / "b", model=model(), fused_head=False)
    before = weights(one)
    one.train(), other.train()
    assert one.reader._opens is True and other.reader._opens is False
    assert_close(weights(one), weights(other), rtol=0, atol=1e-5)
    assert_moved(weights(one), before, 5e-3)
    pushed = weights(one)["lm_head.weight"][VOCAB:] - before["lm_head.weight"][VOCAB:]
    assert pushed.abs().max() > 1e-6


def test_the_levels_own_label_counts_for_nothing(tmp_path):
    rows = score_rows()
    without = [{**row, "labels": [*row["labels"]]} for row in rows]
    for row in without:
        row["labels"][row["level_at"]] = -100
    one, other = (
        make(tmp_path / "a", rows=rows),
        make(tmp_path / "b", rows=Dataset.from_list(without)),
    )
    one.train(), other.train()
    assert_close(weights(one), weights(other), rtol=0, atol=0)


def test_an_answer_of_the_level_alone(tmp_path):
    rows = []
    for row in score_rows(8, rest=0):
        at = row["level_at"]
        rows.append(
            {**row, "labels": [-100 if i != at else own for i, own in enumerate(row["labels"])]}
        )
    trainer = make(tmp_path, rows=Dataset.from_list(rows), max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert lines(trainer)[0]["answer_ce"] == 0.0 and lines(trainer)[0]["level_kl"] > 0.0
    assert_moved(weights(trainer), before, 1e-3)


# pairs


def test_partners_are_of_ones_group_and_never_oneself():
    make_groups = np.random.default_rng(0)
    for seed in range(50):
        groups = make_groups.integers(0, 4, 11)
        able = make_groups.random(11) > 0.2
        partners = draw_partners(groups, able, [seed, 1])
        rows = np.flatnonzero(partners != NOBODY)
        assert (groups[partners[rows]] == groups[rows]).all() and (partners[rows] != rows).all()
        assert sorted(partners[rows]) == sorted(rows)  # each once on either side
        several = [
            a and ((groups == g) & able).sum() > 1 for g, a in zip(groups, able, strict=True)
        ]
        assert ((partners != NOBODY) == several).all() and (in_pairs(groups, able) == several).all()
    group = np.zeros(6, int), np.ones(6, bool)
    drawn = {tuple(draw_partners(*group, [0, step])) for step in range(20)}
    assert len(drawn) > 10
    assert (draw_partners(*group, [0, 3]) == draw_partners(*group, [0, 3])).all()
    assert not in_pairs(np.zeros(0, int), np.zeros(0, bool)).size


def test_groups_of_one_draw_no_pair_and_are_counted(tmp_path, caplog):
    rows = [dict(row) for row in score_rows(4)]
    for row, group in zip(rows, (5, 7, 5, 9), strict=True):
        row["group_id"] = group
    with caplog.at_level(logging.WARNING, "llmkd"):
        trainer = make(tmp_path, rows=Dataset.from_list(rows), learning_rate=0.0, max_steps=1)
    assert "2 of 4 rows draw no pair: 2 are alone in their group" in caplog.text
    trainer.train()
    (line,) = lines(trainer)
    fid = naive(tiny_llama(1).double(), rows, [(0, 2), (2, 0)])[3]
    assert line["fidelity"] == pytest.approx(fid.item() / 2, rel=1e-5)
    assert line["unpaired"] == 0.5


def test_a_batch_without_a_pair_still_trains(tmp_path):
    # pairs exist in the data, never in a micro-batch
    rows = score_rows(8, groups=2, run=1)
    settings = {"rows": rows, "per_device_train_batch_size": 2, "max_steps": 2}
    paired, single = make(tmp_path / "a", **settings), make(tmp_path / "b", **settings, **SINGLE)
    single.args.level_weight *= 2  # either side
    paired.train(), single.train()
    assert [line["unpaired"] for line in lines(paired)] == [1.0, 1.0]
    assert [line["fidelity"] for line in lines(paired)] == [0.0, 0.0]
    assert_close(weights(paired), weights(single), rtol=0, atol=1e-6)


def test_rows_without_a_spread_draw_no_pair(tmp_path, caplog):
    rows = [{**row, "score_std": None if row["row"] % 4 == 1 else 0.0} for row in score_rows(4)]
    with caplog.at_level(logging.WARNING, "llmkd"):
        trainer = make(tmp_path, rows=Dataset.from_list(rows), max_steps=1)
    assert "1 of 4 rows draw no pair: 0 are alone in their group, 1 have no known" in caplog.text
    trainer.train()
    assert lines(trainer)[0]["unpaired"] == 0.25
    unknown = Dataset.from_list([{**row, "score_std": None} for row in rows])
    with pytest.raises(DataError, match=r"no pair can be drawn: .*4 have no known spread"):
        make(tmp_path, rows=unknown)
    binary = make(tmp_path, rows=unknown, pair_loss="binary", max_steps=1)
    binary.train()
    assert lines(binary)[0]["unpaired"] == 0.0 and lines(binary)[0]["fidelity"] > 0.0
    assert math.isfinite(binary.evaluate(unknown)["eval_loss"])


def test_training_learns_levels_and_order(tmp_path):
    rows = score_rows(8, groups=2)
    settings = {"optim": "adamw_torch", "learning_rate": 0.02, "max_steps": 60}
    trainer = make(tmp_path, rows=rows, held_out=rows, per_device_train_batch_size=8, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert (
        after["eval_loss"] < 0.3 * before["eval_loss"]
        and after["eval_order"] > before["eval_order"]
    )
    assert after["eval_level_mass"] > 0.9 > before["eval_level_mass"]


# adapters, images


def test_a_fresh_adapter_trains_on_a_frozen_base(tmp_path):
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
    trainer.save_model(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "adapter_config.json").exists()


def tiny_llava():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=8,
    )  # fmt: skip
    text = tiny_llama(2).config
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1
    )
    config.tie_word_embeddings = True
    return LlavaForConditionalGeneration(config)


def image_rows(count=8):
    """Four image tokens before each prompt; the other ids stay away from theirs."""
    rows, make_pixels = [], torch.Generator().manual_seed(0)
    for row in score_rows(count):
        ids = [39] * 4 + [one if one != 39 else 1 for one in row["input_ids"]]
        pixels = torch.randn(1, 3, 8, 8, generator=make_pixels)
        labels = [-100] * 4 + [one if one != 39 else 1 for one in row["labels"]]
        rows.append({**row, "input_ids": ids, "labels": labels, "level_at": row["level_at"] + 4})
        rows[-1]["pixel_values"] = pixels.tolist()
    return Dataset.from_list(rows)


def test_an_image_text_model_trains_on_what_it_sees(tmp_path):
    rows = image_rows()
    trainer = make(tmp_path, model=tiny_llava(), rows=rows, held_out=rows, learning_rate=0.3)
    before = trainer.evaluate()
    start = weights(trainer)
    trainer.train()
    assert_moved({k: v for k, v in weights(trainer).items() if "vision" in k}, start, 1e-5)
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"]
    blind = tiny_llava().eval()
    row = rows[3]
    pixels = torch.tensor([row["pixel_values"]])[0]
    logits = blind(input_ids=torch.tensor([row["input_ids"]]), pixel_values=pixels).logits
    kept = make(tmp_path, model=blind, rows=rows)
    answer = kept.answer(kept.model.eval(), ScoreCollator(0)([*rows]))
    alone = logits[0, row["level_at"] - 1]
    torch.testing.assert_close(answer.level_BV[3], alone, rtol=0, atol=1e-5)


def test_a_processors_outputs_are_joined_and_filled_up():
    def row(pictures, size, tokens):
        base = {"labels": [-100] * (tokens - 1) + [11], "level_at": tokens - 1, "score_mean": 2.0}
        return {
            "input_ids": [1] * tokens, **base, "target": [1.0, 0.0, 0.0],
            "pixel_values": np.ones((1, pictures, 3, size)), "token_type_ids": [1] * tokens,
            "grid": torch.full((pictures, 3), pictures), "text": "not for the model",
        }  # fmt: skip

    batch = ScoreCollator(0, pad_to_multiple_of=1)([row(1, 2, 3), row(2, 4, 5)])
    assert (
        batch["pixel_values"].shape == (2, 2, 3, 4) and batch["pixel_values"].dtype == torch.float32
    )
    assert batch["pixel_values"].sum(dim=(1, 2, 3)).tolist() == [6.0, 24.0]
    assert batch["pixel_values"][0, 0, :, :2].eq(1).all()
    assert batch["token_type_ids"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["grid"].tolist() == [[1] * 3, [2] * 3, [2] * 3] and "text" not in batch
    assert batch["group_id"].tolist() == [0, 0] and batch["score_std"].isnan().all()
    blind = row(1, 2, 3)
    del blind["pixel_values"]
    with pytest.raises(DataError, match=r"pixel_values: None: row 1 has none"):
        ScoreCollator(0)([row(1, 2, 3), blind])


# resuming, the log, held out


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path, adapted):
    settings = {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,  # three steps an epoch
    }

    def begin(folder):
        torch.manual_seed(0)
        return make(folder, peft_config=LoraConfig(**LORA) if adapted else None, **settings)

    whole = begin(tmp_path / "a")
    whole.train()
    for stop in (1, 3):
        again = begin(tmp_path / "b")
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
        assert_close(weights(again), weights(whole), rtol=0, atol=0)
        assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
        for one, other in zip(lines(again), lines(whole), strict=True):
            assert one["loss"] == other["loss"] and one["fidelity"] == other["fidelity"]
        assert again.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_held_out_metrics_are_those_of_the_whole_set(tmp_path, batch):
    held = score_rows(7, seed=9, groups=2)
    trainer = make(tmp_path, held_out=held, per_device_eval_batch_size=batch)
    scores = trainer.evaluate()
    partners = draw_partners(np.array(held["group_id"]), np.ones(7, bool), 0)
    pairs = [(a, int(b)) for a, b in enumerate(partners)]
    ce, tokens, kl, fid, _, scored = naive(tiny_llama(1).double(), list(held), pairs)
    wanted = {"level_kl": kl / 7, "answer_ce": ce / tokens, "fidelity": fid / 7}
    wanted["loss"] = 0.1 * (kl / 7 + ce / tokens) + fid / 7
    for name, value in wanted.items():
        assert scores[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5), name
    means = np.array([mean.item() for mean, _, _ in scored])
    true = np.array(held["score_mean"])
    assert scores["eval_mae"] == pytest.approx(np.abs(means - true).mean(), rel=1e-5)
    assert scores["eval_plcc"] == pytest.approx(np.corrcoef(means, true)[0, 1], rel=1e-4)
    ranks = means.argsort().argsort(), true.argsort().argsort()
    assert scores["eval_srcc"] == pytest.approx(1 - 6 * np.square(ranks[0] - ranks[1]).sum() / 336)
    assert scores["eval_rows"] == scores["eval_pairs"] == 7


def test_the_table_holds_what_its_names_say(tmp_path):
    held, seen = score_rows(7, seed=9), []

    def more(table):
        seen.append(table)
        return {"mine": 3.0}

    trainer = make(tmp_path, held_out=held, metrics=more)
    assert trainer.evaluate()["eval_mine"] == 3.0
    (table,) = seen
    assert table.shape == (7, len(TABLE) + 3)
    *_, scored = naive(tiny_llama(1).double(), list(held))
    for row, (mean, std, q), true in zip(table, scored, held, strict=True):
        found = dict(zip(TABLE, row, strict=False))
        assert (found["mean"], found["std"]) == pytest.approx((mean.item(), std.item()), rel=1e-4)
        assert (found["target_mean"], found["target_std"]) == (
            true["score_mean"],
            true["score_std"],
        )
        assert row[len(TABLE) :] == pytest.approx(q.tolist(), rel=1e-4)


def test_constant_scores_leave_correlations_out(tmp_path):
    held = Dataset.from_list([{**row, "score_mean": 2.0} for row in score_rows(4)])
    scores = make(tmp_path, held_out=held).evaluate()
    assert "eval_plcc" not in scores and "eval_srcc" not in scores and scores["eval_mae"] > 0


def test_bf16_autocast_is_close(tmp_path):
    plain, narrow = make(tmp_path / "a"), make(tmp_path / "b", bf16=True)
    plain.train(), narrow.train()
    for one, other in zip(lines(plain), lines(narrow), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = make(tmp_path / "a"), make(tmp_path / "b", gradient_checkpointing=True)
    plain.train(), saving.train()
    assert_close(weights(saving), weights(plain), rtol=1e-5, atol=1e-6)


# what is refused
