"""A mistyped path is a mistyped path: no question to the Hub, and the folder meant is named."""

import huggingface_hub
import pytest
import transformers

from llmkd.data import DataConfig, load_documents, load_tokenizer
from llmkd.data.places import means_path, way_to
from llmkd.errors import LlmkdError, MissingFileError
from llmkd.teachers.loading import load_config, load_model
from llmkd.teachers.stored import store_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with `runs/labels`, and no way to the Hub."""
    (tmp_path / "runs" / "labels" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_owner_and_name_is_a_hub_id_unless_the_owner_is_a_folder_here(here):
    assert not means_path("me/labels") and not means_path("gpt2")
    assert means_path("runs/labls") and means_path("./x") and means_path("~/x")
    assert means_path("/x/y") and means_path("a/b/c")


def test_the_folder_meant_is_named_or_else_what_there_is(here):
    assert way_to("runs/labls")[0] == f"did you mean {here / 'runs' / 'labels'}?"
    assert way_to("rnus/labels/data")[0] == f"did you mean {here / 'runs' / 'labels' / 'data'}?"
    only = f"the nearest folder there is: {here / 'runs'} (it holds labels)"
    assert way_to("runs/zzz/deep") == [only]


@pytest.mark.parametrize(
    "ask",
    [
        store_folder,
        lambda name: load_config(name, None, "key"),
        lambda name: load_model(name, key="key"),
        lambda name: load_tokenizer(name),
        lambda name: load_documents(DataConfig(dataset=name)),
    ],
    ids=["store", "config", "model", "tokenizer", "dataset"],
)
def test_a_mistyped_folder_is_not_asked_of_the_hub(here, monkeypatch, ask):
    def refuse(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr("llmkd.data.sources.load_dataset", refuse)
    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", refuse)
    with pytest.raises(LlmkdError) as caught:
        ask("runs/labls")
    error = str(caught.value)
    assert "no such f" in error and f"did you mean {here / 'runs' / 'labels'}?" in error


def test_a_hub_store_that_cannot_be_reached_may_have_been_a_folder(here, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(MissingFileError) as caught:
        store_folder("rnus/labels")
    error = str(caught.value)
    assert "no such folder" in error and "no network" in error
    assert f"if it is a folder: did you mean {here / 'runs' / 'labels'}?" in error
    assert "if it is a Hub dataset" in error
