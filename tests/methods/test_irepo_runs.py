"""Whole runs of `llmkd irepo`: killed anywhere, gone on with; adapters, files and odd judges."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from irepo_kit import (
    RULE,
    calls,
    done,
    metrics_of,
    pairs_of,
    prompts,
    quick,
    recipe,
    refused,
    rows_of,
    rule,
    same,
    stamps,
    value,
    weights,
    write_rows,
)
from peft import AutoPeftModelForCausalLM

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.models.log_probs import completion_log_probs

__all__ = ["quick"]  # a fixture
pytestmark = pytest.mark.slow
SMALL = {"iterations": 1, "prompts_per_iteration": 4, "held_out_prompts": 2}
SCORE_1 = "iteration-2/log_probs_initial/part-00001.jsonl"
# Just before these are put in place; in the order in which a run writes them.
KILLS = (
    "iteration-0/metrics.json",
    "iteration-1/responses/part-00001.jsonl",
    "iteration-1/annotations/part-00001.jsonl",
    "iteration-1/log_probs_previous/part-00001.jsonl",
    "iteration-1/pairs",
    "iteration-1/model/checkpoint-2/llmkd_complete.json",
    "iteration-1/model/model.safetensors",
    "iteration-1/held_out/part-00001.jsonl",
    "iteration-1/held_out_log_probs_own/part-00000.jsonl",
    "iteration-1/held_out_annotations/part-00000.jsonl",
    "iteration-1/metrics.json",
    "iteration-2/responses/meta.json",
    SCORE_1,
    "iteration-2/model/checkpoint-1/llmkd_complete.json",
    "iteration-2/model/run.json",
    "iteration-2/held_out_verdicts.jsonl",
    "model.safetensors",
    "eval.json",
)


@pytest.fixture
def killed_before(monkeypatch):
    """Makes the next run end just before a file of its folder is put in place."""
    real = os.replace

    def before(run, name):
        def replace(source, target, *args, **kwargs):
            if Path(target).absolute() == run.absolute() / name:
                monkeypatch.setattr(os, "replace", real)
                raise KeyboardInterrupt
            return real(source, target, *args, **kwargs)

        monkeypatch.setattr(os, "replace", replace)

    return before


def assert_equal_runs(run, other, iterations=2):
    """Bit for bit the same texts, pairs, models and metrics."""
    assert same(weights(run), weights(other))
    for number in range(iterations + 1):
        assert metrics_of(run, number) == metrics_of(other, number)
        here, there = (folder / f"iteration-{number}" for folder in (run, other))
        for name in ("responses", "annotations", "held_out", "held_out_annotations"):
            assert rows_of(here / name) == rows_of(there / name)
        if number:
            assert pairs_of(run, number).to_list() == pairs_of(other, number).to_list()
            assert same(weights(here / "model"), weights(there / "model"))
    assert read_json(run / "eval.json") == read_json(other / "eval.json")


def test_a_kill_anywhere_changes_nothing(tmp_path, quick, killed_before, capsys):
    done(recipe(tmp_path / "whole"))
    whole, folder = tmp_path / "whole" / "run", tmp_path / "killed"
    shutil.copytree(tmp_path / "whole" / "policy", folder / "policy")
    path, run = recipe(folder), folder / "run"
    for place, name in enumerate(KILLS):
        killed_before(run, name)
        command = ["resume", str(run)] if place % 2 else ["irepo", path]
        assert main(command) == 130, name
        assert not (run / name).exists() or name.endswith("run.json"), name
    assert read_json(run / "run.json")["status"] == "running"
    capsys.readouterr()
    assert main(["resume", str(run / "iteration-1")]) == 0
    assert "iteration 2: reused" in capsys.readouterr().out
    assert_equal_runs(run, whole)
    # a part that was made is not made again: three were lost, of at most four prompts with three
    # responses
    assert calls(tmp_path / "whole") <= calls(folder) <= calls(tmp_path / "whole") + 3 * 12
    assert read_json(run / "run.json")["status"] == "done"


def test_killed_by_the_system_while_annotating(tmp_path):  # its child has parts of full size
    whole = recipe(tmp_path / "whole")
    done(whole)
    folder = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole" / "policy", folder / "policy")
    # dies once in the second iteration; the file itself stays as it is, and so its fingerprint
    text = RULE.replace(
        "        handle.write",
        "        kill = pathlib.Path(__file__).with_name('kill')\n"
        "        if kill.exists() and handle.tell() > 40:\n"
        "            kill.unlink()\n"
        "            import os, signal\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        handle.write",
    )
    rule(folder, text)
    path = recipe(folder)
    (folder / "kill").touch()
    command = [sys.executable, "-m", "llmkd.cli", "irepo", path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert not (folder / "kill").exists()
    run = folder / "run"
    assert not list((run / "iteration-2").glob("model/*.safetensors"))
    kept = stamps(run, lambda p: p.name.startswith("part-"))
    assert main(["resume", str(run)]) == 0
    assert {p: t for p, t in stamps(run).items() if p in kept} == kept
    assert same(weights(run), weights(tmp_path / "whole" / "run"))


def test_a_relative_folder_is_the_same_run_from_elsewhere(
    tmp_path, quick, killed_before, monkeypatch, capsys
):
    path = Path(recipe(tmp_path, output_dir="runs/mine"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    killed_before(run, SCORE_1)
    assert main(["irepo", path.name]) == 130
    monkeypatch.chdir("/")
    kept = stamps(run, lambda p: p.name.startswith("part-"))
    assert main(["resume", str(run)]) == 0
    assert {p: t for p, t in stamps(run).items() if p in kept} == kept
    # moved: nothing in it is made again
    moved = tmp_path / "elsewhere"
    os.rename(run, moved)
    asked = calls(tmp_path)
    capsys.readouterr()
    assert main(["resume", str(moved)]) == 0
    assert capsys.readouterr().out.count("holds this very run") == 2 and calls(tmp_path) == asked


def test_more_iterations_go_on(tmp_path, quick, capsys):
    path, run = recipe(tmp_path), tmp_path / "run"
    done(path)
    before, shown = weights(run), [metrics_of(run, number) for number in range(3)]
    kept, asked = stamps(run / "iteration-1" / "model"), calls(tmp_path)
    capsys.readouterr()
    done(path, "--iterations", "3")
    assert capsys.readouterr().out.count("holds this very run") == 2
    assert stamps(run / "iteration-1" / "model") == kept
    assert [metrics_of(run, number) for number in range(3)] == shown
    assert read_json(run / "run.json")["iterations"] == 3 and calls(tmp_path) > asked
    assert same(weights(run), weights(run / "iteration-3" / "model"))
    assert not same(weights(run), before)
    # and it is what three at once would have been
    shutil.copytree(tmp_path / "policy", tmp_path / "b" / "policy")
    done(recipe(tmp_path / "b", iterations=3))
    assert same(weights(tmp_path / "b" / "run"), weights(run))


def test_shared_out_prompts_do_not_go_on(tmp_path, quick, capsys):
    path = recipe(tmp_path, prompts_per_iteration=None, max_prompts=8, iterations=1)
    done(path)
    assert len(pairs_of(tmp_path / "run", 1)) == 8
    error = refused(path, capsys, "--iterations", "2")
    assert "iterations: 1 -> 2" in error


def test_the_initial_reference(tmp_path, quick):
    done(recipe(tmp_path, reference="initial", held_out_prompts=0))
    run = tmp_path / "run"
    rows = pairs_of(run, 2)
    for side in (1, 2):
        assert rows[f"ref_logps_{side}"] == rows[f"initial_logps_{side}"]
    lines = (run / "iteration-2" / "model" / "metrics.jsonl").read_text().splitlines()
    first = next(json.loads(line) for line in lines if '"loss"' in line)
    assert abs(first["logratio_reference"]) > 1e-3  # the second begins away from it
    assert first["logratio_reference"] == pytest.approx(first["logratio_initial"], abs=1e-6)
    assert metrics_of(run, 2)["held_out"] == {}  # nothing was held out
    assert not (run / "iteration-2" / "held_out").exists()


def test_adapters_go_on_and_the_start_stays(tmp_path, quick, killed_before):
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    path = recipe(tmp_path, **adapter, learning_rate=0.1)
    start, run = tmp_path / "policy", tmp_path / "run"
    before = stamps(start)
    killed_before(run, "iteration-2/model/checkpoint-2/llmkd_complete.json")
    assert main(["irepo", path]) == 130
    done(path)
    assert stamps(start) == before
    assert not list(run.rglob("model.safetensors"))
    one, two = (weights(run / f"iteration-{number}" / "model") for number in (1, 2))
    assert same(weights(run), two) and one.keys() == two.keys() and not same(one, two)
    assert read_json(run / "adapter_config.json")["base_model_name_or_path"] == str(start)
    # the second adapter is the first one, trained on: its first step begins at no log-ratio
    lines = (run / "iteration-2" / "model" / "metrics.jsonl").read_text().splitlines()
    first = next(json.loads(line) for line in lines if '"loss"' in line)
    assert first["logratio_reference"] == pytest.approx(0, abs=1e-5)
    assert abs(first["logratio_initial"]) > 1e-4
    held_out = rows_of(run / "iteration-2" / "held_out")
    model = AutoPeftModelForCausalLM.from_pretrained(run)
    ids = [row["ids"][0] for row in held_out]
    own = completion_log_probs(model, [row["prompt_ids"] for row in held_out], ids)
    with model.disable_adapter():
        base = completion_log_probs(model, [row["prompt_ids"] for row in held_out], ids)
    kl = metrics_of(run, 2)["held_out"]["kl_initial"]["mean"]
    assert kl == pytest.approx(float(np.mean(own - base)), abs=1e-5) != 0
    shutil.copytree(start, tmp_path / "b" / "policy")
    done(recipe(tmp_path / "b", **adapter, learning_rate=0.1))
    assert same(weights(tmp_path / "b" / "run"), weights(run))  # as if never killed


def preferences(count=12, **label):
    """Pairs with hard labels, or with the columns `label` of functions of the place."""
    words = "good great bad poor".split()
    return [
        {
            **prompts(count)[i],
            "chosen": f" {words[i % 4]} dog",
            "rejected": f" {words[(i + 1) % 4]} cat",
            **{name: one(i) for name, one in label.items()},
        }
        for i in range(count)
    ]


def offline(folder, rows, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "preference_dataset": write_rows(folder / "pairs.jsonl", rows),
        **dict.fromkeys(("annotators", "prompt_dataset", "iterations", "prompts_per_iteration")),
        "held_out_prompts": None,
    }
    return recipe(folder, **{**given, **changes})


def test_a_file_of_hard_labels_is_said_to_be_ipo(tmp_path, quick, caplog):
    with caplog.at_level(logging.WARNING):
        done(offline(tmp_path, preferences()))
    assert "as hard labels have" in caplog.text and "IPO at tau" in caplog.text
    run = tmp_path / "run"
    rows = pairs_of(run, 1)
    assert rows["pref_logit"] == pytest.approx([np.log(99)] * 12)
    assert rows["ref_logps_1"] == rows["initial_logps_1"]
    found = metrics_of(run, 1)
    assert found["label"] == "hard" and found["pairs"] == 12 and found["held_out"] == {}
    assert same(weights(run), weights(run / "iteration-1" / "model"))
    assert not (run / "iteration-1" / "responses").exists()
    assert not (run / "iteration-2").exists()


def test_a_file_of_probabilities_with_held_out_pairs(tmp_path, quick, caplog, capsys):
    rows = preferences(probability=lambda i: (i + 0.5) / 12)
    with caplog.at_level(logging.WARNING):
        path = offline(tmp_path, rows, held_out_pairs=4)
        done(path)
    assert "hard labels" not in caplog.text
    run = tmp_path / "run"
    found = pairs_of(run, 1)
    logits = {row["row"]: row["pref_logit"] for row in found}
    assert len(logits) == 8
    for row, logit in logits.items():
        p = (row + 0.5) / 12
        assert logit == pytest.approx(np.log(p / (1 - p)))
    assert min(logits.values()) < 0 < max(logits.values())  # chosen need not be likely
    metrics = metrics_of(run, 1)
    assert metrics["held_out_pairs"]["pairs"] == 4
    assert metrics["held_out_pairs"].keys() >= {"loss", "accuracy", "margin"}
    assert metrics["held_out"]["prompts"] == 4  # the prompts of the held-out pairs
    assert "kl_initial" in metrics["held_out"] and "win_rate_start" not in metrics["held_out"]
    assert metrics_of(run, 0)["held_out"]["kl_initial"]["mean"] == 0
    capsys.readouterr()
    done(path)
    assert "holds this very run" in capsys.readouterr().out


def test_a_file_with_annotators_has_a_win_rate(tmp_path, quick):
    rows = preferences(wins=lambda i: i % 4, votes=lambda i: 3)
    (tmp_path / "x").mkdir()
    judge = [rule(tmp_path / "x")]
    done(offline(tmp_path, rows, held_out_annotators=judge, held_out_pairs=4))
    found = metrics_of(tmp_path / "run", 1)
    assert 0 <= found["held_out"]["win_rate_start"]["soft"] <= 1
    pairs = pairs_of(tmp_path / "run", 1)
    assert {(row["wins"], row["votes"]) for row in pairs} <= {(w, 3.0) for w in range(4)}
    for row in pairs:
        assert row["pref_logit"] == pytest.approx(np.log((row["wins"] + 0.5) / (3.5 - row["wins"])))


# what stands in the rule; words of the error
JUDGES = {
    "NaN": ("return float('nan')", "gave the scores"),
    "wrong length": ("return [1.0, 2.0]", "row "),
    "throws": ("raise ZeroDivisionError('of mine')", "raised ZeroDivisionError: of mine"),
}
HALF = """
import pathlib
def score(prompt, response):
    calls = pathlib.Path(__file__).with_name("calls")
    with open(calls, "a") as handle:
        handle.write("x")
    if calls.stat().st_size > 14:  # in the second part
        {fault}
    return 0.25 * (sum(map(ord, response)) % 41)
"""


@pytest.mark.parametrize("what", JUDGES)
def test_a_rule_that_fails_midway_is_mended(tmp_path, quick, capsys, what):
    fault, words = JUDGES[what]
    tmp_path.mkdir(exist_ok=True)
    rule(tmp_path, HALF.format(fault=fault))
    path, run = recipe(tmp_path, iterations=1), tmp_path / "run"
    error = refused(path, capsys)
    assert words in error and "rule" in error and "the responses are kept" in error
    first = run / "iteration-1" / "annotations"
    assert (first / "part-00000.jsonl").is_file() and not (first / "part-00001.jsonl").exists()
    responses = stamps(run / "iteration-1" / "responses")
    # unchanged, it fails again where it failed, and asks nothing that was answered
    asked = calls(tmp_path)
    refused(path, capsys)
    assert calls(tmp_path) == asked + (1 if what == "throws" else 3)  # three of a prompt
    # mended, it is another rule: what the old one said is not mixed with it
    rule(tmp_path)
    error = refused(path, capsys)
    way = f"rm -r {first}"
    assert way in error
    shutil.rmtree(first)
    done(path)
    assert stamps(run / "iteration-1" / "responses") == responses
    for row in pairs_of(run, 1):
        assert row["pref_logit"] == value(row["response_1"]) - value(row["response_2"])


def test_more_wins_than_votes(tmp_path, quick, capsys):
    text = "def score(prompt, responses):\n    n = len(responses)\n"
    text += "    return [[5.0] * n] * n, [[3.0] * n] * n\n"
    rule(tmp_path, text)
    error = refused(recipe(tmp_path, **SMALL), capsys)
    assert "wins beyond 0 and the votes" in error and "wins 5 and 5, votes 3 and 3" in error
    assert (tmp_path / "run" / "iteration-1" / "responses" / "part-00000.jsonl").is_file()


def test_votes_are_kept_with_the_pairs(tmp_path, quick):
    text = "def score(prompt, responses):\n    n = len(responses)\n"
    text += "    wins = [[4.0 if i < j else 1.0 for j in range(n)] for i in range(n)]\n"
    text += "    return wins, [[5.0] * n] * n\n"
    rule(tmp_path, text)
    done(recipe(tmp_path, **SMALL, pairs="all"))
    rows = pairs_of(tmp_path / "run", 1)
    assert len(rows) == 4 * 3
    assert set(rows["wins"]) == {4.0} and set(rows["votes"]) == {5.0}
    assert rows["pref_logit"] == pytest.approx([np.log(3)] * 12)  # Haldane's 4 of 5


def test_all_responses_alike_are_an_empty_iteration(tmp_path, quick, capsys):
    path = recipe(tmp_path, **SMALL, temperature=1e-6)
    error = refused(path, capsys)
    for words in (
        "iterations: 1: no prompt of this iteration left a prompt with two different responses",
        "12 responses, dropped: 8 duplicate",
        "raise temperature",
        "--overwrite_run true",
    ):
        assert words in error, error
    assert read_json(tmp_path / "run" / "run.json")["status"] == "running"
    done(path, "--temperature", "1", "--overwrite_run", "true")  # the way out it names


def test_all_responses_cut_off(tmp_path, quick, capsys):
    error = refused(recipe(tmp_path, **SMALL, drop_truncated=True, max_new_tokens=1), capsys)
    assert "--drop_truncated false" in error and " truncated" in error


FIRST = """
import numpy as np
from llmkd.labels.preference import Logits
def score(prompt, responses):
    n = len(responses)
    first = np.full((n, n), 4.0)
    np.fill_diagonal(first, np.nan)
    logits = np.array([[0.1 * (j - i) for j in range(n)] for i in range(n)])
    return Logits(logits, first)
"""


def test_a_judge_that_always_prefers_the_first_is_reported(tmp_path, quick, capsys):
    rule(tmp_path, FIRST)
    done(recipe(tmp_path, **SMALL))
    said = capsys.readouterr().out
    found = metrics_of(tmp_path / "run", 1)
    judge = found["annotators"][0]
    assert judge["first_share"] == 1.0 and judge["first_lean"] == 4.0
    assert judge["orders_disagree"] == 1.0 and judge["questions"] == 12
    assert "rule prefers whichever response it is shown first in 100%" in found["warnings"][0]
    assert "iteration 1: warning: rule prefers whichever response it is shown first" in said


UNSURE = """
def score(prompt, responses):
    n = len(responses)
    table = [[None] * n for _ in range(n)]
    table[0][1], table[1][0] = (1.0, -1.0) if n > 2 or {always} else (None, None)
    return table
"""


def test_two_annotators_of_whom_one_is_not_asked_everything(tmp_path, quick):
    rule(tmp_path, UNSURE.format(always=True))
    shutil.copy(tmp_path / "rule.py", tmp_path / "unsure.py")
    rule(tmp_path)
    both = [
        {"type": "rule", "function": f"{tmp_path / 'unsure.py'}:score", "name": "unsure"},
        {"type": "rule", "function": f"{tmp_path / 'rule.py'}:score", "name": "rule"},
    ]
    done(recipe(tmp_path, **SMALL, annotators=both, pairs="all"))
    found = metrics_of(tmp_path / "run", 1)["annotators"]
    assert [one["name"] for one in found] == ["unsure", "rule"]
    assert [one["questions"] for one in found] == [4, 12]
    rows = rows_of(tmp_path / "run" / "iteration-1" / "responses")
    gaps = [value(row["responses"][0]) - value(row["responses"][1]) for row in rows]
    agree = float(np.mean([gap > 0 for gap in gaps if gap]))
    assert found[0]["agreement_with"] == {"rule": pytest.approx(agree)}
    for row in pairs_of(tmp_path / "run", 1):
        gap = value(row["response_1"]) - value(row["response_2"])
        assert row["pref_logit"] in (pytest.approx(gap), pytest.approx((gap + 1) / 2))


def test_overwriting_another_run(tmp_path, quick):
    path, run = recipe(tmp_path, **SMALL), tmp_path / "run"
    done(path)
    before = weights(run)
    (run / "iteration-9").mkdir()
    done(path, "--beta", "0.7", "--overwrite_run", "true")
    assert not same(weights(run), before) and not (run / "iteration-9").exists()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["beta"] == 0.7
    assert "overwrite_run" not in yaml.safe_load((run / "recipe.yaml").read_text())


def test_a_start_that_is_pretrained_first(tmp_path, quick, killed_before):
    text = tmp_path / "text.jsonl"
    write_rows(text, [{"text": f"{row['prompt']} and a dog"} for row in prompts(60)])
    shape = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    start = {
        "dataset": str(text),
        "tokenizer_vocab_size": 280,
        "max_length": 32,
        "max_eval_rows": 2,
        "model_config": shape,
        "kd_ratio": 0.0,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    changes = {"model_name_or_path": None, "start": start, **SMALL}
    path, run = recipe(tmp_path, **changes), tmp_path / "run"
    killed_before(run, "iteration-1/log_probs_previous/part-00000.jsonl")
    assert main(["irepo", path]) == 130
    kept = stamps(run / "start", lambda p: p.suffix == ".safetensors")
    assert main(["resume", str(run / "start")]) == 0  # a part of the run means the run
    assert stamps(run / "start", lambda p: p in kept) == kept and len(kept) == 1
    assert not same(weights(run), weights(run / "start"))
    assert weights(run).keys() == weights(run / "start").keys()


def test_a_whole_page_is_written(tmp_path, capsys):
    done(recipe(tmp_path, **SMALL))
    page = tmp_path / "run" / "report.html"
    assert "report: " in capsys.readouterr().out
    text = page.read_text()
    assert "<img" in text and "iteration" in text
    page.unlink()
    assert main(["report", str(tmp_path / "run")]) == 0 and page.is_file()
