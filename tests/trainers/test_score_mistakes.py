"""What `ScoreTrainer` refuses, before the first step or at it."""

import pytest
from conftest import VOCAB, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from score_trainer_kit import LEVELS, score_args, score_rows
from test_score_trainer import SINGLE, make

from llmkd.data.levels import Levels
from llmkd.errors import DataError, NonFiniteError, RecipeError
from llmkd.trainers.score import ScoreTrainer


def broken(**changes):
    rows = [dict(row) for row in score_rows(6)]
    rows[4] |= changes
    return Dataset.from_list(rows)


@pytest.mark.parametrize("key", ["rows", "held_out"])
@pytest.mark.parametrize(
    "rows, words",
    [
        (broken(score_mean=float("nan")), "score_mean = nan.*row 4"),
        (broken(score_mean=None), "score_mean = nan.*row 4"),
        (broken(score_std=-0.5), "score_std = -0.5.*row 4.*>= 0"),
        (broken(score_std=float("inf")), "score_std = inf.*row 4"),
        (broken(target=[0.5, 0.5]), "target of 2 numbers.*row 4: there are 3 levels"),
        (broken(target=[1.5, -0.5, 0.0]), "target = .*row 4: must be >= 0"),
        (broken(target=[0.0, 0.0, 0.0]), "row 4: must be >= 0, finite, and not all 0"),
        (broken(target=[float("nan"), 0.0, 1.0]), "target = .*row 4: must be >= 0"),
        (broken(level_at=0), "level_at = 0.*row 4"),
        (broken(level_at=99), "level_at = 99.*row 4"),
        (broken(input_ids=[7] * 9, labels=[7] * 9, level_at=3), "level_at = 3.*row 4: id 7 stands"),
        (broken(labels=[-100]), "row 4 has .* ids and 1 labels"),
        (broken(input_ids=[], labels=[]), "row 4 has 0 ids"),
        (broken(input_ids=[VOCAB], labels=[1]), f"holds id {VOCAB}.*row 4.*has {VOCAB} entries"),
        (broken(input_ids=[1] * 70, labels=[1] * 70), "70 tokens.*row 4 is longer than 64"),
        (score_rows(6).remove_columns("target"), "target.*no such column"),
        (score_rows(6).select([]), "no row to train on"),
    ],
)  # fmt: skip
def test_broken_rows_stop_before_anything(tmp_path, rows, words, key):
    name = "train_dataset" if key == "rows" else "eval_dataset"
    sets = {"train_dataset": score_rows(), name: rows}
    with pytest.raises(DataError, match=f"(?s){name}: .*({words})"):
        ScoreTrainer(tiny_llama(1), score_args(tmp_path), levels=LEVELS, **sets)


def test_pairs_that_can_never_be_drawn_are_refused(tmp_path):
    alone = Dataset.from_list([{**row, "group_id": row["row"]} for row in score_rows(6)])
    with pytest.raises(DataError, match="no pair can be drawn: 6 of 6 rows are alone"):
        make(tmp_path, rows=alone)
    make(tmp_path, rows=alone, **SINGLE).train()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fidelity_weight": -1.0}, "fidelity_weight: -1.0"),
        ({"level_weight": float("nan")}, "level_weight: nan"),
        ({"fidelity_weight": 0.0, "level_weight": 0.0}, "all weights are 0"),
        ({"kl_over": "open"}, "kl_over: 'open'.*full, closed"),
        ({"std_mode": "fixed"}, "std_mode: 'fixed'.*did you mean 'fixed1'"),
        ({"pair_loss": "bce"}, "pair_loss: 'bce'"),
        ({"pair_loss": "binary", "std_mode": "pred"}, "std_mode: 'pred': pair_loss binary knows"),
        ({"per_device_train_batch_size": 1}, "no pair in one row"),
        ({"head_memory_mib": 0}, "head_memory_mib: 0"),
        ({"save_total_limit": 1}, "save_total_limit"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, words):
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        score_args(tmp_path, **settings)


def test_levels_of_another_model_are_refused(tmp_path):
    far = Levels(("good", "bad"), (2.0, 1.0), (1, VOCAB), "it is")
    with pytest.raises(RecipeError, match=f"levels: .*has {VOCAB} entries"):
        make(tmp_path, levels=far)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(RecipeError, match="cannot train LoRA on the output head"):
        make(tmp_path, model=tiny_llama(1, tied=False), peft_config=lora)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    model = tiny_llama(1)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1 .*rows \[0, 1, 2, 3\]"):
        make(tmp_path, model=model).train()
