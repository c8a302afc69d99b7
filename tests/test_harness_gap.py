"""Gap closed and its errors by hand, several models side by side, and what eval.json keeps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from harness_kit import Kit, value

from llmkd.errors import DataError
from llmkd.evaluation.harness import EvalSettings, merge_eval_json, run_tasks, side_by_side
from llmkd.evaluation.harness_gap import (
    INVERTED,
    NO_GAP,
    UNSURE,
    Score,
    gap_closed,
    influences,
    standard_error,
)
from llmkd.files import read_json, write_json


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    return Kit(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "student, teacher, baseline, higher, closed, note",
    [
        (0.6, 0.8, 0.4, True, 0.5, UNSURE),  # .2 of .4
        (2.5, 2.0, 3.0, False, 0.5, UNSURE),  # -.5 of -1
        (0.3, 0.8, 0.4, True, -0.25, UNSURE),  # below the baseline
        (0.9, 0.8, 0.4, True, 1.25, UNSURE),  # beyond the teacher
        (0.5, 0.2, 0.4, True, -0.5, INVERTED),  # .1 of -.2
        (0.5, 0.4, 0.4, True, None, NO_GAP),
    ],
)
def test_gap_closed_is_worked_out_by_hand(
    student: float, teacher: float, baseline: float, higher: bool, closed: float | None, note: str
) -> None:
    scores = (Score(one, None) for one in (student, teacher, baseline))
    gap = gap_closed(*scores, higher_is_better=higher)
    assert gap.closed == (None if closed is None else pytest.approx(closed))
    assert gap.note == note


def test_a_gap_inside_the_combined_error_is_none() -> None:
    # sqrt(.03^2 + .04^2) = .05
    student, baseline = Score(0.5, 0.03), Score(0.50, 0.03)
    assert gap_closed(student, Score(0.549, 0.04), baseline).closed is None
    assert gap_closed(student, Score(0.551, 0.04), baseline).closed == pytest.approx(0.0)


def test_shared_documents_are_compared_in_pairs() -> None:
    # ten documents between 1 and 10; the teacher is better by .1 or .3 on each: gap -.2, and the
    # deviations are .1, so its error is sqrt(10 * .01 / 90) = 1/30. Each score alone: +-.957
    base = [float(n) for n in range(1, 11)]
    teach = [b - (0.1 if n % 2 else 0.3) for n, b in enumerate(base)]
    learn = [b - 0.1 for b in base]
    scores = []
    for answers in (learn, teach, base):
        mean = sum(answers) / 10
        spread = influences("loss", mean, answers)
        scores.append(Score(mean, standard_error(spread), spread, "same"))
    assert scores[2].stderr == pytest.approx(math.sqrt(82.5 / 90))
    gap = gap_closed(*scores, higher_is_better=False)
    assert gap.paired and gap.stderr == pytest.approx(1 / 30)
    assert gap.closed == pytest.approx(0.5)
    # by the delta method: (0 - .5 * (+-.1)) / -.2 = +-.25 a document
    assert gap.closed_stderr == pytest.approx(math.sqrt(10 * 0.0625 / 90))
    unlike = Score(scores[1].value, scores[1].stderr, scores[1].influence, "other documents")
    assert gap_closed(scores[0], unlike, scores[2], higher_is_better=False).note == NO_GAP


def test_error_of_a_ratio_is_worked_out_by_hand() -> None:
    # 3 nats over 2 bytes and 1 over 2: rate -1 nat/byte, deviations -1 and +1, mean of 2 bytes
    answers = [(-3.0, 2), (-1.0, 2)]
    spread = influences("bits_per_byte", 1 / math.log(2), answers)
    assert spread == pytest.approx((0.5 / math.log(2), -0.5 / math.log(2)))
    assert standard_error(spread) == pytest.approx(0.5 / math.log(2))
    assert influences("median", 2.0, [1.0, 2.0, 9.0]) is None


def test_side_by_side_of_real_models(kit: Kit) -> None:
    models = {
        "student": kit.model("student", seed=1),
        "baseline": kit.model("baseline", seed=2),
        "teacher": kit.model("teacher", uniform=True),  # knows more than random weights do
    }
    compared = side_by_side(
        models, [str(kit.tasks)], settings=EvalSettings(batch_size=4), output=kit.folder / "out"
    )
    row = compared["tasks"]["tiny_rolling"]["bits_per_byte"]
    student, baseline, teacher = (row["values"][name] for name in models)
    assert row["gap"] == pytest.approx(teacher - baseline) and row["gap_paired"]
    closed = (student - baseline) / (teacher - baseline)
    assert row["gap_closed"]["student"] == pytest.approx(closed) and row["note"] is None
    assert row["gap_closed_stderr"]["student"] > 0
    for name, folder in models.items():
        alone = run_tasks(folder, [str(kit.tasks)])
        for task, metric in (("tiny_rolling", "bits_per_byte"), ("tiny_choice", "acc")):
            again = value(compared["results"][name], task, metric)
            assert value(alone, task, metric) == pytest.approx(again, rel=1e-6)
    held = read_json(kit.folder / "out" / "eval.json")["lm_eval"]["side_by_side"]
    assert held["tasks"] == compared["tasks"] and "results" not in held


def test_eval_json_keeps_what_it_held(tmp_path: Path) -> None:
    before = {"held_out": {"loss": 3.5}, "arms": {"salt": {"loss": 3.4}}}
    write_json(tmp_path / "eval.json", before)
    merge_eval_json(tmp_path, {"tasks": {"a": {"n": 1}, "b": {"n": 2}}})
    merge_eval_json(tmp_path, {"tasks": {"b": {"n": 3}}})
    two = {"models": {"student": "s"}, "seconds": 1.0}
    merge_eval_json(tmp_path, {"side_by_side": two | {"tasks": {"a": {}}}})
    merge_eval_json(tmp_path, {"side_by_side": two | {"tasks": {"b": {}}}})
    held = read_json(tmp_path / "eval.json")
    assert {key: held[key] for key in before} == before
    assert held["lm_eval"]["tasks"] == {"a": {"n": 1}, "b": {"n": 3}}
    assert held["lm_eval"]["side_by_side"]["tasks"] == {"a": {}, "b": {}}
    other = {"models": {"student": "another"}, "seconds": 1.0, "tasks": {"c": {}}}
    merge_eval_json(tmp_path, {"side_by_side": other})
    assert read_json(tmp_path / "eval.json")["lm_eval"]["side_by_side"] == other


@pytest.mark.parametrize("text", ["{half", "[1, 2]", '{"lm_eval": 7}'])
def test_a_foreign_eval_json_stops_before_any_work(kit: Kit, text: str) -> None:
    model = kit.model("one")
    (model / "eval.json").write_text(text)
    with pytest.raises(DataError, match=r"eval\.json"):
        run_tasks(model, [str(kit.tasks)], output=model)
    assert (model / "eval.json").read_text() == text


def test_other_ranks_write_nothing(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("one")
    monkeypatch.setenv("RANK", "1")
    assert run_tasks(model, [kit.choice], output=model) == {}
    assert not (model / "eval.json").exists()
