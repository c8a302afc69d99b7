"""`llmkd salt` from text to report: run, run again, go on, refuse."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkd.cli import main
from llmkd.files import read_json

LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"tie_word_embeddings": True, "max_position_embeddings": 32}
SMALL = {**LLAMA, "hidden_size": 8, "intermediate_size": 16}
LARGE = {**LLAMA, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
ARMS = {
    "baseline": {"kd_ratio": 0.0},
    "rkd": {"kd_ratio": 1.0},
    "salt": {},
    "salt_ds": {"selection": "salt_ds"},
}


def recipe(folder: Path, **changes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "rows.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(80)))
    keys = {
        "output_dir": str(folder / "run"),
        "dataset": str(text),
        "tokenizer_vocab_size": 280,
        "max_length": 32,
        "teacher_model_config": SMALL,
        "model_config": LARGE,
        "arms": ARMS,
        "kd_ratio": 0.5,
        "teacher_temperature": 1.0,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
    return str(path)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_whole_run_then_again_then_with_one_more_arm(tmp_path, capsys):
    path, run = recipe(tmp_path), tmp_path / "run"
    assert main(["salt", path]) == 0
    table = capsys.readouterr().out
    assert "nats/token" in table and "salt_ds" in table
    for name in (*ARMS, "teacher"):
        folder = run / name
        facts = read_json(folder / "run.json")
        assert facts["status"] == "done" and facts["name"] == name
        assert facts["tokens"] > 0 and facts["peak_memory_bytes"] > 0
        assert {"torch", "transformers", "llmkd"} <= set(facts["versions"])
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
        scores = read_json(folder / "eval.json")["held_out"]
        assert 0 < scores["loss"] < math.log(400) and 0 <= scores["accuracy"] <= 1
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["output_dir"] == str(folder)
        tokenizer, model = AutoTokenizer.from_pretrained(folder), weights(folder)
        assert model["model.embed_tokens.weight"].shape[0] == len(tokenizer)
        assert not list(folder.rglob("*.bin"))
    report = (run / "report.html").read_text()
    assert "data:image/png;base64," in report and "http://" not in report and 'src="h' not in report
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "teacher" / "early" / "model.safetensors").is_file()
    assert set(read_json(run / "eval.json")["arms"]) == set(ARMS)
    assert len((run / "held_out.jsonl").read_text().splitlines()) == 4

    before = weights(run / "salt")
    stamp = (run / "salt" / "model.safetensors").stat().st_mtime_ns
    assert main(["salt", path]) == 0
    said = capsys.readouterr().out
    assert said.count("reused") >= 7  # tokenizer, two halves of the text, teacher, four arms
    assert (run / "salt" / "model.safetensors").stat().st_mtime_ns == stamp

    more = recipe(tmp_path, arms={**ARMS, "linear": {"transition": "linear"}})
    assert main(["salt", more]) == 0
    assert read_json(run / "linear" / "run.json")["schedule"]["transition"] == "linear"
    assert same(weights(run / "salt"), before)


def test_another_recipe_is_refused_and_says_what_differs(tmp_path, capsys):
    arms = {"baseline": {"kd_ratio": 0.0}}
    assert main(["salt", recipe(tmp_path, arms=arms, max_steps=2)]) == 0
    kept = weights(tmp_path / "run" / "baseline")
    other = recipe(tmp_path, arms=arms, max_steps=2, learning_rate=0.02)
    assert main(["salt", other]) == 1
    error = capsys.readouterr().err
    assert "learning_rate: 0.01 -> 0.02" in error and "--overwrite_run" in error
    assert same(weights(tmp_path / "run" / "baseline"), kept)
    assert main(["salt", other, "--overwrite_run", "true"]) == 0
    assert not same(weights(tmp_path / "run" / "baseline"), kept)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_changed_text_is_another_run(tmp_path, capsys):
    arms = {"baseline": {"kd_ratio": 0.0}}
    path = recipe(tmp_path, arms=arms, max_steps=2)
    assert main(["salt", path]) == 0
    before = contents(tmp_path / "run")
    (tmp_path / "rows.jsonl").touch()
    assert main(["salt", path]) == 0  # touched, not changed
    assert weights(tmp_path / "run" / "baseline")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in sentences(80, seed=4))
    )
    before = contents(tmp_path / "run")
    assert main(["salt", path]) == 1
    error = capsys.readouterr().err
    was = read_json(tmp_path / "run" / "baseline" / "run.json")["data"]["fingerprint"]
    assert f"rows (text, tokenizer and packing): '{was}' -> '" in error
    assert contents(tmp_path / "run") == before
    assert main(["salt", path, "--overwrite_run", "true"]) == 0  # the way out it names
    assert contents(tmp_path / "run")["held_out.jsonl"] != before["held_out.jsonl"]


def test_overwriting_waits_until_the_new_input_is_checked(tmp_path, capsys):
    arms = {"baseline": {"kd_ratio": 0.0}}
    assert main(["salt", recipe(tmp_path, arms=arms, max_steps=2)]) == 0
    before = contents(tmp_path / "run")
    other = recipe(tmp_path, arms=arms, max_steps=2, learning_rate=0.02, max_length=64)
    assert main(["salt", other, "--overwrite_run", "true"]) == 1
    assert "longer than the window" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_changed_arm_is_refused_before_anything_trains(tmp_path, capsys):
    arms = {"salt": {}}
    assert main(["salt", recipe(tmp_path, arms=arms, max_steps=2)]) == 0
    before = contents(tmp_path / "run")
    other = recipe(tmp_path, arms={"new": {}, "salt": {"kd_ratio": 1.0}}, max_steps=2)
    assert main(["salt", other]) == 1
    assert "kd_ratio: 0.5 -> 1.0" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_other_weights_in_the_students_folder_are_another_run(tmp_path, capsys):
    first = recipe(tmp_path / "a", arms={"baseline": {"kd_ratio": 0.0}}, max_steps=2)
    assert main(["salt", first]) == 0
    base = tmp_path / "a" / "run" / "baseline"
    again = recipe(
        tmp_path / "b",
        model_config=None,
        model_name_or_path=str(base),
        teacher_model_config=None,
        arms=None,
        kd_ratio=0.0,
        max_steps=2,
    )
    assert main(["salt", again]) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    model.save_pretrained(base)
    assert main(["salt", again]) == 1
    assert "holds another recipe's run" in capsys.readouterr().err


def test_a_nan_teacher_is_refused_before_the_baseline_trains(tmp_path, capsys):
    first = recipe(tmp_path / "a", arms={"baseline": {"kd_ratio": 0.0}}, max_steps=2)
    assert main(["salt", first]) == 0
    made = tmp_path / "a" / "run"
    model = AutoModelForCausalLM.from_pretrained(made / "teacher")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    AutoTokenizer.from_pretrained(made / "teacher").save_pretrained(tmp_path / "bad")
    again = recipe(
        tmp_path / "b", teacher_model_config=None, teacher_model_name_or_path=str(tmp_path / "bad")
    )
    assert main(["salt", again]) == 1
    assert "model.norm.weight holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "b" / "run").exists()


def test_bits_per_byte_counts_the_bytes_that_were_cut(tmp_path):
    long = [" ".join(sentences(12, seed=s)) for s in range(40)]
    for name, strategy in (("a", "bfd_split"), ("b", "bfd")):
        path = recipe(
            tmp_path / name, arms={"baseline": {"kd_ratio": 0.0}}, packing_strategy=strategy
        )
        lines = "".join(json.dumps({"text": t}) + "\n" for t in long)
        (tmp_path / name / "rows.jsonl").write_text(lines)
        assert main(["salt", path]) == 0
    one, two = (
        read_json(tmp_path / name / "run" / "baseline" / "eval.json")["held_out"] for name in "ab"
    )
    ratio = [scores["bits_per_byte"] / scores["loss"] for scores in (one, two)]
    assert ratio[0] == pytest.approx(ratio[1])


def test_single_run_lies_in_the_output_folder_and_resumes_from_it_alone(tmp_path):
    whole = recipe(tmp_path / "a", arms=None)
    assert main(["salt", whole]) == 0
    run = tmp_path / "a" / "run"
    expected = weights(run)
    facts = read_json(run / "run.json")
    assert facts["name"] == "salt" and (run / "report.html").is_file()

    # as a kill after step 4 leaves it: no model, status running, a half-written later checkpoint
    (run / "checkpoint-6" / "llmkd_complete.json").unlink()
    (run / "model.safetensors").unlink()
    broken = {**facts, "status": "running"}
    (run / "run.json").write_text(json.dumps(broken))
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "los')
    assert main(["resume", str(run)]) == 0
    assert same(weights(run), expected)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert read_json(run / "run.json")["resumed"] == 1


def test_given_teacher_and_continued_pretraining(tmp_path):
    first = recipe(tmp_path / "a", arms={"baseline": {"kd_ratio": 0.0}})
    assert main(["salt", first, "--save_strategy", "no"]) == 0
    made = tmp_path / "a" / "run"
    again = recipe(
        tmp_path / "b",
        dataset=str(tmp_path / "a" / "rows.jsonl"),
        model_config=None,
        teacher_model_config=None,
        arms=None,
        model_name_or_path=str(made / "baseline"),
        teacher_model_name_or_path=str(made / "teacher"),
    )
    assert main(["salt", again]) == 0
    facts = read_json(tmp_path / "b" / "run" / "run.json")
    assert facts["teacher"]["source"] == str(made / "teacher")
    assert facts["student"]["source"] == str(made / "baseline")
    assert facts["schedule"]["kd_steps"] == 3


def test_lora_run_opens_with_and_without_peft(tmp_path):
    first = recipe(tmp_path / "a", arms={"baseline": {"kd_ratio": 0.0}})
    assert main(["salt", first, "--save_strategy", "no"]) == 0
    base = tmp_path / "a" / "run" / "baseline"
    again = recipe(
        tmp_path / "b",
        dataset=str(tmp_path / "a" / "rows.jsonl"),
        model_config=None,
        teacher_model_config=None,
        arms=None,
        model_name_or_path=str(base),
        teacher_model_name_or_path=str(tmp_path / "a" / "run" / "teacher"),
        use_peft=True,
        lora_r=2,
        lora_target_modules=["q_proj", "v_proj"],
    )
    assert main(["salt", again]) == 0
    from peft import PeftModel

    run, ids = tmp_path / "b" / "run", torch.arange(10)[None]
    merged = AutoModelForCausalLM.from_pretrained(run)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        merged(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
    )


def test_streaming_with_a_given_tokenizer(tmp_path):
    first = recipe(tmp_path / "a", arms={"baseline": {"kd_ratio": 0.0}}, max_steps=2)
    assert main(["salt", first]) == 0
    made = tmp_path / "a" / "run"
    again = recipe(
        tmp_path / "b",
        streaming=True,
        max_eval_rows=5,
        tokenizer_name_or_path=str(made / "tokenizer"),
        teacher_model_config=None,
        teacher_model_name_or_path=str(made / "teacher"),
        arms=None,
    )
    assert main(["salt", again]) == 0
    assert read_json(tmp_path / "b" / "run" / "run.json")["data"]["train_rows"] is None


def test_select_alone_prints_a_histogram_and_its_scores_can_be_used(tmp_path, capsys):
    path = recipe(tmp_path / "a", arms=None, selection="salt_ds")
    assert main(["select", path]) == 0
    assert "rows have no score" in capsys.readouterr().out
    scores = tmp_path / "a" / "run" / "scores.parquet"
    assert scores.is_file()
    assert main(["salt", path, "--selection_scores", str(scores)]) == 0
    facts = read_json(tmp_path / "a" / "run" / "run.json")
    assert facts["data"]["selected_rows"] == 12


BAD = {
    "window": ({"max_length": 64}, "longer than the window of 32"),
    "rows": ({"per_device_train_batch_size": 500}, "fewer than one step's 500"),
    "config key": ({"model_config": {**LARGE, "hiden_size": 3}}, "did you mean 'hidden_size'"),
    "model type": ({"model_config": {"model_type": "lama"}}, "no such type"),
    "vocabulary": ({"model_config": {**LARGE, "vocab_size": 100}}, "smaller than the tokenizer"),
    "teacher config": (
        {"teacher_model_config": {**SMALL, "hiden_size": 3}},
        "teacher_model_config.hiden_size",
    ),
    "heads": ({"model_config": {**LARGE, "num_attention_heads": 3}}, "makes no causal language"),
    "no mapping": ({"model_config": [1, 2]}, "model_config: [1, 2]: must be a mapping"),
    "no causal LM": ({"model_config": {"model_type": "vit"}}, "makes no causal language model"),
    "batch of none": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0"),
    "negative rate": ({"learning_rate": -1.0}, "learning_rate: -1.0"),
    "no held-out rows": ({"max_eval_rows": 0}, "max_eval_rows: 0"),
    "split of a file": ({"eval_split": "test"}, "eval_split: 'test'"),
    "arm with text": ({"arms": {"a": {"max_length": 16}}}, "arms.a.max_length: 16: is one for all"),
    "arm with teacher": (
        {"arms": {"a": {"teacher_model_name_or_path": "x"}}},
        "arms.a.teacher_model_name_or_path",
    ),
    "arm outside": ({"arms": {"..": {}}}, "cannot name a folder of the run"),
    "leaky packing": (
        {"model_config": {"model_type": "opt", "hidden_size": 16, "num_attention_heads": 2}},
        "lets packed documents see each other",
    ),
    "teacher": (
        {"teacher_model_config": None, "teacher_model_name_or_path": "./no-teacher"},
        "teacher_model_name_or_path: './no-teacher'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_error_and_no_model(tmp_path, capsys, what):
    changes, words = BAD[what]
    assert main(["salt", recipe(tmp_path, **changes)]) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_no_room_is_said_before_training(tmp_path, capsys, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert main(["salt", recipe(tmp_path)]) == 1
    assert not (tmp_path / "run").exists()
    assert "GiB free, the run needs about" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors"))
