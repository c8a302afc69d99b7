"""What an ERNIE-Tiny recipe may not say: one error, with no data read and nothing written."""

import json
import math

import pytest
import yaml

from llmkd.cli import main
from llmkd.errors import RecipeError
from llmkd.methods.ernie_config import PATH_KEYS, TYPES, check_recipe
from llmkd.methods.recipe import read_recipe, with_absolute_paths
from llmkd.methods.run_folder import result_settings
from llmkd.objectives.layer_map import layer_map


def write(tmp_path, more=(), **keys):
    path = tmp_path / "recipe.yaml"
    keys = {
        "output_dir": str(tmp_path / "run"),
        "teacher_model_name_or_path": "x",
        **keys,
        **dict(more),
    }
    path.write_text(yaml.safe_dump({"task_dataset": "t.jsonl", "use_cpu": True, **keys}))
    return str(path)


def gd(**settings):
    return {"stage_settings": {"gd": settings}}


# what: (keys, words of the error in order)
BAD = {
    "projection": ({"projection": "foo"}, ["projection: 'foo'", "known: shared, per_layer, none"]),
    "projection of a stage": (gd(projection="foo"), ["stage gd: projection: 'foo'"]),
    "no layer map": ({"layer_map": None}, ["layer_map: None: unknown", "known: uniform, last"]),
    "layer map of a stage": (gd(layer_map="first"), ["stage gd: layer_map: 'first': unknown"]),
    "teacher of an arm": (
        {"arms": {"a": {"stage_settings": {"teacher": {"max_steps": 5}}}}},
        ["arms.a.stage_settings.teacher: {'max_steps': 5}", "one for all arms"],
    ),
    "infinite weight": (
        {"attn_weight": math.inf},
        ["attn_weight: inf: must be at least 0, and finite"],
    ),
    "no number": ({"hidden_weight": math.nan}, ["hidden_weight: nan"]),
    "latent weights of 0": (
        gd(attn_weight=0.0, hidden_weight=0.0),
        ["stage gd: attn_weight: 0.0: and hidden true, hidden_weight 0.0 leave no latent loss"],
    ),
    "weight of the part that is off": (
        gd(attn="none", hidden_weight=0.0),
        ["stage gd: attn_weight", "leave no latent loss"],
    ),
    "no loss": (
        {"stages": [{"stage": "finetune", "hard_weight": 0}]},
        ["stage finetune: hard_weight: 0.0: leaves the stage without a loss (hard)"],
    ),
    "a teacher trained without a loss": (
        {"hard_weight": 0},
        ["stage teacher: hard_weight: 0.0: leaves the stage without a loss"],
    ),
    "label smoothing": (
        {"label_smoothing_factor": 0.1},
        ["label_smoothing_factor: 0.1: no loss here reads it"],
    ),
    "noise": ({"neftune_noise_alpha": 5}, ["neftune_noise_alpha: 5.0: no loss here reads it"]),
    "batch of none": (
        {"per_device_eval_batch_size": 0},
        ["per_device_eval_batch_size: 0: must be at least 1"],
    ),
    "seed": ({"seed": -1}, ["seed: -1: must lie in 0..4,294,967,295"]),
    "seed of an arm": ({"arms": {"a": {"seed": -20000}}}, ["seed: -20000: must lie in"]),
    "nothing to train": (
        gd(max_steps=0, num_train_epochs=0),
        ["stage gd: num_train_epochs: 0", "max_steps 0 leave nothing to train"],
    ),
    "settings of the fine-tuning": (
        {"stage_settings": {"teacher": {"per_device_train_batch_size": 0}}},
        ["stage teacher: per_device_train_batch_size: 0: must be at least 1"],
    ),
    "fine-tuning that no arm's settings speak of": (
        {
            "stage_settings": {"teacher": {"lr_scheduler_type": "linaer"}},
            "arms": {"a": {"stage_settings": {}}},
        },
        ["stage teacher", "linaer"],
    ),
    "a word for a number": (
        gd(max_steps="many"),
        ["stage_settings.gd.max_steps: 'many': cannot be read as int"],
    ),
    "null for a number": (
        gd(learning_rate=None),
        ["stage_settings.gd.learning_rate: None: must be a number", "leave it out"],
    ),
    "null at the top": ({"max_steps": None}, ["max_steps: None: must be a number"]),
    "null for true": ({"hidden": None}, ["hidden: None: must be true or false"]),
    "list for true": (gd(hidden=[1]), ["gd.hidden: [1]: must be true or false, not a list"]),
    "number of an arm's stage": (
        {"arms": {"a": {"stages": [{"stage": "tad", "name": "t", "max_steps": "x"}]}}},
        ["arms.a.stages.t.max_steps: 'x': cannot be read as int"],
    ),
    "number that may be null": (
        {"arms": {"a": {"student_layers": "four"}}},
        ["arms.a.student_layers: 'four': cannot be read as int"],
    ),
    "losses in losses": (
        {"stages": [{"stage": "gd", "losses": [["latent"]]}]},
        ["stages.gd.losses: [['latent']]", "of latent, soft, hard"],
    ),
    "arm without letters": ({"arms": {5: {}}}, ["arms.5: {}", "in quotes: '5'"]),
    "key without letters": ({5: 1}, ["5: 1:", "has no such key"]),
    "key of an arm without letters": ({"arms": {"a": {5: 1}}}, ["arms.a.5: 1: no such key"]),
    "stage without letters": ({"stage_settings": {5: {}}}, ["stage_settings.5", "no such stage"]),
    "teacher of nothing": (
        {"teachers": [{"model_name_or_path": None}]},
        ["teachers", "model_name_or_path must be a folder or a Hub id"],
    ),
    "dtype of a teacher": (
        {"teachers": [{"model_name_or_path": "x", "dtype": "flaot32"}]},
        ["'flaot32'", "known: auto, float32"],
    ),
    "dtype of one teacher": (
        {"teachers": [{"model_name_or_path": "x", "dtype": "float32"}]},
        ["teachers[0].dtype: 'float32'", "--teacher_dtype"],
    ),
    "dtype": ({"teacher_dtype": "int8"}, ["teacher_dtype: 'int8': no such dtype"]),
    "no folder": ({"output_dir": None}, ["output_dir: None: names no folder"]),
    "folder of no name": ({"output_dir": ""}, ["output_dir: '': names no folder"]),
    "floor above all": ({"teacher_floor": 1.5}, ["teacher_floor: 1.5", "at most 1"]),
    "floor that is none": ({"teacher_floor": math.nan}, ["teacher_floor: nan"]),
    "floor below all": ({"teacher_floor": -math.inf}, ["teacher_floor: -inf"]),
}


@pytest.mark.parametrize("what", BAD)
def test_refused_by_the_recipe_alone(tmp_path, capsys, what):
    keys, words = BAD[what]
    path = write(tmp_path, keys)
    assert main(["ernie-tiny", path]) == 1
    error, at = capsys.readouterr().err, 0
    assert error.count("llmkd ernie-tiny: ") == 1
    for word in words:
        assert word in error[at:], error
        at = error.index(word, at)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_weights_of_0_that_nobody_trains_by_are_fine(tmp_path):
    given = {"finetuned_teacher_name_or_path": "y", "hard_weight": 0, "attn_weight": 0.0}
    check_recipe(read_recipe([write(tmp_path, **given)], TYPES))
    check_recipe(read_recipe([write(tmp_path, teacher_floor=-0.5, stages=["gd"])], TYPES))


def nested(value):
    return {
        "stage_settings": {"gd": value},
        "arms": {"a": {**value, "stages": [{"stage": "gd", **value}]}},
        "stages": [{"stage": "gd", **value}],
    }


@pytest.mark.parametrize("flags", [False, True])
def test_values_inside_are_typed_as_those_at_the_top(tmp_path, flags):
    # PyYAML reads 1e-3 as text
    keys = nested({"learning_rate": "1e-3", "hidden": "false", "max_steps": "7"})
    words = [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value))]
    argv = [write(tmp_path), *words] if flags else [write(tmp_path, **keys)]
    recipe = read_recipe(argv, TYPES)
    expected = {"learning_rate": 0.001, "hidden": False, "max_steps": 7}
    assert {key: recipe.settings[key] for key in keys} == nested(expected)
    assert {key: recipe.given[key] for key in keys} == nested(expected)


def test_what_has_its_type_stays_as_it_was_written(tmp_path):
    # keys of stages are hashes of it: 3 must not become 3.0, nor JSON a list
    recipe = read_recipe([write(tmp_path, **gd(num_train_epochs=3, warmup_steps=0))], TYPES)
    assert json.dumps(recipe.settings["stage_settings"]) == (
        '{"gd": {"num_train_epochs": 3, "warmup_steps": 0}}'
    )
    given = '[{"stage": "gd", "max_steps": 2}]'
    assert read_recipe([write(tmp_path), "--stages", given], TYPES).settings["stages"] == given
    assert read_recipe([write(tmp_path, stages="gd, tad")], TYPES).settings["stages"] == "gd, tad"


def test_general_stages_is_absolute_before_it_is_there_and_no_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe([write(tmp_path, general_stages="shared/gd", teacher_floor=0)], TYPES)
    recipe = with_absolute_paths(recipe, PATH_KEYS)
    assert recipe.settings["general_stages"] == str(tmp_path / "shared" / "gd")
    assert recipe.given["general_stages"] == str(tmp_path / "shared" / "gd")
    assert not {"general_stages", "teacher_floor"} & set(result_settings(recipe.settings))
    plain = with_absolute_paths(read_recipe([write(tmp_path)], TYPES), PATH_KEYS)
    assert plain.settings["general_stages"] is None


@pytest.mark.parametrize("how", [None, 3, {"a": 1}])
def test_a_layer_map_of_another_type(how):
    with pytest.raises(RecipeError, match=r"layer_map: .*: unknown"):
        layer_map(2, 4, how)
