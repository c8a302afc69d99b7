"""Recipes: what is understood, and the one error for what is not."""

from importlib import import_module

import pytest
import yaml

from llmkd.cli import METHODS, main
from llmkd.errors import LlmkdError, MissingFileError, RecipeError
from llmkd.methods.recipe import method_of, read_recipe
from llmkd.methods.salt_config import TYPES, check_recipe, with_absolute_paths
from llmkd.shipped import accelerate_configs, shipped_recipes
from llmkd.trainers import SaltConfig


def write(tmp_path, **keys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **keys}))
    return str(path)


def test_file_then_flags(tmp_path):
    path = write(tmp_path, learning_rate="2e-3", kd_ratio=0.3, arms={"a": {}})
    for words in ([path, "--kd_ratio", "0.4"], ["--config", path, "--kd_ratio=0.4"]):
        recipe = read_recipe(words, TYPES)
        training = recipe.build()[TYPES.index(SaltConfig)]
        assert training.learning_rate == 2e-3 and training.kd_ratio == 0.4
        assert recipe.given["arms"] == {"a": {}} and "kd_weight" not in recipe.given


def test_env_block_as_in_trl(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMKD_PROBE", raising=False)
    read_recipe([write(tmp_path, env={"LLMKD_PROBE": 3})], TYPES)
    import os

    assert os.environ.pop("LLMKD_PROBE") == "3"


BAD = {
    "unknown key": ({"kd_ration": 0.2}, [], r"kd_ration: 0.2.*did you mean 'kd_ratio'"),
    "unknown flag": ({}, ["--kd_ration", "0.2"], r"--kd_ration.*did you mean 'kd_ratio'"),
    "stray word": ({}, ["--kd_ratio", "0.2", "0.3"], "'0.3' stands where no value"),
    "a word for a number": ({"max_steps": "many"}, [], "max_steps: 'many': cannot be read as int"),
    "a list for a number": ({"max_steps": [3]}, [], r"max_steps: \[3\]: must be a number"),
    "true for a number": ({"kd_ratio": True}, [], "kd_ratio: True: must be float"),
    "a word for true": ({"packing": "maybe"}, [], "packing: 'maybe'"),
    "a flag's bad number": ({}, ["--max_steps", "x"], "invalid int value: 'x'"),
    "out of range": ({"kd_ratio": 1.5}, [], r"kd_ratio: 1.5: must lie in \[0, 1\]"),
    "no student": ({}, [], "no student is named"),
    "two students": (
        {"model_config": {"model_type": "llama"}, "model_name_or_path": "x"},
        [],
        "exclude each other",
    ),
    "two teachers": (
        {"teacher_model_config": {"model_type": "llama"}, "teacher_model_name_or_path": "x"},
        [],
        "exclude each other",
    ),
    "no teacher": ({"model_name_or_path": "x"}, [], "kd_weight 0.667 need a teacher"),
    "bad JSON": ({}, ["--model_config", "{model"], "model_config: '{model': is not JSON"),
    "arm key": (
        {"model_name_or_path": "x", "arms": {"a": {"kd_ration": 1}}},
        [],
        r"arms.a.kd_ration.*'kd_ratio'",
    ),
    "arm name": (
        {"model_name_or_path": "x", "arms": {"teacher": {}}},
        [],
        "cannot name a folder of the run",
    ),
    "stream without steps": (
        {"streaming": True, "model_name_or_path": "x", "kd_ratio": 0},
        [],
        "a stream has no length",
    ),
    "unknown selection": (
        {"selection": "salt-ds", "model_name_or_path": "x", "kd_ratio": 0},
        [],
        "did you mean 'salt_ds'",
    ),
    "hub without a name": (
        {"push_to_hub": True, "model_name_or_path": "x", "kd_ratio": 0},
        [],
        "hub_model_id",
    ),
    "remote code": ({"trust_remote_code": True}, [], "trust_remote_code: True"),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_name_key_value_and_way_out(tmp_path, what, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    keys, flags, words = BAD[what]
    path = write(tmp_path, **keys)
    with pytest.raises(LlmkdError, match=f"(?s){words}"):
        check_recipe(read_recipe([path, *flags], TYPES))
    assert main(["salt", path, *flags]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_recipe_names_where_it_looked(tmp_path):
    with pytest.raises(MissingFileError, match=r"recipe.*looked at /"):
        read_recipe(["recipes/salt/quikstart.yaml"], TYPES)


def test_a_file_that_is_no_mapping(tmp_path):
    path = tmp_path / "x.yaml"
    for text in ("- 1\n", "a: [\n"):
        path.write_text(text)
        with pytest.raises(RecipeError, match=r"mapping|YAML"):
            read_recipe([str(path)], TYPES)


def test_secrets_are_not_written_down(tmp_path):
    recipe = read_recipe([write(tmp_path), "--hub_token", "hf_secret123456"], TYPES)
    assert "hf_secret" not in yaml.safe_dump(recipe.public())
    from llmkd.methods.run_folder import result_settings

    assert "hf_secret" not in str(result_settings(recipe.settings))


def test_an_arm_cannot_carry_a_token(tmp_path, capsys):
    arms = {"a": {"hub_token": "hf_secret123456", "kd_ratio": 0}}
    path = write(tmp_path, model_name_or_path="x", arms=arms)
    assert main(["salt", path]) == 1
    error = capsys.readouterr().err
    assert "arms.a.hub_token" in error and "hf_secret" not in error


def test_negated_flags_are_written_down(tmp_path):
    assert read_recipe([write(tmp_path), "--no_packing"], TYPES).given["packing"] is False
    assert read_recipe([f"--config={write(tmp_path)}"], TYPES).given["output_dir"]


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    recipe = with_absolute_paths(read_recipe([write(tmp_path, dataset="rows.jsonl")], TYPES))
    assert recipe.given["dataset"] == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_pass_their_checks(path):
    methods = {verb: import_module(name) for verb, name in METHODS.items()}
    verb = method_of([str(path)], {name: method.TYPES for name, method in methods.items()})
    assert verb.replace("-", "_") in path.parts
    words = [str(path), "--use_cpu", "true", "--bf16", "false"]
    methods[verb].check_recipe(read_recipe(words, methods[verb].TYPES))


def test_every_config_but_fsdp_has_a_cpu_counterpart():
    names = set(accelerate_configs())
    wanted = {"single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"}
    # on CPUs accelerate runs DDP under the name of FSDP
    assert wanted | {f"cpu/{name}" for name in wanted} | {"fsdp"} == names
    for name, path in accelerate_configs().items():
        config = yaml.safe_load(path.read_text())
        assert config["use_cpu"] is name.startswith("cpu/")


@pytest.mark.parametrize("verb", ["salt", "score", "select", "resume", "eval", "report", "push"])
def test_help_works_everywhere(verb, capsys):
    try:
        assert main([verb, "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    text = capsys.readouterr().out
    assert "usage" in text and len(text) > 150
    if verb == "salt":
        assert "--kd_ratio [0.173]" in text and "--adam_beta1" not in text


def test_help_all_adds_upstreams_keys(capsys):
    assert main(["salt", "--help_all"]) == 0
    assert "--adam_beta1" in capsys.readouterr().out


def test_overview_and_wrong_verbs(capsys):
    assert main(["--help"]) == 0 and main(["--version"]) == 0
    assert main(["sallt"]) == 2
    assert "did you mean 'salt'" in capsys.readouterr().err


def test_unknown_accelerate_config_lists_the_known(capsys, tmp_path):
    assert main(["salt", write(tmp_path), "--accelerate_config", "zero4"]) == 1
    assert "did you mean 'zero3'" in capsys.readouterr().err
