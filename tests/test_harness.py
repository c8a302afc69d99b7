"""`llmkd eval`: lm_eval in process against values computed here, and where tasks are found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from harness_kit import QUESTIONS, TEXTS, VOCABULARY, WINDOW, Kit, value, write_lines
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmkd.evaluation.harness import run_tasks


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    return Kit(tmp_path, monkeypatch)


def log_probability(model: Any, tokens: list[int], first: int) -> float:
    """Nats of tokens[first:] given what is before them, in float64 from the logits."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([tokens[:-1]])).logits[0].double()
    log_probs_TV = torch.log_softmax(logits_TV, dim=-1)
    targets_T = torch.tensor(tokens[1:])
    return log_probs_TV[torch.arange(len(targets_T)), targets_T][first - 1 :].sum().item()


def bits_per_byte_by_hand(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Every token is predicted once; each window after the first sees as much past as fits."""
    nats = 0.0
    for text in texts:
        sequence = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        done = 1  # sequence[0] is the prefix
        while done < len(sequence):
            end = min(done + WINDOW, len(sequence))
            start = max(0, end - WINDOW - 1)
            nats += log_probability(model, sequence[start:end], done - start)
            done = end
    return -nats / sum(len(text.encode()) for text in texts) / math.log(2)


def test_bits_per_byte_is_the_models_own(kit: Kit) -> None:
    folder = kit.model("one")
    results = run_tasks(folder, [kit.rolling], batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = bits_per_byte_by_hand(model, kit.tokenizer, TEXTS)
    assert value(results, "tiny_rolling", "bits_per_byte") == pytest.approx(expected, rel=1e-6)


def test_uniform_model_costs_log2_of_the_vocabulary(kit: Kit) -> None:
    results = run_tasks(kit.model("flat", uniform=True), [kit.rolling])
    tokens = sum(len(kit.tokenizer.encode(text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    expected = math.log2(VOCABULARY) * tokens / size
    assert value(results, "tiny_rolling", "bits_per_byte") == pytest.approx(expected, rel=1e-6)


def test_choices_are_ranked_by_the_models_own_log_probability(kit: Kit) -> None:
    folder = kit.model("one", seed=3)
    results = run_tasks(folder, [kit.choice], limit=10)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right = 0
    for row in QUESTIONS[:10]:
        context = kit.tokenizer.encode(f"Q: {row['question']}\nA:")
        scored = []
        for choice in row["choices"]:
            whole = kit.tokenizer.encode(f"Q: {row['question']}\nA: {choice}")
            assert whole[: len(context)] == context
            scored.append(log_probability(model, whole, len(context)))
        right += scored.index(max(scored)) == row["gold"]
    record = results["tasks"]["tiny_choice"]
    assert record["metrics"]["acc"]["value"] == pytest.approx(right / 10)
    share = right / 10
    stderr = math.sqrt(share * (1 - share) / 9)  # of a mean of ten zeros and ones, with n - 1
    assert record["metrics"]["acc"]["stderr"] == pytest.approx(stderr)
    assert (record["n"], record["n_total"], record["limit"]) == (10, 12, 10)
    assert (record["num_fewshot"], record["version"]) == (0, 3.0)
    assert record["apply_chat_template"] is False and record["lm_eval"] and record["hash"]
    assert record["data_files"] == [str(kit.tasks / "questions.jsonl")]


def test_peft_adapter_is_applied(kit: Kit) -> None:
    base = kit.model("base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    tuned.save_pretrained(str(kit.folder / "adapter"))
    merged = kit.model("merged")
    cast(Any, tuned).merge_and_unload().save_pretrained(merged)

    task = [kit.rolling]
    scores = [run_tasks(kit.folder / name, task) for name in ("adapter", "merged", "base")]
    adapter, whole, plain = (value(one, "tiny_rolling", "bits_per_byte") for one in scores)
    assert adapter == pytest.approx(whole, rel=1e-5)
    assert abs(adapter - plain) > 1e-3
    assert scores[0]["adapter"] == str(kit.folder / "adapter")


def test_the_working_directory_comes_first_as_in_lm_eval(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = kit.folder / "here"
    here.mkdir()
    write_lines(here / "questions.jsonl", QUESTIONS[:5])
    monkeypatch.chdir(here)
    results = run_tasks(kit.model("one"), ["tiny_choice"], include_path=[kit.tasks])
    assert results["tasks"]["tiny_choice"]["n"] == 5
    assert results["tasks"]["tiny_choice"]["data_files"] == [str(here / "questions.jsonl")]


def test_tags_and_folders_name_several_tasks(kit: Kit) -> None:
    model = kit.model("one")
    by_tag = run_tasks(model, ["tiny_tag"], include_path=[kit.tasks], limit=2)
    assert list(by_tag["tasks"]) == ["tiny_rolling"]
    by_folder = run_tasks(model, [str(kit.tasks), kit.choice], limit=0.25)
    assert list(by_folder["tasks"]) == ["tiny_choice", "tiny_rolling"]
    assert by_folder["tasks"]["tiny_choice"]["n"] == 3  # a quarter of 12


@pytest.mark.parametrize("place", ["run", "parent"])
def test_shipped_task_finds_the_runs_held_out_documents(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = kit.model("parent/run")
    write_lines((run if place == "run" else run.parent) / "held_out.jsonl", [{"text": TEXTS[0]}])
    (kit.folder / "elsewhere").mkdir()
    write_lines(kit.folder / "elsewhere" / "held_out.jsonl", [{"text": "another run's"}])
    monkeypatch.chdir(kit.folder / "elsewhere")
    results = run_tasks(run, ["heldout_bpb"])
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    expected = bits_per_byte_by_hand(model, kit.tokenizer, TEXTS[:1])
    assert value(results, "heldout_bpb", "bits_per_byte") == pytest.approx(expected, rel=1e-6)
    assert value(results, "heldout_bpb", "byte_perplexity") == pytest.approx(2**expected, rel=1e-6)


@pytest.mark.slow  # lm_eval's own index takes 10 s
def test_groups_reach_their_members(kit: Kit) -> None:
    (kit.tasks / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choice, {task: tiny_rolling}]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean}]\n"
    )
    results = run_tasks(kit.model("one"), [str(kit.tasks / "group.yaml")])
    group = results["tasks"]["tiny_group"]
    assert group["group"] == ["tiny_choice", "tiny_rolling"]
    assert group["metrics"]["acc"]["value"] == value(results, "tiny_choice", "acc")
    assert results["tasks"]["tiny_rolling"]["data_files"] == [str(kit.tasks / "texts.jsonl")]
