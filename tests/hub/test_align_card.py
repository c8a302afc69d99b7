"""Cards of iREPO runs: policies and adapters, aligned to annotators."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from align_kit import RUN, metrics, write_align_run
from hub_run import LM_EVAL, tiny_model, tiny_tokenizer
from huggingface_hub import ModelCard, ModelCardData

from llmkd.files import write_json
from llmkd.hub import SALT, model_card
from llmkd.hub.method import IREPO

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as far as the card reads it; the weights are never opened."""
    folder = write_align_run(tmp_path / "aligned")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    write_json(folder / "eval.json", {"lm_eval": LM_EVAL})
    (folder / "win_kl.png").write_bytes(b"\x89PNG")
    return folder


def read_card(folder: Path, repo_id: str | None = "me/aligned") -> tuple[ModelCardData, str]:
    """Metadata and body, by the Hub's own reader."""
    card = ModelCard(model_card(folder, repo_id=repo_id))
    assert isinstance(card.data, ModelCardData)
    return card.data, card.text


def test_the_card_of_a_whole_run(run: Path):
    data, text = read_card(run)
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert data.tags == ["llmkd", "irepo", "alignment", "preference-optimization"]
    assert data.base_model == BASE and data.get("base_model_relation") is None
    assert data.datasets == ["trl-lib/ultrafeedback-prompt"]
    results = {r.metric_type: (r.dataset_type, r.metric_value) for r in data.eval_results or ()}
    source = "trl-lib/ultrafeedback-prompt"
    assert results == {
        "win_rate": (source, 0.7), "kl": (source, 4.0), "acc": ("local_arc", 0.25),
    }  # fmt: skip
    for part in (
        "A causal language model (`LlamaForCausalLM`), aligned with llmkd.",
        "this is the policy after 2 iterations of sampling",
        f"It started from [{BASE}](https://huggingface.co/{BASE}).",
        "https://arxiv.org/abs/2405.15230", "@article{le2024irepo", "Formulas and defaults are",
        "On held-out prompts (40 responses):", "|  | start | **this model** |",
        "| wins against the start, 95 % interval | - | 70.0% [64.0%, 76.0%] |",
        "| KL to the initial policy (nats a response) | 0 ± 0.25 | 4 ± 0.25 |",
        "| mean length (tokens) | 12.8750 | 14.8750 |", "| distinct-2 | 0.8125 | 0.6125 |",
        "![win rate against the start as a function of KL to the initial policy](win_kl.png)",
        "| rule | `my_rules.py:score` | rule |",
        "| reward | [org/reward-a](https://huggingface.co/org/reward-a), [org/reward-b]",
        "| source | [trl-lib/ultrafeedback-prompt](https://huggingface.co/datasets/trl-lib/",
        "| β | 0.1 |", "| responses a prompt | 4 |", "| iterations | 2 |",
        "| local_arc | acc | 24 of 2,376 | 0 | 0.2500 ± 0.0125 |",
        "they are those it was trained to please", "one run, seed 17", "| torch | 2.13.0 |",
        "What people would prefer", "Whether another method does as well",
    ):  # fmt: skip
        assert part in text, part
    assert "someone" not in text and "no benchmark" not in text and "instead of" not in text


def test_the_paper_is_named_without_invented_names():
    assert "author  = {Le and Shu and Nguyen and Hong and Tran}" in IREPO.bibtex
    assert IREPO.url.endswith("2405.15230")


def test_an_adapter_names_its_base(run: Path):
    (run / "config.json").unlink()
    write_json(run / "adapter_config.json", {"base_model_name_or_path": BASE})
    settings = {**RUN["settings"], "loss": "soft_dpo", "lora_r": 16}
    write_json(run / "run.json", RUN | {"settings": settings})
    data, text = read_card(run)
    assert data.library_name == "peft" and data.base_model == BASE
    assert data.base_model_relation == "adapter"
    assert "A PEFT adapter of a causal language model, aligned" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/aligned")' in text
    assert "The loss is `soft_dpo` instead of" in text and "| LoRA rank | 16 |" in text
    (run / "tokenizer_config.json").unlink()
    assert f'AutoTokenizer.from_pretrained("{BASE}")' in read_card(run)[1]


def test_an_adapter_on_a_model_of_the_same_run(run: Path):
    base = "/home/someone/runs/aligned/start"
    write_json(run / "adapter_config.json", {"base_model_name_or_path": base})
    write_json(run / "run.json", RUN | {"policy": {"source": "start"}})
    data, text = read_card(run)
    assert data.get("base_model") is None and data.get("base_model_relation") is None
    assert "It started from a model pretrained in the same run." in text
    assert "The base model `start` is not on the Hub" in text and "someone" not in text


def test_a_run_that_is_not_finished_or_tells_nothing(tmp_path: Path):
    write_json(tmp_path / "half" / "run.json", RUN | {"settings": None, "annotators": None})
    write_json(tmp_path / "half" / "iteration-0" / "metrics.json", metrics(0))
    data, text = read_card(tmp_path / "half")
    assert not data.eval_results and "## Numbers" not in text and "## Annotators" not in text
    assert "Win rate: responses were not compared" in text and "no benchmark was run" in text
    write_json(tmp_path / "bare" / "run.json", {"kind": "irepo"})
    data, text = read_card(tmp_path / "bare")
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == ["How to use it", "What was not measured", "Paper"]
    assert "AutoTokenizer" not in text


def test_private_paths_and_tokens_stay_at_home(run: Path):
    secret = "hf_" + "Ab3" * 11 + "Z"
    private = "/home/someone/prompts.jsonl"
    settings = {**RUN["settings"], "prompt_dataset": private, "temperature": 0.7}
    settings["annotators"] = [{"type": "server", "model": "judge", "name": secret}]
    data = {**RUN["data"], "source": private}
    write_json(run / "run.json", RUN | {"settings": settings, "data": data})
    found, text = read_card(run)
    assert found.get("datasets") is None and "someone" not in text and secret not in text
    assert "| source | `prompts.jsonl` |" in text
    assert "(temperature 0.7), so that what stands under KL is a mean log-ratio" in text


def test_the_kind_of_run_chooses_the_card(run: Path):
    assert "2405.15230" in model_card(run, repo_id=None)
    assert "2410.18779" in model_card(run, repo_id=None, method=SALT)
    write_json(run / "run.json", RUN | {"settings": {"preference_dataset": "org/pairs"}})
    data, text = read_card(run)
    assert "on a file of preferences, without sampling" in text and data.datasets == ["org/pairs"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_lines_of_the_card_run_as_they_stand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chat: bool,
    adapter: bool,
):
    folder, settings = tmp_path / "aligned", {**RUN["settings"], "system_prompt": "it's w1"}
    write_align_run(folder, settings=settings)
    model: Any = tiny_model()
    if adapter:
        from peft import LoraConfig, get_peft_model

        model.save_pretrained(tmp_path / "base")
        model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w2"
    tokenizer.save_pretrained(folder)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(folder, repo_id=None), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    assert type(space["model"]).__name__ == (
        "PeftModelForCausalLM" if adapter else "LlamaForCausalLM"
    )
    assert 1 <= len(space["answer"]) <= 24 and capsys.readouterr().out.strip()
    asked = space["tokenizer"].decode(space["inputs"]["input_ids"][0])
    assert ("w1" in asked) == chat
    assert json.dumps(folder.name)[1:-1] in code
