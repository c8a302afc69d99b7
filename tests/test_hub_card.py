"""The model card, the check before the first step, and taking tokens out of text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub_run import HELD_OUT, LM_EVAL, RUN, TOKEN, write_run
from huggingface_hub import ModelCard, ModelCardData, constants
from hypothesis import given
from hypothesis import strategies as st

from llmkd.errors import HubError
from llmkd.hub import SALT, check_hub, model_card, redact


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may be logged in; the tests are not."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything the card reads; the card never opens the weights."""
    folder = tmp_path / "out" / "salt"
    write_run(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "curves.png").write_bytes(b"")
    return folder


def read_card(folder: Path, repo_id: str | None) -> tuple[ModelCardData, str]:
    """Metadata and body, by the Hub's own reader."""
    card = ModelCard(model_card(folder, repo_id=repo_id, method=SALT))
    assert isinstance(card.data, ModelCardData)
    return card.data, card.text


def test_the_card_of_a_whole_run(run: Path):
    data, text = read_card(run, "me/tiny")

    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["llmkd", "salt"]
    assert data.model_name == "tiny"
    assert data.get("base_model") is data.get("datasets") is data.get("license") is None
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results or ()}
    assert scores == {
        ("held-out part of stdlib", "loss"): 3.5121,
        ("held-out part of stdlib", "bits_per_byte"): 1.725,
        ("held-out part of stdlib", "accuracy"): 0.371,
        ("local_arc", "acc"): 0.25,
    }
    for part in (
        "first 20 of 100 optimizer steps", "with ω = 0.667", "https://arxiv.org/abs/2410.18779",
        "@article{rawat2024little", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "[HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M)",
        "feedbeef00000001", "| training tokens | 256,000 |", "| peak learning rate | 0.002 |",
        "![held-out loss during training](curves.png)", "| 100 | 256,000 | 4.0000 | 0.3333 |",
        "| peak memory | 1.00 GiB |",
        "| local_arc | acc | 24 of 2,376 | 0 | 0.2500 ± 0.0125 |",
        "| torch | 2.13.0 |", "one run, seed 17",
    ):  # fmt: skip
        assert part in text, part
    assert "no benchmark" not in text and "no baseline was trained" in text


def test_the_loss_table_stays_short_and_keeps_both_ends(run: Path):
    card = model_card(run, repo_id="me/tiny", method=SALT)
    steps = re.findall(r"^\| (\d+) \| [\d,]+ \| [\d.]+ \| [\d.]+ \|$", card, re.MULTILINE)
    assert len(steps) == 12 and steps[0] == "4" and steps[-1] == "100"


def test_an_arm_stands_beside_the_other_models(run: Path):
    arms = {
        "salt": {**HELD_OUT, "tokens_to_baseline": 210000.4, "tokens": 7},
        "baseline": {"loss": 3.6021, "bits_per_byte": 1.77, "accuracy": 0.36},
    }
    (run.parent / "eval.json").write_text(json.dumps({"arms": arms}))
    write_run(run.parent / "teacher", name="teacher")
    card = model_card(run, repo_id="me/tiny", method=SALT)

    assert "| **salt** (this model) | 3.5121 | 1.7250 | 0.3710 | 210,000 |" in card
    assert "| baseline | 3.6021 | 1.7700 | 0.3600 | - |" in card
    assert "| teacher | 3.5121 |" in card
    assert "no baseline" not in card


@pytest.mark.parametrize("where, name", [("above", "salt"), ("own", "student")])
def test_benchmarks_stand_beside_those_of_the_other_models(run: Path, where: str, name: str):
    row = {
        "values": {"baseline": 0.2, name: 0.25, "teacher": 0.3},
        "gap_closed": {name: 0.5},
    }
    compared = {"side_by_side": {"tasks": {"local_arc": {"acc": row}}}}
    if where == "above":
        above = {"arms": {"salt": HELD_OUT, "baseline": HELD_OUT}, "lm_eval": compared}
        (run.parent / "eval.json").write_text(json.dumps(above))
    else:
        own = {"held_out": HELD_OUT, "lm_eval": LM_EVAL | compared}
        (run / "eval.json").write_text(json.dumps(own))
    card = model_card(run, repo_id="me/tiny", method=SALT)
    head = "| task | metric | documents | shots | this model | baseline | teacher | gap closed |"
    line = "| local_arc | acc | 24 of 2,376 | 0 | 0.2500 ± 0.0125 | 0.2000 | 0.3000 | 50% |"
    assert head in card and line in card


def test_scores_of_a_stranger_in_the_folder_above_are_not_taken(run: Path):
    (run.parent / "eval.json").write_text(json.dumps({"arms": {"other": HELD_OUT}}))
    assert "| other |" not in model_card(run, repo_id="me/tiny", method=SALT)


@pytest.mark.parametrize(
    "name, schedule, says",
    [
        ("baseline", {"kd_steps": 0, "max_steps": 9, "kd_weight": 0.667}, "It is the baseline in"),
        ("rkd", {"kd_steps": 9, "max_steps": 9, "kd_weight": 0.667}, "comparison run RKD"),
        ("teacher", {}, "serves as teacher"),
        ("salt", {}, "Method: [SALT"),
    ],
)
def test_the_card_says_which_part_the_model_played(
    tmp_path: Path, name: str, schedule: dict[str, float], says: str
):
    write_run(tmp_path, name=name, schedule=schedule)
    assert says in model_card(tmp_path, repo_id=None, method=SALT)


def test_the_card_of_a_folder_that_tells_nothing(tmp_path: Path):
    folder = tmp_path / "bare"
    folder.mkdir()
    data, text = read_card(folder, None)
    assert data.eval_results is None or data.eval_results == []
    assert data.tags == ["llmkd", "salt"]
    assert 'AutoModelForCausalLM.from_pretrained("./bare")' in text
    assert "AutoTokenizer" not in text
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == ["How to load it", "What was not measured", "Paper"]


def test_odd_numbers_and_texts_do_not_break_the_card(run: Path):
    odd = {
        "held_out": {"loss": float("nan"), "accuracy": 0.5, "tokens": None},
        "lm_eval": {"tasks": {"t": {"metrics": {"acc": "x"}}}},
    }
    (run / "eval.json").write_text(json.dumps(odd))
    write_run_data = {**RUN["data"], "source": "/home/someone/private/corpus.jsonl"}
    (run / "run.json").write_text(json.dumps(RUN | {"data": write_run_data, "command": "a | b\nc"}))
    data, text = read_card(run, "me/tiny")
    assert [r.metric_type for r in data.eval_results or ()] == ["accuracy"]
    assert "| not finite |" in text and r"| command | `a \| b c` |" in text
    assert "`corpus.jsonl`" in text and "someone" not in text


def test_a_file_that_is_not_json_is_named(run: Path):
    (run / "eval.json").write_text("{")
    with pytest.raises(HubError, match=r"eval\.json: .*cannot be read \(JSONDecodeError\)"):
        model_card(run, repo_id="me/tiny", method=SALT)


def test_hub_ids_become_metadata_and_local_paths_do_not(run: Path):
    (run.parent / "runs" / "mine").mkdir(parents=True)
    sources = ["HuggingFaceFW/fineweb-edu", "data/corpus.jsonl", "runs/mine", "stdlib"]
    settings = {"dataset_mixture": [{"id": source, "weight": 1} for source in sources]}
    student = {"source": "HuggingFaceTB/SmolLM2-360M"}
    write_run(run, settings=settings, student=student, license="apache-2.0")
    data, text = read_card(run, "me/hf_summarizer")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert data.base_model == "HuggingFaceTB/SmolLM2-360M"
    assert data.license == "apache-2.0"
    assert "Licences" not in text
    assert 'from_pretrained("me/hf_summarizer")' in text  # a name, though it looks like a token


def test_a_mixture_names_its_parts(run: Path):
    parts = [{"id": "org/web", "weight": 0.7}, {"id": "/home/someone/own.jsonl", "weight": 0.3}]
    line = "0.7 × org/web + 0.3 × /home/someone/own.jsonl"  # noqa: RUF001
    write_run(run, data={"source": line}, settings={"dataset_mixture": parts})
    data, text = read_card(run, "me/tiny")
    assert data.datasets == ["org/web"]
    assert "0.7 × [org/web](https://huggingface.co/datasets/org/web) + 0.3 × `own.jsonl`" in text  # noqa: RUF001


@pytest.mark.parametrize(
    "repo_id, token, says",
    [
        (None, TOKEN, "hub_model_id: None: .*needs a repository"),
        ("", TOKEN, "hub_model_id: '': .*needs a repository"),
        ("a/b/c", TOKEN, "hub_model_id: 'a/b/c': Repo id must be in the form"),
        ("me/a--b", TOKEN, r"hub_model_id: 'me/a--b': Cannot have -- or \.\."),
        (TOKEN, None, r"hub_model_id: '\*\*\*': this is a token"),
        ("me/tiny", None, "(?s)hub_token: None: .*hf auth login.*HF_TOKEN.*drop --push_to_hub"),
        ("me/tiny", "  ", "hub_token: None"),
    ],
)
def test_check_hub_refuses(repo_id: str | None, token: str | None, says: str):
    with pytest.raises(HubError, match=says) as caught:
        check_hub(repo_id, token)
    assert TOKEN not in str(caught.value)


def test_check_hub_takes_a_token_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    check_hub("me/tiny", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_hub("tiny", None)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "login").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    check_hub("me/tiny", None)


def test_check_hub_sees_that_the_client_is_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        check_hub("me/tiny", TOKEN)


@given(
    st.text(max_size=30),
    st.text(max_size=30),
    st.from_regex(r"hf_[A-Za-z0-9]{8,40}", fullmatch=True),
)
def test_redact_leaves_no_token(before: str, after: str, token: str):
    assert token not in redact(f"{before}{token}{after}")
    assert token[3:] not in redact(f"{before}{token[3:]}{after}", token[3:])


def test_redact_leaves_the_rest():
    assert (
        redact("hf_hub_download and hf-internal/tiny", None, "", " ")
        == "hf_hub_download and hf-internal/tiny"
    )
    assert redact("Bearer hf_oauth_eyJ.eyK-x_y.sig end") == "Bearer *** end"
    assert redact("ab abc", "ab", "abc") == "*** ***"
    assert redact("https://me:word@hub.org/x") == "https://***@hub.org/x"
