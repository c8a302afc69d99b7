"""Which commit a Hub model is at, told from the cache alone; and its fingerprint with it."""

import pytest
from huggingface_hub import constants

from llmkd.teachers.loading import commit_of, model_fingerprint

OLD, NEW, PULL = "a" * 40, "b" * 40, "c" * 40
NAME = "owner/model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache as huggingface_hub lays it out: two commits, refs, one without a config."""
    repo = tmp_path / "hub" / "models--owner--model"
    for commit in (OLD, NEW):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / ".no_exist" / PULL).mkdir(parents=True)
    (repo / ".no_exist" / PULL / "config.json").touch()
    for ref, commit in {"main": NEW, "v1": OLD, "refs/pr/3": PULL, "aaaaaaa": OLD}.items():
        path = repo / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


@pytest.mark.parametrize(
    "revision, commit",
    [(None, NEW), ("main", NEW), ("v1", OLD), ("aaaaaaa", OLD), (OLD, OLD), ("d" * 40, "d" * 40)],
)
def test_the_commit_of_a_revision(cache, revision, commit):
    assert commit_of(NAME, revision) == commit


@pytest.mark.parametrize("revision", ["refs/pr/3", "never-fetched"])
def test_what_was_never_fetched_has_none(cache, revision):
    assert commit_of(NAME, revision) is None


@pytest.mark.parametrize("name", ["owner/other", "no/such/id", "./gone/folder", "bad name"])
def test_another_name_has_none(cache, name):
    assert commit_of(name) is None


def test_a_local_folder_has_none_even_inside_the_cache(cache, tmp_path, monkeypatch):
    assert commit_of(str(cache / "snapshots" / NEW)) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert commit_of(NAME) is None and commit_of(NAME, OLD) is None


def test_the_fingerprint_moves_with_the_branch(cache):
    before = model_fingerprint(NAME, commit_of(NAME))
    (cache / "refs" / "main").write_text(OLD)
    after = model_fingerprint(NAME, commit_of(NAME))
    assert before != after == model_fingerprint(NAME, OLD)
