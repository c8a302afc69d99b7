"""Pushing with the real huggingface_hub client over HTTP to the server of hub_server.py."""

from __future__ import annotations

import logging
import pickle
import shutil
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_run import (
    READ_TOKEN,
    TOKEN,
    expected_logits,
    load_code,
    logits_by_http,
    tiny_model,
    tiny_tokenizer,
    write_run,
)
from hub_server import HubServer, Refusal
from huggingface_hub import ModelCard, ModelCardData, constants
from transformers import AutoModelForCausalLM, TrainingArguments

from llmkd.errors import HubError
from llmkd.hub import push, push_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder with a real model, and everything that must not leave it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "salt"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_run(folder)
    (folder / "curves.png").write_bytes(b"\x89PNG tiny")
    (folder / "report.html").write_text("<html></html>")
    torch.save(
        TrainingArguments(output_dir=str(folder), hub_token=TOKEN), folder / "training_args.bin"
    )
    assert TOKEN.encode() in (folder / "training_args.bin").read_bytes()
    for name in ("pytorch_model.bin", "optimizer.pt", "weights.pth", "cache.pkl"):
        (folder / name).write_bytes(pickle.dumps(TOKEN))
    for name in (
        "optimizer.safetensors",
        "trainer_state.json",
        ".model.safetensors.7.part",
        "notes",
    ):
        (folder / name).write_text("stays")
    for name in (
        "checkpoint-2/model.safetensors",
        "teacher/model.safetensors",
        "teacher/config.json",
        ".cache/huggingface/x.json",
        "labels/shard-0.safetensors",
        "tokenizer/vocab.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run for one test to change."""
    return Path(shutil.copytree(trained, tmp_path / "out" / "salt"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server that HF_ENDPOINT points to."""
    with HubServer({TOKEN: "write", READ_TOKEN: "read"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login of this machine, no telemetry (it would call huggingface.co), no Xet."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    # The client reads these variables when it is imported, so the constants have to be changed.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.slow
def test_a_pushed_model_loads_by_the_lines_of_its_card(hub: HubServer, run: Path, tmp_path: Path):
    url = push_run(run, "me/tiny", token=TOKEN, private=True)

    assert url.startswith(f"{hub.url}/me/tiny/commit/")
    assert hub.repos["me/tiny"].private
    code = load_code(hub.files("me/tiny")["README.md"].decode())
    loaded = logits_by_http(code, hub.url, tmp_path / "reader", TOKEN)
    assert torch.equal(loaded, expected_logits(run))


def test_only_what_belongs_to_the_model_goes_up(hub: HubServer, run: Path):
    push_run(run, "me/tiny", token=TOKEN)

    assert set(hub.files("me/tiny")) == {
        ".gitattributes", "README.md", "additional_chat_templates/tool.jinja", "config.json",
        "curves.png", "eval.json", "generation_config.json", "metrics.jsonl", "model.safetensors",
        "recipe.yaml", "report.html", "run.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert hub.files("me/tiny")["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert [call.method for call in hub.calls if "lfs-storage" in call.path] == ["PUT", "PUT"]


def test_the_token_is_nowhere(
    hub: HubServer,
    run: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # logs every request as a curl command
    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    write_run(run, command=f"llmkd salt r.yaml --old_token {TOKEN[:20]}")
    with caplog.at_level(logging.DEBUG):
        url = push_run(run, "me/tiny", token=f" {TOKEN}\n")

    assert any(call.authorization == f"Bearer {TOKEN}" for call in hub.calls)
    assert "commit/main" in caplog.text  # the log was really listened to
    printed = capfd.readouterr()
    assert TOKEN not in caplog.text + printed.out + printed.err + url
    assert not any(TOKEN.encode() in content for content in hub.files("me/tiny").values())
    assert TOKEN[:20] not in (run / "README.md").read_text()


@pytest.mark.parametrize(
    "change, name", [({"command": TOKEN}, "run.json"), ({"git": READ_TOKEN}, "run.json")]
)
def test_a_file_with_a_token_is_not_pushed(
    hub: HubServer, run: Path, change: dict[str, str], name: str
):
    write_run(run, **change)
    with pytest.raises(HubError, match=rf"{name}.*a Hub token stands in this file") as caught:
        push_run(run, "me/tiny", token=TOKEN)
    assert not hub.calls
    assert TOKEN not in str(caught.value) and READ_TOKEN not in str(caught.value)


def test_the_pipeline_of_clients_with_xet(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
):
    """With hf_xet installed the client takes another way through the same endpoints. The server
    asks for regular files, since it has no Xet storage."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.lfs = False
    push_run(run, "me/tiny", token=TOKEN)
    assert hub.files("me/tiny")["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_storage_that_does_not_speak_xet(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"(?s)HF_ENDPOINT: .*set HF_HUB_DISABLE_XET=1") as caught:
        push_run(run, "me/tiny", token=TOKEN)
    assert TOKEN not in str(caught.value)


def test_a_bare_name_gets_its_owner(hub: HubServer, run: Path):
    push_run(run, "tiny", token=TOKEN)
    assert 'from_pretrained("me/tiny")' in hub.files("me/tiny")["README.md"].decode()


def test_a_revision_is_a_branch_and_stands_in_the_card(hub: HubServer, run: Path):
    for _ in range(2):
        push_run(run, "me/tiny", token=TOKEN, revision="v1", commit_message="first")
    assert set(hub.files("me/tiny", "main")) == {".gitattributes"}
    card = hub.files("me/tiny", "v1")["README.md"].decode()
    assert 'from_pretrained("me/tiny", revision="v1")' in card
    assert len(hub.repos["me/tiny"].branches["v1"]) == 2  # the second push changed nothing


def test_weights_of_an_earlier_push_do_not_shadow_the_new_ones(hub: HubServer, run: Path):
    push_run(run, "me/tiny", token=TOKEN)
    hub.repos["me/tiny"].tree("main")[1]["notes/mine.txt"] = b"kept"
    (run / "model.safetensors").unlink()
    tiny_model().save_pretrained(run, max_shard_size="2KB")
    push_run(run, "me/tiny", token=TOKEN)

    files = hub.files("me/tiny")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert "notes/mine.txt" in files


@pytest.mark.parametrize(
    "repo_id, token, revision, says",
    [
        ("me/tiny", "hf_" + "Wr0" * 12, None, r"does not accept the token \(401\)"),
        ("me/tiny", READ_TOKEN, None, r"may not write there \(403\)"),
        ("stranger/tiny", TOKEN, None, r"may not write there \(403\)"),
        ("me/tiny", TOKEN, "refs/pr/9", r"does not find it \(404\)"),
    ],
)
def test_a_refusal_is_one_error_without_the_token(
    hub: HubServer, run: Path, repo_id: str, token: str, revision: str | None, says: str
):
    with pytest.raises(HubError, match=says) as caught:
        push_run(run, repo_id, token=token, revision=revision)
    text = "".join(traceback.format_exception(caught.value))
    assert str(caught.value).startswith(f"hub_model_id: {repo_id!r}")
    assert f"the model is whole in {run}" in text
    assert token not in text and "HfHubHTTPError" not in text


@pytest.mark.parametrize(
    "path", ["/api/models/me/tiny/commit", "/api/models/me/tiny", "/lfs-storage"]
)
def test_an_answer_that_quotes_the_token_does_not_leak_it(
    hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture, path: str
):
    hub.broken[path] = Refusal(507, None, f"no room for the owner of Bearer {TOKEN}")
    with pytest.raises(HubError, match=r"the Hub answered 507: .*no room") as caught:
        push_run(run, "me/tiny", token=TOKEN)
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "***" in text and TOKEN not in text


def test_nobody_listens(run: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:word@127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    start = time.monotonic()
    with pytest.raises(
        HubError, match=r"HF_ENDPOINT.*the connection failed: ConnectError"
    ) as caught:
        push_run(run, "me/tiny", token=TOKEN)
    assert time.monotonic() - start < 5
    assert TOKEN not in str(caught.value) and "word@" not in str(caught.value)


def test_somebody_listens_and_never_answers(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(push, "REACH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(HubError, match="the connection failed: ReadTimeout"):
            push_run(run, "me/tiny", token=TOKEN)


def test_what_is_no_finished_model_is_refused(run: Path, hub: HubServer, tmp_path: Path):
    def refusal(folder: Path) -> str:
        with pytest.raises(HubError) as caught:
            push_run(folder, "me/tiny", token=TOKEN)
        return str(caught.value)

    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    write_run(run, status="running")
    assert "not finished (status 'running'" in refusal(run)
    write_run(run)
    (run / "model.safetensors").rename(run / "pytorch_model.bin")
    assert "model.safetensors missing" in refusal(run)
    (run / "run.json").unlink()
    assert "holds no run.json" in refusal(run)
    write_run(run.parent, arms=["salt", "baseline"])
    assert f"push one of its models: {run}" in refusal(run.parent)
    assert not hub.calls


def test_an_arm_brings_the_picture_of_its_recipe(hub: HubServer, run: Path):
    write_run(run.parent, arms=["salt", "baseline"])
    (run / "curves.png").unlink()
    (run.parent / "curves.png").write_bytes(b"\x89PNG three curves")
    push_run(run, "me/tiny", token=TOKEN)
    assert hub.files("me/tiny")["curves.png"] == b"\x89PNG three curves"
    assert b"(curves.png)" in hub.files("me/tiny")["README.md"]


@pytest.mark.slow
def test_an_adapter_is_pushed_and_loads(hub: HubServer, run: Path, tmp_path: Path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    base, out = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(run, base)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        loaded, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(str(out))
    tiny_tokenizer().save_pretrained(out)
    write_run(out)
    push_run(out, "me/lora", token=TOKEN)

    files = hub.files("me/lora")
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert isinstance(card.data, ModelCardData)
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert f"`{base}` must exist" in card.text
    got = logits_by_http(load_code(card.content), hub.url, tmp_path / "reader", None)
    with torch.no_grad():
        here = AutoPeftModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(got, here(input_ids=torch.tensor([[1, 2, 3, 60]])).logits)
    assert not torch.equal(got, expected_logits(base))
