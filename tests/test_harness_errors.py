"""Bad input to `llmkd eval`: one error, before any weights are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness_kit import Kit

from llmkd.errors import LlmkdError, MissingExtraError, MissingFileError, RecipeError
from llmkd.evaluation.harness import run_tasks
from llmkd.files import write_json


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    return Kit(tmp_path, monkeypatch)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("llmkd.evaluation.harness_model.ModelSource.load", refuse)


def break_task(folder: Path, old: str, new: str) -> None:
    path = folder / "choice.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "spoil, error, words",
    [
        (lambda f: (f / "questions.jsonl").unlink(), MissingFileError, "questions.jsonl.*looked"),
        (lambda f: break_task(f, "doc_to_choice: choices", "doc_to_choice: option"), RecipeError,
         "tiny_choice.*cannot build"),
        (lambda f: (f / "questions.jsonl").write_text(""), RecipeError, "tiny_choice"),
        (lambda f: (f / "choice.yaml").write_text("task: [unclosed"), RecipeError, "not YAML"),
        (lambda f: (f / "choice.yaml").write_text("output_type: x"), RecipeError, "no `task:`"),
        (lambda f: (f / "choice.yaml").unlink(), MissingFileError, "no such file"),
        (lambda f: break_task(f, "task: tiny", "unsafe_code: true\ntask: tiny"), RecipeError,
         "generated code"),
    ],
)  # fmt: skip
def test_bad_task_files(kit: Kit, spoil: Callable, error: type, words: str) -> None:
    spoil(kit.tasks)
    with pytest.raises(error, match=f"(?s){words}"):
        run_tasks(kit.model("one"), [kit.choice])


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"limit": 0}, "limit: 0"),
        ({"limit": -3}, "limit: -3"),
        ({"limit": 1.5}, "limit: 1.5"),
        ({"num_fewshot": -1}, "num_fewshot: -1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": "many"}, "batch_size: 'many'"),
        ({"dtype": "int8"}, "dtype: 'int8'.*bfloat16"),
        ({"device": "toaster"}, "device: 'toaster'"),
        ({"device": "cuda:99"}, "cuda:99.*--device cpu"),
        ({"fewshot_as_multiturn": True}, "chat template"),
        ({"apply_chat_template": True}, "has no chat template"),
        ({"include_path": [Path("nowhere")]}, "include_path: 'nowhere'"),
        ({"tasks": []}, "tasks.*is empty"),
        ({"tasks": ["heldout_bpb"]}, r"held_out\.jsonl.*run folder"),
    ],
)
def test_bad_settings(kit: Kit, settings: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"tasks": [str(kit.tasks)]} | settings
    with pytest.raises(LlmkdError, match=f"(?s){words}"):
        run_tasks(kit.model("one"), **arguments)


@pytest.mark.usefixtures("no_weights")
def test_bad_models(kit: Kit) -> None:
    tasks = [str(kit.tasks)]
    (kit.folder / "empty").mkdir()
    (kit.folder / "runs").mkdir()
    good = kit.model("good")
    write_json(kit.folder / "runs" / "run.json", {"arms": ["salt", "rkd"]})
    for model, error, words in [
        (kit.folder / "nothing", MissingFileError, "no such folder"),
        (str(kit.folder / "nothing"), MissingFileError, "no such folder"),
        (good / "config.json", RecipeError, "is a file"),
        (kit.folder / "empty", RecipeError, r"neither config\.json"),
        (kit.folder / "runs", RecipeError, "give one: salt, rkd"),
    ]:
        with pytest.raises(error, match=words):
            run_tasks(model, tasks)
    with pytest.raises(LlmkdError, match="Hub"):
        run_tasks("some-owner/some-model", tasks)

    adapter = kit.folder / "adapter"
    write_json(
        adapter / "adapter_config.json", {"base_model_name_or_path": str(kit.folder / "gone")}
    )
    with pytest.raises(MissingFileError, match="base_model_name_or_path"):
        run_tasks(adapter, tasks)

    # code in a model folder is refused, not run
    (good / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}})
    )
    (good / "code.py").write_text(f"open({str(kit.folder / 'ran')!r}, 'w')\n")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        run_tasks(good, tasks)
    assert not (kit.folder / "ran").exists()

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (good / name).unlink()
    with pytest.raises(RecipeError, match="no tokenizer"):
        run_tasks(good, tasks)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, kit: Kit) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llmkd\[eval\]'"):
        run_tasks(kit.model("one"), ["heldout_bpb"])


@pytest.mark.slow  # lm_eval's own index takes 10 s
@pytest.mark.usefixtures("no_weights")
def test_unknown_task_names_the_nearest(kit: Kit) -> None:
    with pytest.raises(RecipeError, match=r"(?s)arc_esy.*did you mean.*arc_easy"):
        run_tasks(kit.model("one"), ["arc_esy"])
    with pytest.raises(RecipeError, match=r"(?s)did you mean.*tiny_choice"):
        run_tasks(kit.model("one"), ["tiny_choise"], include_path=[kit.tasks])
