"""Cards of DeQA-Score runs: scorers of texts and images, alone or as arms."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from llmkd.files import write_json, write_text
from llmkd.hub import DEQA, model_card

WORDS, VALUES = ["good", "fair", "bad"], [3.0, 2.0, 1.0]
RUN = {
    "schema": 1,
    "status": "done",
    "kind": "deqa",
    "name": "gauss",
    "seed": 7,
    "data": {
        "source": "acl/tweets",
        "train_rows": 1000,
        "validation_rows": 0,
        "eval_rows": 250,
        "scales": {"a": [-4.0, 4.0], "b": [0.0, 100.0]},
    },
    "levels": {"words": WORDS, "values": VALUES, "prefix": "The sentiment is"},
    "student": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "images": False},
    "label": "gauss_tilt",
    "schedule": {"fidelity_weight": 1.0, "std_mode": "pred", "use_peft": True},
    "settings": {"score_dataset": "acl/tweets", "lora_r": 16, "questions": ["How good?"]},
}
MEASURES = {
    "plcc": {"value": 0.875, "low": 0.85, "high": 0.9, "words": ""},
    "srcc": {"value": 0.8125, "low": None, "high": None, "words": "no interval"},
    "mae": {"value": 0.25, "low": 0.2, "high": 0.3, "words": ""},
    "std_plcc": {"value": None, "low": None, "high": None, "words": "not known"},
}


def write(folder: Path, **changes) -> Path:
    """A run folder as far as the card reads it; the weights are never opened."""
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {**RUN, **changes})
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    write_json(folder / "eval.json", {"held_out": {"rows": 250, "measures": MEASURES}})
    write_text(folder / "recipe.yaml", 'text_template: "Text: {text}"\n')
    return folder


def read_card(folder: Path, repo_id: str | None = "me/rates", **keys) -> tuple[ModelCardData, str]:
    """Metadata and body, by the Hub's own reader."""
    card = ModelCard(model_card(folder, repo_id=repo_id, **keys))
    assert isinstance(card.data, ModelCardData)
    return card.data, card.text


def test_the_card_says_what_was_measured_and_what_not(tmp_path):
    data, text = read_card(write(tmp_path / "gauss"), revision="v1")
    assert data.tags == ["llmkd", "deqa", "scoring", "soft-labels"]
    assert data.pipeline_tag == "text-generation" and data.datasets == ["acl/tweets"]
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    results = {r.metric_type: r.metric_value for r in data.eval_results or ()}
    assert results == {"plcc": 0.875, "srcc": 0.8125, "mae": 0.25}
    for part in (
        "A scorer of texts (`LlamaForCausalLM`)",
        'scorer = Scorer("me/rates", revision="v1")',
        'print(scorer("Put a text here"))',
        "`llmkd score me/rates rows.jsonl`",
        "through the template `Text: {text}`",
        "On held-out rows (250 rows):",
        "| Pearson correlation (PLCC) with the mean rating | 0.875 | 0.850 to 0.900 |",
        "| Spearman correlation (SRCC) with the mean rating | 0.812 | - |",
        "| levels | good (3), fair (2), bad (1) |",
        "Raters' scale: -4 to 4 (a), 0 to 100 (b).",
        "| level targets | gauss_tilt |",
        "| LoRA rank | 16 |",
        "Whether the predicted spread is people's: their spread is not known.",
        "one run, seed 7",
        DEQA.url,
        "@inproceedings{you2025deqa",
    ):
        assert part in text, part
    assert "spread |" not in text.split("## Levels")[0]  # std_plcc has no value


def test_a_scorer_of_images_and_a_folder_without_numbers(tmp_path):
    folder = write(
        tmp_path / "iqa",
        student={"source": "/home/me/model", "images": True},
        schedule={"use_peft": False},
        settings={"score_dataset": "/home/me/rows.jsonl", "lora_r": 16},
    )
    (folder / "eval.json").unlink()
    data, text = read_card(folder, repo_id=None)
    assert data.pipeline_tag == "image-text-to-text" and data.eval_results is None
    assert 'print(scorer(Path("picture.jpg")))' in text and 'Scorer("./iqa")' in text
    assert "/home/me" not in text and "LoRA" not in text and "Agreement" not in text


def test_a_token_in_the_recipe_stays_out(tmp_path):
    secret = "hf_" + "Ab3" * 11 + "Z"
    folder = write(tmp_path / "gauss")
    write_text(folder / "recipe.yaml", f'text_template: "{secret} {{text}}"\n')
    assert secret not in read_card(folder)[1]


@pytest.mark.parametrize("arms", [None, {"a": {}}])
def test_the_card_of_the_run_above_arms_never_passes_for_a_model(tmp_path, arms):
    from llmkd.errors import HubError
    from llmkd.hub import push_run

    folder = write(tmp_path / "run", arms=arms)
    (folder / "config.json").unlink()
    with pytest.raises(HubError):
        push_run(folder, "me/rates", token="hf_" + "Ab3" * 11 + "Z")
