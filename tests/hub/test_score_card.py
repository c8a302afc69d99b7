"""Cards of DeQA-Score runs: scorers of texts and images, alone or as arms."""

from dataclasses import replace
from pathlib import Path

import pytest
from hub_run import load_code
from huggingface_hub import ModelCard, ModelCardData
from score_kit import PREFIX, score_llama, score_tokenizer
from score_kit import VALUES as VALUES_5

from llmkd.data.levels import QUALITY, find_levels
from llmkd.errors import HubError
from llmkd.files import write_json, write_text
from llmkd.hub import DEQA, model_card, push_run
from llmkd.models.scorer import Scorer

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
        "counts": {"one_rater": 1200, "all_agree": 0},
    },
    "levels": {"words": WORDS, "values": VALUES, "prefix": "The sentiment is"},
    "student": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "images": False},
    "label": "gauss_tilt(floor=0.1)",
    "schedule": {"fidelity_weight": 1.0, "std_mode": "pred", "use_peft": True},
    "settings": {
        "score_dataset": "acl/tweets",
        "label": "gauss_tilt",
        "lora_r": 16,
        "questions": ["How good?", "Rate it."],
        "pair_loss": "fidelity",
    },
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
        "`score` and `std` are in levels, 1 to 3.",
        "`llmkd score me/rates rows.jsonl --revision v1`",
        "through the template `Text: {text}`",
        "On held-out rows (250 rows):",
        "| Pearson correlation (PLCC) with the mean rating | 0.875 | 0.850 to 0.900 |",
        "| Spearman correlation (SRCC) with the mean rating | 0.812 | - |",
        "| levels | good (3), fair (2), bad (1) |",
        "| asked | How good? (2 wordings in training, this one for scoring) |",
        "Raters' scale: -4 to 4 (a), 0 to 100 (b).",
        "Counted: one_rater 1,200.",
        "| level targets | gauss_tilt(floor=0.1) |",
        "| loss on pairs | fidelity |",
        "| LoRA rank | 16 |",
        "Whether the predicted spread is people's: their spread is not known.",
        "one run, seed 7",
        DEQA.url,
        "@inproceedings{you2025deqa",
    ):
        assert part in text, part
    assert "spread |" not in text.split("## Levels")[0]  # std_plcc has no value
    assert text.count("| level targets |") == 1 and "Beside the other arms" not in text


def test_a_scorer_of_images_and_a_folder_without_numbers(tmp_path):
    folder = write(
        tmp_path / "iqa",
        student={"source": "/home/me/model", "images": True},
        schedule={"use_peft": False},
        settings={
            "score_dataset": "/home/me/rows.jsonl",
            "image_column": "image",
            "text_template": None,
            "lora_r": 16,
        },
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


PAIR = '("Put a text here", "and its pair here")'
INPUTS = {
    "text": ({"text_column": "tweet"}, '"Put a text here"'),
    "pair": ({"text_column": "src", "text_pair_column": "mt"}, PAIR),
    "pair in a template": (
        {"text_pair_column": "mt", "text_template": "{text} => {text_pair}"},
        PAIR,
    ),
    "other columns": (
        {"text_template": "{title}: {body}"},
        '{"text": "Put a text here, as the template makes it"}',
    ),
    "chat": (
        {"messages_column": "messages"},
        '[{"role": "user", "content": "Put a question here"}, '
        '{"role": "assistant", "content": "and its answer here"}]',
    ),
    "image": ({"image_column": "image"}, 'Path("picture.jpg")'),
    "image and text": (
        {"image_column": "image", "text_column": "caption"},
        '{"images": ["picture.jpg"], "text": "Put its text here"}',
    ),
}


@pytest.mark.parametrize("what", INPUTS)
def test_the_lines_that_score_take_what_the_training_had(tmp_path, what):
    settings, asked = INPUTS[what]
    folder = write(tmp_path / "gauss", settings=settings)
    write_text(folder / "recipe.yaml", "")
    text = read_card(folder)[1]
    code = load_code(text)
    assert f"print(scorer({asked}))" in code
    kinds = []
    levels = find_levels(score_tokenizer(), QUALITY, VALUES_5, PREFIX)
    scorer = Scorer(score_llama(), levels, processor=score_tokenizer(chat=True))
    scorer.saved = replace(scorer.saved, template=settings.get("text_template"))
    lines = code[code.index("print(") :].replace("print(scorer(", "kinds.append(scorer.row(", 1)
    exec(lines, {"kinds": kinds, "scorer": scorer, "Path": Path})
    given = "images" if "image" in what else "messages" if what == "chat" else "text"
    assert kinds[0][given]
    if what == "pair in a template":
        assert kinds[0]["text"] == "Put a text here => and its pair here"


def test_arms_stand_beside_each_other_and_pictures_are_shown(tmp_path):
    folder = write(tmp_path / "run" / "gauss")
    (folder / "mean.png").write_bytes(b"")
    other = {"plcc": {"value": 0.5, "low": 0.4, "high": 0.6, "words": ""}}
    write_json(tmp_path / "run" / "eval.json", {"arms": {"bin": other, "gauss": MEASURES}})
    text = read_card(folder)[1]
    assert "| **gauss** (this model) | 0.875 | 0.812 | 0.250 | - | - |" in text
    assert "| bin | 0.500 | - | - | - | - |" in text
    assert "(mean.png)" in text and "(std.png)" not in text


@pytest.mark.parametrize(("most", "passes"), [(2, False), (-1, True)])
def test_passes_are_told_only_where_they_decide(tmp_path, most, passes):
    settings = {"num_train_epochs": 3.0, "max_steps": most}
    text = read_card(write(tmp_path / "gauss", settings=settings, steps=2))[1]
    assert "| steps | 2 |" in text
    assert ("| passes over the rows | 3 |" in text) is passes


def test_one_scale_is_said_once_and_a_loss_that_is_off_has_no_options(tmp_path):
    data = {"scales": {"a": [0.0, 10.0], "b": [0.0, 10.0]}}
    schedule = {"fidelity_weight": 0.0, "std_mode": "pred"}
    text = read_card(write(tmp_path / "gauss", data=data, schedule=schedule))[1]
    assert "Raters' scale: 0 to 10.\n" in text
    assert "weight of the loss on pairs | 0 |" in text
    assert "predicted gap" not in text and "| loss on pairs |" not in text


@pytest.mark.parametrize(
    ("arms", "way"), [(["a"], "push one of its models: .*run/a"), (None, "safetensors")]
)
def test_the_card_of_the_run_above_arms_never_passes_for_a_model(tmp_path, arms, way):
    folder = write(tmp_path / "run", arms=arms)
    (folder / "config.json").unlink()
    with pytest.raises(HubError, match=f"(?s)no whole model in it.*{way}"):
        push_run(folder, "me/rates", token="hf_" + "Ab3" * 11 + "Z")
    assert not (folder / "README.md").exists()
