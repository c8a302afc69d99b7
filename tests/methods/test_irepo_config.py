"""What `llmkd irepo` refuses before it reads data or weights, and how it makes paths absolute."""

import json
from pathlib import Path

import pytest
import yaml

from llmkd.errors import LlmkdError, RecipeError
from llmkd.methods.irepo import TYPES, check_recipe
from llmkd.methods.irepo_config import paths_inside, start_recipe, with_paths
from llmkd.methods.recipe import read_recipe

RULE = {"type": "rule", "function": "llmkd.annotators.examples:prose"}
START = {"kd_ratio": 0.0, "max_steps": 2, "model_config": {"model_type": "llama"}}
GOOD = {"output_dir": "run", "model_name_or_path": "org/policy", "annotators": [RULE]}
FILE = {**GOOD, "annotators": None, "preference_dataset": "pairs.jsonl"}


def read(tmp_path, settings, *flags):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    return read_recipe([str(path), *flags], TYPES)


def from_start(**changes):
    return {**GOOD, "model_name_or_path": None, "start": {**START, **changes}}


# settings; words of the error, in order
MISTAKES = {
    "no policy": (
        {**GOOD, "model_name_or_path": None},
        ["model_name_or_path: None: no policy is named", "start: {...}"],
    ),
    "two policies": (
        {**GOOD, "start": START},
        ["model_name_or_path: 'org/policy': and start exclude each other"],
    ),
    "start that is a list": (
        {**GOOD, "model_name_or_path": None, "start": [1]},
        ["start: [1]: must be a mapping"],
    ),
    "unknown key of start": (
        from_start(max_stepz=3),
        ["start.max_stepz: 3: start has no such key", "did you mean 'max_steps'?"],
    ),
    "value of start": (from_start(kd_ratio=2.0), ["start.kd_ratio: 2.0"]),
    "type of start": (from_start(max_steps="many"), ["start.max_steps: 'many'", "as int"]),
    "start without a model": (
        from_start(model_config=None),
        ["start.model_name_or_path: None: no student is named"],
    ),
    "folder of start": (
        from_start(output_dir="x"),
        ["start.output_dir: 'x': belongs to the run itself"],
    ),
    "push of start": (from_start(push_to_hub=True), ["start.push_to_hub: True: belongs to"]),
    "arms of start": (from_start(arms={"a": {}}), ["start.arms: {'a': {}}: belongs to"]),
    "nobody judges": (
        {**GOOD, "annotators": None},
        ["annotators: None: nobody says which", "type: rule", "preference_dataset: FILE"],
    ),
    "one response": (
        {**GOOD, "num_responses": 1},
        ["num_responses: 1: two responses are needed"],
    ),
    "iterations of a file": (
        {**FILE, "iterations": 2},
        ["iterations: 2: a preference file (pairs.jsonl) is regressed on once", "leave iterations"],
    ),
    "no iteration": ({**GOOD, "iterations": 0}, ["iterations: 0: must be at least 1"]),
    "no prompts": (
        {**GOOD, "prompts_per_iteration": 0},
        ["prompts_per_iteration: 0: must be at least 1"],
    ),
    "no held-out response": (
        {**GOOD, "held_out_responses": 0},
        ["held_out_responses: 0: must be at least 1"],
    ),
    "unknown pairs": (
        {**GOOD, "pairs": "best"},
        ["pairs: 'best': unknown", "best_worst, all, tournament"],
    ),
    "unknown dtype": ({**GOOD, "dtype": "float9"}, ["dtype: 'float9'", "float32"]),
    "unknown annotator": (
        {**GOOD, "annotators": [RULE, {"type": "rul"}]},
        ["annotators[1].type: 'rul': unknown", "did you mean 'rule'?"],
    ),
    "key of an annotator": (
        {**GOOD, "annotators": [{**RULE, "functoin": "x"}]},
        ["annotators[0].functoin: 'x'", "did you mean 'function'?"],
    ),
    "unknown held-out annotator": (
        {**GOOD, "held_out_annotators": [{"type": "rul"}]},
        ["held_out_annotators[0].type: 'rul': unknown"],
    ),
    "held-out annotator without its function": (
        {**GOOD, "held_out_annotators": [RULE, {"type": "rule"}]},
        ["held_out_annotators[1].function: None: a rule annotator needs it"],
    ),
    "unknown loss": ({**GOOD, "loss": "irepoo"}, ["loss", "irepoo", "irepo"]),
    "unknown reference": ({**GOOD, "reference": "last"}, ["reference: 'last': unknown"]),
    "flip rate": ({**GOOD, "annotator_flip_rate": 0.5}, ["annotator_flip_rate: 0.5"]),
    "greedy": ({**GOOD, "temperature": 0.0}, ["temperature: 0.0", "--num_responses 1"]),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_refused_by_its_key(tmp_path, what):
    settings, words = MISTAKES[what]
    with pytest.raises(LlmkdError) as caught:
        check_recipe(with_paths(read(tmp_path, settings)))
    error, at = str(caught.value), 0
    assert error.startswith(words[0].split(":")[0]), error
    for word in words:
        assert word in error[at:], error
        at = error.index(word, at)


def test_what_is_right_passes(tmp_path):
    for settings in (
        GOOD,
        FILE,
        {**FILE, "num_responses": 1},
        from_start(),
        {**GOOD, "held_out_annotators": [RULE]},
    ):
        check_recipe(with_paths(read(tmp_path, settings)))


def test_an_unknown_key_of_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"(?s)num_response: 3: .*did you mean 'num_responses'"):
        read(tmp_path, {**GOOD, "num_response": 3})


def test_annotators_on_the_command_line(tmp_path):
    wrong = json.dumps([{"type": "rul"}])
    with pytest.raises(RecipeError, match=r"annotators\[0\].type: 'rul'"):
        check_recipe(with_paths(read(tmp_path, GOOD, "--annotators", wrong)))
    check_recipe(with_paths(read(tmp_path, GOOD, "--annotators", json.dumps([RULE]))))


def test_start_gets_the_folder_it_is_told(tmp_path):
    policy = read(tmp_path, from_start()).build()[1]
    made = start_recipe(policy, "somewhere")
    assert made.settings["output_dir"] == "somewhere" and made.settings["max_steps"] == 2


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files named as a person in their folder names them."""
    monkeypatch.chdir(tmp_path)
    for name in ("rule.py", "p.jsonl", "text.jsonl", "rated.jsonl"):
        Path(name).write_text("")
    Path("judge").mkdir()
    start = {**START, "dataset": "text.jsonl", "tokenizer_name_or_path": "org/tokenizer"}
    return {
        **GOOD,
        "model_name_or_path": None,
        "start": start,
        "prompt_dataset": "p.jsonl",
        "annotators": [
            {"type": "rule", "function": "rule.py:score", "name": "judge"},
            {"type": "reward", "models": ["judge", "org/judge"]},
        ],
        "held_out_annotators": [{"type": "human", "file": "rated.jsonl"}, RULE],
    }


@pytest.mark.parametrize("by_flag", [False, True])
def test_local_paths_become_absolute_and_all_else_stays(tmp_path, files, by_flag):
    flags = []
    if by_flag:  # JSON on the command line
        for key in ("annotators", "held_out_annotators", "start"):
            flags += [f"--{key}", json.dumps(files.pop(key))]
    found = with_paths(read(tmp_path, files, *flags))
    for settings in (found.settings, found.given):  # what is computed with, and what is kept
        rule, reward = settings["annotators"]
        assert rule == {"type": "rule", "function": f"{tmp_path}/rule.py:score", "name": "judge"}
        assert reward["models"] == [f"{tmp_path}/judge", "org/judge"]
        human, installed = settings["held_out_annotators"]
        assert human["file"] == f"{tmp_path}/rated.jsonl" and installed == RULE
        assert settings["start"]["dataset"] == f"{tmp_path}/text.jsonl"
        assert settings["start"]["tokenizer_name_or_path"] == "org/tokenizer"
        assert settings["prompt_dataset"] == f"{tmp_path}/p.jsonl"
    assert "iterations" not in found.given


def test_paths_of_annotators_and_start_are_known(tmp_path, files):
    assert paths_inside(with_paths(read(tmp_path, files))) == {
        "annotators[0].function": f"{tmp_path}/rule.py",
        "annotators[1].models[0]": f"{tmp_path}/judge",
        "held_out_annotators[0].file": f"{tmp_path}/rated.jsonl",
        "start.dataset": f"{tmp_path}/text.jsonl",
    }


@pytest.mark.parametrize("order", [["judge", "rater"], ["rater", "judge"]])
def test_every_path_of_a_list_is_known(tmp_path, files, order):
    Path("rater").mkdir()
    files["annotators"] = [{"type": "reward", "models": order}]
    found = paths_inside(with_paths(read(tmp_path, files)))
    assert {f"{tmp_path}/judge", f"{tmp_path}/rater"} <= set(found.values())


def test_a_mixture_of_start_is_known_and_made_absolute(tmp_path, files):
    files["start"] = {**START, "dataset": "stdlib", "dataset_mixture": [{"id": "text.jsonl"}]}
    Path("stdlib").mkdir()  # the name of the built-in text, whatever lies here
    found = with_paths(read(tmp_path, files))
    start = found.settings["start"]
    assert start["dataset"] == "stdlib"
    assert start["dataset_mixture"] == [{"id": f"{tmp_path}/text.jsonl"}]
    known = paths_inside(found)
    assert known["start.dataset_mixture[0].id"] == f"{tmp_path}/text.jsonl"


def test_files_that_come_to_be_are_named_alike_before_and_after(tmp_path, files):
    server = {"type": "server", "url": "http://x", "model": "m", "cache_dir": "answers"}
    files["annotators"] = [{"type": "human", "file": "later.jsonl", "to_rate": "ask.jsonl"}, server]
    before = with_paths(read(tmp_path, files)).settings["annotators"]
    for name in ("later.jsonl", "ask.jsonl"):
        Path(name).write_text("")
    Path("answers").mkdir()
    assert with_paths(read(tmp_path, files)).settings["annotators"] == before
    assert before[0]["file"] == f"{tmp_path}/later.jsonl"
    assert before[1]["cache_dir"] == f"{tmp_path}/answers" and before[1]["url"] == "http://x"
