"""A run folder refuses another run and says what is different."""

import pytest

from llmkd.errors import RunFolderError
from llmkd.methods.run_folder import RunFolder

FACTS = {
    "settings": {"seed": 1},
    "data": {"fingerprint": "d1", "selected_rows": None},
    "teacher": {"fingerprint": "t1"},
    "student": {"source": "new llama"},
    "schedule": {"batch_rows": 4},
}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run", main=True)
    folder.begin("key", FACTS, {})
    return folder


@pytest.mark.parametrize(
    "key, settings, rows, words",
    [
        (None, {"seed": 2}, None, r"seed: 1 -> 2\)"),
        (None, {"seed": 1}, "d2", r"rows \(text, tokenizer and packing\): 'd1' -> 'd2'"),
        (None, {"seed": 2}, "d2", r"seed: 1 -> 2, rows"),
        (
            "other",
            {"seed": 1},
            None,
            "same settings.*it had rows d1, teacher t1, student new llama",
        ),
    ],
)
def test_what_differs_is_named(run, key, settings, rows, words):
    with pytest.raises(RunFolderError, match=words):
        run.claim(key, settings, rows=rows)


def test_the_same_run_may_go_on(run):
    run.claim("key", {"seed": 1})
    run.claim(None, {"seed": 1}, rows="d1")


def test_a_run_without_teacher_or_student_facts_is_refused_all_the_same(tmp_path):
    run = RunFolder(tmp_path / "run", main=True)
    run.begin("key", {"settings": {}}, {})
    with pytest.raises(RunFolderError, match="not of the same models"):
        run.claim("other", {})
