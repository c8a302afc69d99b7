"""Cards and pushes of ERNIE-Tiny runs: students for a task, and for none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_run import TOKEN, logits_by_http, tiny_model, write_run
from hub_server import HubServer
from hub_task_run import RUN, SCORES, STAGES, make_model, write_task_run, write_tokenizer
from huggingface_hub import ModelCard, ModelCardData
from test_hub import client, hub  # noqa: F401  (fixtures)
from transformers import AutoModelForSequenceClassification

from llmkd.errors import HubError
from llmkd.hub import ERNIE_TINY, SALT, model_card, push_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An arm's folder as far as the card reads it, without a model."""
    folder = tmp_path / "out" / "all"
    write_task_run(folder)
    (folder / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def read_card(folder: Path) -> tuple[ModelCardData, str]:
    """Metadata and body, by the Hub's own reader."""
    card = ModelCard(model_card(folder, repo_id="me/tiny"))
    assert isinstance(card.data, ModelCardData)
    return card.data, card.text


def test_the_card_of_a_whole_run(run: Path):
    data, text = read_card(run)

    assert data.pipeline_tag == "text-classification"
    assert data.library_name == "transformers"
    assert data.tags == ["llmkd", "ernie-tiny", "distillation"]
    assert data.datasets == ["stanfordnlp/sst2"] and data.get("base_model") is None
    results = data.eval_results or []
    assert {(r.task_type, r.dataset_type) for r in results} == {
        ("text-classification", "stanfordnlp/sst2")
    }
    assert [(r.metric_type, r.metric_value) for r in results] == [
        ("accuracy", 0.9016), ("f1", 0.9), ("matthews_correlation", 0.8), ("loss", 0.25),
    ]  # fmt: skip
    # 0.9016 / 0.92 = 0.98; 108 / 14.4 = 7.5
    for part in (
        "A text classifier with 14,400,000 parameters (`BertForSequenceClassification`, 4 layers, "
        "width 312, 12 attention heads, feed-forward width 1,200), trained with llmkd.",
        "(https://huggingface.co/google-bert/bert-base-uncased), which has 7.5 times as many",
        "its accuracy is 0.9016, 98.0% of the teacher's 0.9200.",
        "all four stages", "https://arxiv.org/abs/2106.02241", "@article{su2021ernietiny",
        "Dev part of [stanfordnlp/sst2](https://huggingface.co/datasets/stanfordnlp/sst2) "
        "(870 examples):",
        "| **all** (this model) | 0.9016 | 0.9000 | 0.8000 | 0.2500 | 98.0% |",
        "| teacher | 0.9200 | - | - | - | 100.0% |",
        "| parameters | 14,400,000 | 108,000,000 | 7.50 |",
        "| milliseconds a forward pass, batch 1 | 3 | 12.6 | 4.25 |",
        "| milliseconds a forward pass, batch 32 | 40 | 180 | 4.50 |",
        "Latency: rows of 128 tokens, 1 CPU thread(s).",
        "| gd | pretrained | general text | latent | 1,500 | - |",
        "| tsd | fine-tuned on the task | task text | latent + soft + hard | 800 | 0:01:01 |",
        "| labels | negative, positive |", "| dev examples | 872 |", "feedbeef00000002",
        "feedbeef00000003", "feedbeef00000004", "| training tokens | 640,000 |",
        "| accuracy on the dev set | 0.9200 |", "| fine-tuned on the task | in this run |",
        "| peak memory | 1.00 GiB |", "| torch | 2.13.0 |", "one run, seed 17",
        "no other arm was trained",
    ):  # fmt: skip
        assert part in text, part
    assert "Pictures" not in text and "no forward pass" not in text


def test_an_arm_stands_beside_the_other_arms_and_the_teacher(run: Path):
    arms = {
        "hard": {"accuracy": 0.805, "loss": 0.5, "steps": 3300},
        "all": {"accuracy": 0.1, "examples": 870},
    }
    teacher = {"accuracy": 0.92, "matthews": 0.84}
    (run.parent / "eval.json").write_text(json.dumps({"arms": arms, "teacher": teacher}))
    _, text = read_card(run)
    found = re.findall(r"^\| .*%? \|$", text.split("## Scores")[1].split("##")[0], re.MULTILINE)
    assert found == [
        "| model | accuracy | macro F1 | Matthews correlation | loss | of the teacher's accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
        "| **all** (this model) | 0.9016 | 0.9000 | 0.8000 | 0.2500 | 98.0% |",
        "| hard | 0.8050 | - | - | 0.5000 | 87.5% |",  # 0.805 / 0.92
        "| teacher | 0.9200 | - | 0.8400 | - | 100.0% |",
    ]
    assert "no other arm" not in text


def test_the_main_score_stands_first_and_decides_what_is_kept(run: Path):
    task = {**RUN["task"], "metric": "matthews"}
    write_task_run(run, task=task, teacher={**RUN["teacher"], "score": 0.64})
    data, text = read_card(run)
    assert (data.eval_results or [])[0].metric_type == "matthews_correlation"
    assert "| model | Matthews correlation | accuracy | macro F1 | loss |" in text
    assert "125.0% of the teacher's 0.6400" in text


@pytest.mark.parametrize("metric, score", [("matthews", -0.1), ("accuracy", None), ("loss", 0.2)])
def test_no_share_where_a_quotient_would_say_nothing(run: Path, metric: str, score: float | None):
    task = {**RUN["task"], "metric": metric}
    write_task_run(run, task=task, teacher={**RUN["teacher"], "score": score})
    _, text = read_card(run)
    assert "%" not in text.split("## Run")[0] and "none to divide by" in text


@pytest.mark.parametrize(
    "kind, pipeline, auto",
    [
        ("single_label", "text-classification", "SequenceClassification"),
        ("multi_label", "text-classification", "SequenceClassification"),
        ("regression", "text-classification", "SequenceClassification"),
        ("token", "token-classification", "TokenClassification"),
    ],
)
def test_the_kind_of_task_decides_how_it_is_loaded(run: Path, kind: str, pipeline: str, auto: str):
    write_task_run(run, task={**RUN["task"], "kind": kind})
    data, text = read_card(run)
    assert data.pipeline_tag == pipeline
    assert {r.task_type for r in data.eval_results or ()} == {pipeline}
    assert f'AutoModelFor{auto}.from_pretrained("me/tiny")' in text
    assert f'pipeline("{pipeline}", model="me/tiny"' in text
    assert ("870 counted tokens" in text) == (kind == "token")


@pytest.mark.parametrize(
    "architecture, pipeline, auto",
    [
        ("LlamaForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("BertModel", "feature-extraction", "AutoModel"),
        ("BertForMaskedLM", "feature-extraction", "AutoModel"),
    ],
)
def test_a_student_of_no_task(run: Path, architecture: str, pipeline: str, auto: str):
    write_task_run(run, task=None, stages=STAGES[:1])
    (run / "eval.json").unlink()
    (run / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    data, text = read_card(run)
    assert data.pipeline_tag == pipeline and not data.eval_results
    assert f"model = {auto}.from_pretrained(" in text
    assert "Any task: this model was trained for none" in text
    assert "with the stages gd; the published method has gd, ged, tad, tsd" in text
    assert "It is compressed from" in text and "The task:" not in text
    assert "Scores" not in text and "no forward pass was timed" in text


@pytest.mark.parametrize(
    "kind", ["single_label", "multi_label", "regression", "token", "bare", "causal"]
)
def test_the_lines_of_the_card_run_as_they_stand(
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "student"
    tasks = {"bare": None, "causal": None}
    write_task_run(folder, task=tasks.get(kind, {**RUN["task"], "kind": kind}))
    model = tiny_model() if kind == "causal" else make_model(kind)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    blocks = re.findall(r"```python\n(.*?)```", model_card(folder, repo_id=None), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(blocks[0], space)
    assert type(space["model"]) is type(model)
    assert space["tokenizer"]("w1 w2")["input_ids"] == [1, 2]
    exec(blocks[1], space)
    printed = capsys.readouterr().out

    with torch.no_grad():
        ids = space["tokenizer"]("w1 w2 w3", return_tensors="pt")
        out = space["model"](**ids)
    answer = space["run"]("w1 w2 w3")
    if kind == "regression":  # the number itself, not its sigmoid
        assert answer[0]["score"] == pytest.approx(out.logits.item(), rel=1e-5)
    elif kind == "multi_label":  # every class with a probability of its own
        scores = sorted(row["score"] for row in answer[0])
        assert scores == pytest.approx(sorted(out.logits[0].sigmoid().tolist()), rel=1e-5)
    elif kind == "single_label":
        assert answer[0]["score"] == pytest.approx(out.logits.softmax(-1).max().item(), rel=1e-5)
        assert space["run"](" ".join(["w1"] * 500))  # cut to what the model has positions for
    elif kind == "token":
        assert len(answer) == 3
    elif kind == "bare":
        assert torch.tensor(answer).shape == (1, 3, 8)
    assert printed.strip()


def test_a_run_without_a_teacher_does_not_claim_one(run: Path):
    stage = {"name": "tsd", "teacher": "none", "data": "task", "losses": ["hard"], "steps": 800}
    write_task_run(run, stages=[stage], general=None)
    _, text = read_card(run)
    assert "no stage had a teacher" in text and "compressed from" not in text
    assert "| tsd | none | task text | hard | 800 |" in text
    assert "Losses: `hard`: match the labels." in text
    assert "General text" not in text


def test_the_teacher_of_a_recipe_has_a_card_too(run: Path):
    above = {"arms": {"all": {"accuracy": 0.9}}, "teacher": {"accuracy": 0.92}}
    (run.parent / "eval.json").write_text(json.dumps(above))
    folder = run.parent / "teacher"
    write_task_run(folder, name="teacher", teacher=None, stages=[], student=None)
    (folder / "eval.json").unlink()
    _, text = read_card(folder)
    assert "serves as teacher" in text
    assert "| **teacher** (this model) | 0.9200 |" in text and "| all | 0.9000 |" in text
    assert text.count("teacher** (this") == 1 and "| teacher |" not in text


def test_a_folder_that_tells_nothing_but_its_kind(tmp_path: Path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "run.json").write_text('{"kind": "ernie-tiny"}')
    data, text = read_card(folder)
    assert data.pipeline_tag == "feature-extraction" and not data.eval_results
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == ["How to load it", "What was not measured", "Paper"]
    assert "AutoTokenizer" not in text and "pipeline(" not in text


def test_subsets_mixtures_and_private_paths(run: Path):
    task = {**RUN["task"], "source": "nyu-mll/glue/sst2"}
    general = {"source": "0.7 of org/web + 0.3 of /home/someone/own.jsonl"}
    write_task_run(run, task=task, general=general)
    data, text = read_card(run)
    assert data.datasets == ["nyu-mll/glue", "org/web"]
    first = (data.eval_results or [])[0]
    assert (first.dataset_type, first.dataset_config) == ("nyu-mll/glue", "sst2")
    assert "[nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue)/sst2" in text
    assert "0.7 of [org/web](https://huggingface.co/datasets/org/web) + 0.3 of `own.jsonl`" in text
    assert "someone" not in text

    write_task_run(run, task={**RUN["task"], "source": "/home/someone/reviews.csv"}, general=None)
    data, text = read_card(run)
    assert data.get("datasets") is None and "someone" not in text
    assert (data.eval_results or [])[0].dataset_type == "reviews.csv"


def test_odd_numbers_do_not_break_the_card(run: Path):
    odd = {
        "task": {"accuracy": float("nan"), "macro_f1": 0.5, "loss": None, "note": "x"},
        "latency": {"student": {"batch_1_ms": 0.0}, "teacher": None, "ratio": 3},
    }
    (run / "eval.json").write_text(json.dumps(odd))
    labels = [f"a|b{i}" for i in range(25)]
    write = {**RUN["task"], "labels": labels}
    changed = RUN | {"task": write, "stages": ["gd", {"name": 3, "losses": "x"}], "student": 4}
    (run / "run.json").write_text(json.dumps(changed))
    data, text = read_card(run)
    assert [r.metric_type for r in data.eval_results or ()] == ["f1"]
    assert "| not finite |" in text and "| 3 | - |" in text
    assert r"a\|b19 and 5 more |" in text and "b20" not in text


def test_the_kind_of_run_chooses_the_method(run: Path, tmp_path: Path):
    assert "2106.02241" in model_card(run, repo_id=None)
    assert "2410.18779" in model_card(run, repo_id=None, method=SALT)
    write_run(tmp_path / "salt")
    assert model_card(tmp_path / "salt", repo_id="me/x") == model_card(
        tmp_path / "salt", repo_id="me/x", method=SALT
    )
    write_task_run(run, kind="filter")
    with pytest.raises(HubError, match=r"kind: 'filter': .*known: salt, ernie-tiny"):
        model_card(run, repo_id=None)
    assert ERNIE_TINY.url == "https://arxiv.org/abs/2106.02241"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A recipe's folder with one arm that holds a model, and the pictures of all arms."""
    folder = tmp_path / "out" / "all"
    write_task_run(folder)
    make_model("single_label").save_pretrained(folder)
    write_tokenizer(folder)
    (folder.parent / "eval.json").write_text(json.dumps({"arms": {"all": SCORES}}))
    (folder.parent / "curves.png").write_bytes(b"\x89PNG curves")
    (folder.parent / "arms.png").write_bytes(b"\x89PNG arms")
    return folder


def test_a_push_takes_model_card_and_pictures(hub: HubServer, trained: Path):  # noqa: F811
    push_run(trained, "me/tiny", token=TOKEN)
    files = hub.files("me/tiny")
    assert set(files) == {
        ".gitattributes", "README.md", "arms.png", "config.json", "curves.png", "eval.json",
        "model.safetensors", "recipe.yaml", "run.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert files["arms.png"] == b"\x89PNG arms" and files["curves.png"] == b"\x89PNG curves"
    card = ModelCard(files["README.md"].decode())
    assert isinstance(card.data, ModelCardData)
    assert card.data.pipeline_tag == "text-classification"
    assert "(arms.png)" in card.text and "(curves.png)" in card.text
    assert "2106.02241" in card.text and "2410.18779" not in card.text


def test_pictures_of_a_stranger_stay_where_they_are(hub: HubServer, trained: Path):  # noqa: F811
    (trained.parent / "eval.json").write_text(json.dumps({"arms": {"other": SCORES}}))
    push_run(trained, "me/tiny", token=TOKEN)
    assert not {"arms.png", "curves.png"} & set(hub.files("me/tiny"))


@pytest.mark.slow
def test_a_pushed_classifier_loads_by_the_lines_of_its_card(
    hub: HubServer,  # noqa: F811
    trained: Path,
    tmp_path: Path,
):
    push_run(trained, "me/tiny", token=TOKEN, private=True, revision="v1")
    card = hub.files("me/tiny", "v1")["README.md"].decode()
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    assert code.count('"me/tiny", revision="v1"') == 3
    got = logits_by_http(code, hub.url, tmp_path / "reader", TOKEN)
    here = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    with torch.no_grad():
        assert torch.equal(got, here(input_ids=torch.tensor([[1, 2, 3, 60]])).logits)
