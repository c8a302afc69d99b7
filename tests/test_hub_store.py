"""A label store pushed to the Hub as a dataset, and read from there."""

import shutil
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from test_hub import TOKEN, client, hub  # noqa: F401  (fixtures)

from llmkd.errors import HubError, MissingFileError
from llmkd.hub.datasets import push_store
from llmkd.labels import Store
from llmkd.teachers.stored import store_folder

sys.path.insert(0, str(Path(__file__).parent / "labels"))
from labels_kit import plan, write_store


def test_a_pushed_store_is_the_same_store(hub: HubServer, tmp_path, monkeypatch):  # noqa: F811
    folder = write_store(tmp_path / "store", plan())
    (folder / "recipe.yaml").write_text("dataset: /home/me/secret.txt\n")
    url = push_store(folder, "me/labels", token=TOKEN, private=True)
    assert hub.url in url
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = Store.open(store_folder("me/labels"))
    assert found.manifest == Store.open(folder).manifest
    assert not (found.folder / "recipe.yaml").exists()
    import datasets

    files = [str(path) for path in sorted(found.folder.glob("data/*.arrow"))]
    rows = datasets.load_dataset("arrow", data_files=files, split="train")
    assert len(rows) == len(found)


def test_a_damaged_store_is_not_pushed(hub: HubServer, tmp_path):  # noqa: F811
    folder = write_store(tmp_path / "store", plan())
    shard = sorted(folder.glob("data/*.arrow"))[0]
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(HubError, match="damaged and was not pushed"):
        push_store(folder, "me/labels", token=TOKEN)


def test_what_is_not_there_is_one_error(hub: HubServer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingFileError, match="neither a folder nor a Hub dataset"):
        store_folder("me/nothing")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
