"""Stages: what the names mean, which settings a stage has, and which stages are the same."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkd.errors import RecipeError
from llmkd.methods.ernie_config import TYPES, ErnieTinyConfig
from llmkd.methods.ernie_stage import DistillStage, Start
from llmkd.methods.ernie_stages import PRESETS, StageSpec, read_stages
from llmkd.methods.recipe import Recipe, read_recipe


def recipe(**settings) -> Recipe:
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return read_recipe(["--output_dir", "/nowhere", "--use_cpu", "true", *flags], TYPES)


def test_the_four_stages_change_one_thing_at_a_time():
    table = [PRESETS[name] for name in ("gd", "ged", "tad", "tsd")]
    assert table == [
        ("pretrained", "general", ("latent",)),
        ("finetuned", "general", ("latent",)),
        ("finetuned", "task", ("latent",)),
        ("finetuned", "task", ("latent", "soft", "hard")),
    ]


def test_names_are_unique_and_settings_go_from_the_kind_to_the_name():
    settings = {
        "gd": {"max_steps": 1, "learning_rate": 0.1, "weight_decay": 0.5},
        "again": {"learning_rate": 0.2},
        "gd-2": {"max_steps": 7},
    }
    stages = [
        "gd",
        {"stage": "GD", "name": "again", "weight_decay": 0.0},
        "gd",
        {"stage": "gd", "name": "gd-3"},
        "gd",
    ]
    specs = read_stages(stages, settings)
    assert [spec.name for spec in specs] == ["gd", "again", "gd-2", "gd-3", "gd-4"]
    found = [dict(spec.settings) for spec in specs]
    assert found[0] == settings["gd"] == found[3] == found[4]
    assert found[1] == {"max_steps": 1, "learning_rate": 0.2, "weight_decay": 0.0}
    assert found[2] == {"max_steps": 7, "learning_rate": 0.1, "weight_decay": 0.5}


def test_a_stage_may_have_other_parts():
    entry = {"stage": "tsd", "losses": ["hard", "soft"], "teacher": "shuffled", "data": "task"}
    (spec,) = read_stages([entry], {})
    assert (spec.name, spec.teacher, spec.data) == ("tsd", "shuffled", "task")
    assert spec.losses == ("soft", "hard") and spec.predicts
    assert not read_stages(["tad"], {})[0].predicts


def test_stages_come_as_yaml_names_or_json():
    for given in ("gd,tad", ["gd", "tad"], '["gd", {"stage": "tad"}]', "gd, TAD"):
        specs = ErnieTinyConfig(stages=given).specs()
        assert [spec.name for spec in specs] == ["gd", "tad"]


def test_settings_may_speak_of_another_arms_stage():
    arms = {"a": {"stages": [{"stage": "tsd", "name": "last"}]}, "b": {"stages": "gd,gd"}}
    settings = {"last": {"max_steps": 3}, "gd-2": {"max_steps": 4}}
    for changes in arms.values():
        config = ErnieTinyConfig(arms=arms, stage_settings=settings, **changes)
        found = {spec.name: dict(spec.settings) for spec in config.specs()}
        assert found in (
            {"last": {"max_steps": 3}},
            {"gd": {}, "gd-2": {"max_steps": 4}},
        )
    with pytest.raises(RecipeError, match=r"stage_settings\.lost: .*no such stage"):
        ErnieTinyConfig(arms=arms, stage_settings={"lost": {}}).specs()


def test_the_seed_goes_by_the_name_and_the_recipe():
    def seed(name, **settings):
        return StageSpec(name, "none", "task", ("hard",)).args(recipe(**settings), "x").seed

    assert seed("tad") == seed("tad") != seed("tsd")
    assert seed("tad", seed=3) - seed("tad", seed=1) == 2


def test_training_arguments_of_a_stage():
    given = recipe(learning_rate=0.1, max_steps=5, hub_token="secret", push_to_hub=False)
    spec = StageSpec("gd", "pretrained", "general", ("latent",), {"max_steps": 2, "attn": "none"})
    args = spec.args(given, "/there")
    assert (args.max_steps, args.learning_rate, args.attn) == (2, 0.1, "none")
    assert args.output_dir == "/there" and not args.push_to_hub
    wrong = StageSpec("gd", "pretrained", "general", ("latent",), {"attn": "mse"})
    with pytest.raises(RecipeError, match="stage gd: attn: 'mse': unknown"):
        wrong.args(given, "x")


def fake_plan(**facts):
    """What a stage's key asks of a plan."""
    rows = SimpleNamespace(train=[], held_out=[], fingerprint="general-1")
    task = SimpleNamespace(
        train=[],
        held_out=[],
        fingerprint="task-1",
        kind="single_label",
        taught_fingerprint="task-1-more",
    )
    plan = {
        "general_rows": rows,
        "task_rows": task,
        "kind": "single_label",
        "folder": Path("/run"),
        "general_folder": Path("/shared"),
        "main": True,
        "config": SimpleNamespace(teacher_dtype="auto"),
    }
    return SimpleNamespace(**{**plan, **facts})


TEACHER = {"fingerprint": "teacher-1"}


def stage(name="gd", *, plan=None, start="s", role=TEACHER, soft=(), rows=None, entry=None, **keys):
    (spec,) = read_stages([entry or name], {})
    begin = Start(start, lambda: None)
    return DistillStage(
        spec, recipe(**keys), plan or fake_plan(), begin, role, list(soft), rows=rows
    )


def test_equal_stages_share_a_folder():
    first = stage()
    assert first.folder == Path(f"/shared/gd-{first.key}") and first.general
    same = {"soft": "mse", "hard_weight": 3.0, "logging_steps": 7, "eval_steps": 9, "save_steps": 2}
    same |= {"task_max_length": 7, "run_name": "x", "report_to": "none", "nkd_gamma": 2.0}
    for key, value in same.items():
        assert stage(**({"soft_": value} if key == "x" else settings(key, value))).key == first.key
    assert stage(entry={"stage": "gd", "name": "other"}).key != first.key  # another seed


def settings(key, value):
    """A recipe key whose name a parameter of `stage` has."""
    return {"entry": {"stage": "gd", key: value}} if key == "soft" else {key: value}


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "other"},
        {"role": {"fingerprint": "teacher-2"}},
        {"role": None},
        {"seed": 3},
        {"learning_rate": 0.1},
        {"max_steps": 3},
        {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 2},
        {"attn": "none"},
        {"layer_map": "last"},
        {"bf16": True},
        {"plan": fake_plan(config=SimpleNamespace(teacher_dtype="bfloat16"))},
        {"plan": fake_plan(general_rows=SimpleNamespace(fingerprint="general-2"))},
    ],
)
def test_what_makes_another_stage(changes):
    assert stage(**changes).key != stage().key


def test_the_soft_labels_are_part_of_a_stage_that_reads_them():
    source = [{"fingerprint": "store-1"}]
    assert stage("tsd", soft=source).key != stage("tsd").key
    assert stage("tad", soft=source).key == stage("tad").key
    changed = {"stage": "tsd", "soft_temperature": 2.0}
    assert stage(entry=changed).key != stage("tsd").key


def test_only_stages_without_a_task_are_general():
    assert stage("gd").general and stage("gd", role=TEACHER).folder.parent == Path("/shared")
    for name in ("ged", "tad", "tsd", "finetune"):
        found = stage(name)
        assert not found.general and found.folder.parent == Path("/run/stages")
    after = DistillStage(
        read_stages(["gd"], {})[0],
        recipe(),
        fake_plan(),
        Start("s", lambda: None, general=False),
        TEACHER,
    )
    assert not after.general  # general text, but a student that knows a task
    assert stage("gd").end().general and not stage("tad").end().general


def test_rows_of_a_stage():
    assert stage("gd").data_fingerprint() == "general-1"
    assert stage("tad").data_fingerprint() == "task-1"
    assert stage("finetune", rows=[]).data_fingerprint() == "task-1-permuted"


def test_the_head_of_the_model_that_comes_out():
    assert stage("tad").head == "none" and stage("tsd").head == "sequence"
    assert stage("finetune", plan=fake_plan(kind="token")).head == "token"
