"""Rated rows: what can stand in a table, scales, splits, raters, and what is refused by name."""

import csv
import io
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from llmkd.data.score_config import ScoreDataConfig
from llmkd.data.score_images import open_image
from llmkd.data.score_labels import Said, Scale, Tally, keep_raters, on_levels
from llmkd.data.score_rows import load_score_rows, stds_of
from llmkd.errors import DataError, MissingFileError, RecipeError

VALUES = (5.0, 4.0, 3.0, 2.0, 1.0)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(config, values=VALUES):
    said = []
    return load_score_rows(config, said.append, values=values), said


def rated(tmp_path, rows, *, values=VALUES, **keys):
    """Rows of a file that is the training split; two good rows are held out."""
    column = next(iter(set(rows[0]) - {"text"}))
    keys = {f"{column}_column": column, **keys}
    name = write(tmp_path / "train.jsonl", rows)
    other = write(tmp_path / "eval.jsonl", [{**rows[0], "text": f"e{n}"} for n in range(2)])
    config = ScoreDataConfig(score_dataset=name, score_eval_dataset=other, **keys)
    return load(config, values)


def test_ratings_become_levels_by_a_known_scale(tmp_path):
    rows = [{"text": "a", "ratings": [-4, 0, 4, 2]}, {"text": "b", "ratings": [1]}]
    found, said = rated(tmp_path, rows, score_low=-4, score_high=4)
    a, b = found.train
    assert a["ratings"] == [1, 3, 5, 4] and a["mean"] == 3.25 and a["n"] == 4
    assert a["std"] == pytest.approx(np.sqrt(35 / 12))  # squares 81 + 1 + 49 + 9 = 140, / 16 / 3
    assert (b["mean"], b["std"], b["n"]) == (3.5, None, 1)  # one rater shows no spread
    assert found.counts == {"one_rater": 1} and found.scales == {None: Scale(-4, 4, True)}
    assert any("2 to train on and 2 held out" in line for line in said)


def test_mean_std_and_n(tmp_path):
    rows = [{"text": "a", "m": 50, "s": 10, "n": 4}, {"text": "b", "m": 100, "s": None, "n": None}]
    name = write(tmp_path / "t.jsonl", rows * 2)
    config = ScoreDataConfig(
        score_dataset=name,
        mean_column="m",
        std_column="s",
        n_column="n",
        score_low=0,
        score_high=100,
        eval_fraction=0.5,
    )
    found, _ = load(config)
    by_text = {row["text"]: row for row in (*found.train, *found.held_out)}
    assert by_text["a"]["mean"] == 3 and by_text["a"]["std"] == pytest.approx(0.4)
    assert by_text["a"]["n"] == 4 and by_text["b"]["mean"] == 5 and by_text["b"]["std"] is None
    both = [by_text["a"], by_text["b"]]
    assert stds_of(both).tolist() == pytest.approx([0.4, 0]) and stds_of(both[1:]) is None


def test_ascending_values_keep_the_direction_of_the_scale(tmp_path):
    rows = [{"text": "a", "mean": 0}, {"text": "b", "mean": 10}]
    found, _ = rated(tmp_path, rows, values=(1.0, 2.0, 3.0))
    assert [row["mean"] for row in found.train] == [1, 3]


def test_probabilities_and_logits_need_no_scale(tmp_path):
    found, _ = rated(tmp_path, [{"text": "a", "probs": [0, 0.5, 0.5, 0, 0]}])
    (row,) = found.train
    assert row["mean"] == 3.5 and row["std"] == 0.5 and found.scales == {}
    logits = np.log([[0.2, 0.8, 1e-9, 1e-9, 1e-9], [0.6, 0.4, 1e-9, 1e-9, 1e-9]]).tolist()
    several = {"text": "a", "logits": logits}
    found, _ = rated(tmp_path, [several])
    assert found.train[0]["probs"] == pytest.approx([0.4, 0.6, 0, 0, 0], abs=1e-6)


def test_the_scales_of_groups_are_said(tmp_path):
    rows = [{"text": f"{n}", "mean": n, "set": "ab"[n % 2]} for n in range(4)]
    keys = {"score_dataset": write(tmp_path / "rows.jsonl", rows), "mean_column": "mean"}
    keys |= {"group_column": "set", "eval_fraction": 0.5}
    _, said = load(ScoreDataConfig(**keys, score_low=0, score_high=4))
    assert "raters' scale of every group: 0 to 4, given" in said
    scales = {"a": [0, 4], "b": [0, 5]}
    _, said = load(ScoreDataConfig(**keys, score_scales=scales))
    lines = [f"raters' scale of {name}: 0 to {high}, given" for name, (_, high) in scales.items()]
    assert [line for line in said if line.startswith("raters' scale")] == lines


def test_the_scale_is_read_off_the_training_rows_alone(tmp_path):
    name = write(tmp_path / "t.jsonl", [{"text": "a", "mean": 2}, {"text": "b", "mean": 6}])
    other = write(tmp_path / "e.jsonl", [{"text": "c", "mean": 4}, {"text": "d", "mean": 9}])
    keys = {"score_dataset": name, "score_eval_dataset": other, "mean_column": "mean"}
    found, said = load(ScoreDataConfig(**keys))
    assert found.scales == {None: Scale(2, 6, False)}
    assert [row["mean"] for row in found.train] == [1, 5]
    assert [row["mean"] for row in found.held_out] == [3, 5] and found.counts["clipped"] == 1
    assert any("2 to 6, read off" in line for line in said)
    known = ScoreDataConfig(**keys, score_low=2, score_high=6)
    with pytest.raises(DataError, match=r"score_eval_dataset .*row 1, mean: 9\.0: lies outside"):
        load(known)


def test_each_group_may_have_its_own_scale(tmp_path):
    rows = [
        {"text": f"{g}{n}", "mean": m, "g": g}
        for g, ms in (("x", (0, 100)), ("y", (-4, 4)))
        for n, m in enumerate(ms)
    ]
    name = write(tmp_path / "t.jsonl", rows)
    keys = {"score_dataset": name, "score_eval_dataset": name, "mean_column": "mean"}
    keys["group_column"] = "g"
    found, _ = load(ScoreDataConfig(**keys, scale_per_group=True))
    assert [row["mean"] for row in found.train] == [1, 5, 1, 5]
    assert found.scales["y"] == Scale(-4, 4, False)
    found, _ = load(ScoreDataConfig(**keys, score_scales='{"x": [0, 200], "y": [-4, 4]}'))
    assert [row["mean"] for row in found.train] == [1, 3, 1, 5]


@pytest.mark.parametrize(
    "bad, column, problem",
    [
        ([1, 6], "ratings", r"row 1, ratings: 6\.0: lies outside the scale 1 to 5"),
        ([1, float("nan")], "ratings", "row 1, ratings: nan: is NaN"),
        ([], "ratings", "row 1, ratings: .*has no rating"),
        ([2, None], "ratings", "row 1, ratings: None: a rating is missing"),
        (0.5, "mean", r"row 1, mean: 0\.5: lies outside"),
        (None, "mean", "row 1, mean: None: has no rating"),
        (float("nan"), "mean", "row 1, mean: nan: is NaN"),
        ([0.5, 0.5], "probs", "row 1, probs: .*2 numbers for 5 levels"),
        ([0.5, 0.5, 0.5, 0, 0], "probs", "row 1, probs: .*sum to one"),
        ([1.5, -0.5, 0, 0, 0], "probs", "row 1, probs: .*at least 0"),
    ],
)
def test_labels_that_are_none(tmp_path, bad, column, problem):
    good = {"ratings": [1, 2], "mean": 2, "probs": [1, 0, 0, 0, 0]}[column]
    rows = [{"text": "a", column: good}, {"text": "b", column: bad}]
    keys = {} if column == "probs" else {"score_low": 1, "score_high": 5}
    with pytest.raises(DataError, match=problem):
        rated(tmp_path, rows, **keys)


def test_a_negative_std_is_refused_and_zero_is_counted(tmp_path):
    rows = [{"text": "a", "m": 1, "s": 0.0}, {"text": "b", "m": 5, "s": 0.3}]
    keys = {"mean_column": "m", "std_column": "s", "eval_fraction": 0.5}
    name = write(tmp_path / "t.jsonl", rows)
    config = ScoreDataConfig(score_dataset=name, score_low=1, score_high=5, **keys)
    assert load(config)[0].counts == {"all_agree": 1}
    bad = write(tmp_path / "u.jsonl", [rows[0], {**rows[1], "s": -0.1}])
    with pytest.raises(DataError, match=r"row 1, s: -0\.1: a standard deviation"):
        load(ScoreDataConfig(score_dataset=bad, **keys))


def test_all_ratings_equal_needs_the_scale(tmp_path):
    rows = [{"text": t, "ratings": [3, 3, 3]} for t in "ab"]
    with pytest.raises(RecipeError, match="all ratings in the training rows are 3"):
        rated(tmp_path, rows)
    found, _ = rated(tmp_path, rows, score_low=1, score_high=5)
    assert {row["std"] for row in found.train} == {0.0} and found.counts == {"all_agree": 4}


def test_a_csv_holds_lists_as_text(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([["text", "ratings"], ["a", "[1, 2]"], ["b", "[5, 5]"]])
    keys = {"score_dataset": str(path), "ratings_column": "ratings"}
    found, _ = load(ScoreDataConfig(**keys, score_eval_dataset=str(path)))
    assert [row["ratings"] for row in found.train] == [[1, 2], [5, 5]]
    assert found.counts["held_out_in_train"] == 2


def test_raters_kept_thin_the_training_rows_only(tmp_path):
    rows = [{"text": str(n), "ratings": [1, 2, 3, 4, 5]} for n in range(6)]
    rows += [{"text": "few", "ratings": [1, 5]}]
    keys = {"score_low": 1, "score_high": 5}
    found, _ = rated(tmp_path, rows, raters_kept=3, **keys)
    assert [row["n"] for row in found.train] == [3] * 6 + [2]
    assert [row["n"] for row in found.held_out] == [5, 5] and found.counts == {"fewer_raters": 1}
    kept = {tuple(row["ratings"]) for row in found.train}
    assert len(kept) > 2  # not the first three of each
    again, _ = rated(tmp_path, rows, raters_kept=3, **keys)
    other, _ = rated(tmp_path, rows, raters_kept=3, raters_seed=1, **keys)
    assert again.fingerprint == found.fingerprint != other.fingerprint


@given(st.integers(1, 8), st.integers(0, 99), st.integers(0, 99))
def test_more_raters_hold_the_fewer(count, seed, row):
    said = Said(ratings=tuple(float(n) for n in range(8)))
    fewer, more = (keep_raters(said, n, seed, row).ratings for n in (count, min(count + 1, 8)))
    assert len(fewer) == count and set(fewer) <= set(more) and list(fewer) == sorted(fewer)


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=9))
def test_the_mean_of_moved_ratings_is_the_moved_mean(ratings):
    said = Said(ratings=tuple(ratings))
    row = on_levels(said, Scale(-4, 4, True), VALUES, 1, Tally(), None)
    assert row["mean"] == pytest.approx(3 + np.mean(ratings) / 2, abs=1e-9)
    if len(ratings) > 1:
        assert row["std"] == pytest.approx(np.std(ratings, ddof=1) / 2, abs=1e-9)


def test_one_input_is_in_one_split(tmp_path):
    rows = [{"text": f"{'T' if n % 2 else 't'} {n // 4}", "mean": n} for n in range(40)]
    name = write(tmp_path / "t.jsonl", rows)
    keys = {"score_dataset": name, "mean_column": "mean", "eval_fraction": 0.3}
    found, _ = load(ScoreDataConfig(**keys, validation_fraction=0.2))
    parts = [
        {row["text"].lower() for row in part}
        for part in (found.train, found.held_out, found.validation)
    ]
    assert [len(part) for part in parts] == [6, 3, 1] and not parts[0] & parts[1]
    assert len(set.union(*parts)) == 10 and "held_out_in_train" not in found.counts
    small, _ = load(ScoreDataConfig(**keys, max_train_rows=5))
    assert len(small.train) == 5 and small.counts["left_out"] == 23


def test_templates_pairs_and_messages(tmp_path):
    row = {"text": "a {b}", "other": "c", "year": 1999, "mean": 1}
    keys = {"mean_column": "mean", "score_low": 0, "score_high": 1}
    name = write(tmp_path / "t.jsonl", [row, {**row, "text": "z"}])
    base = {"score_dataset": name, "score_eval_dataset": name, **keys}
    template = "Text: {text}, {year}: {other}"
    assert load(ScoreDataConfig(**base, text_template=template))[0].train[0]["text"] == (
        "Text: a {b}, 1999: c"
    )
    pair = ScoreDataConfig(**base, text_column="text", text_pair_column="other")
    assert load(pair)[0].train[0]["text"] == "a {b}\n\nc"
    with pytest.raises(DataError, match=r"text_template: 'nope': .* has no such column"):
        load(ScoreDataConfig(**base, text_template="{nope}"))
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    name = write(tmp_path / "m.jsonl", [{"chat": chat, "mean": 0}, {"chat": chat[:1], "mean": 1}])
    base |= {"score_dataset": name, "score_eval_dataset": name, "messages_column": "chat"}
    first = load(ScoreDataConfig(**base))[0].train[0]
    assert first["messages"] == chat and first["text"] is None
    name = write(tmp_path / "n.jsonl", [{"chat": chat, "mean": 0}, {"chat": [], "mean": 1}])
    with pytest.raises(DataError, match=r"row 1, chat: .*is no chat"):
        load(ScoreDataConfig(**{**base, "score_dataset": name}))


def picture(path, shade=100, size=(24, 20)):
    pixels = np.random.default_rng(shade).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Pil.fromarray(pixels).save(path)


def image_rows(tmp_path, names, **keys):
    rows = [{"image": name, "mean": n} for n, name in enumerate(names)]
    name = write(tmp_path / "t.jsonl", rows)
    return ScoreDataConfig(
        score_dataset=name,
        score_eval_dataset=name,
        image_column="image",
        mean_column="mean",
        score_low=0,
        score_high=9,
        **keys,
    )


def test_images_are_found_beside_the_file_and_under_the_root(tmp_path):
    (tmp_path / "pics").mkdir()
    picture(tmp_path / "pics" / "a.png")
    picture(tmp_path / "pics" / "b.jpg", 3)
    found, said = load(image_rows(tmp_path, ["pics/a.png", "pics/b.jpg"]))
    assert found.train[0]["images"] == [str(tmp_path / "pics" / "a.png")]
    assert found.train[0]["text"] is None and "images: 4 read" in said
    assert open_image(found.train[1]["images"][0]).size == (24, 20)
    rooted = image_rows(tmp_path, ["a.png", "b.jpg"], image_root=str(tmp_path / "pics"))
    assert load(rooted)[0].train == found.train
    picture(tmp_path / "pics" / "a.png", 9)
    assert load(rooted)[0].fingerprint != found.fingerprint


@pytest.mark.parametrize("kind", ["missing", "cut", "text", "empty"])
def test_a_damaged_image_is_named(tmp_path, kind):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name, size=(200, 200))
    bad = tmp_path / "b.jpg"
    if kind == "missing":
        bad.unlink()
    else:
        data = bad.read_bytes()
        bad.write_bytes({"cut": data[: len(data) // 2], "text": b"no image", "empty": b""}[kind])
    problem = "no such image" if kind == "missing" else "is no whole image"
    with pytest.raises(DataError, match=rf"row 1, image: .*b\.jpg.*{problem}"):
        load(image_rows(tmp_path, ["a.jpg", "b.jpg"]))


def test_image_features_stay_bytes(tmp_path):
    handle = io.BytesIO()
    picture_ = Pil.new("L", (6, 4), 7)
    picture_.save(handle, "PNG")
    raw = {"bytes": handle.getvalue(), "path": None}
    for feature, value in ((Image(), raw), (List(Image()), [raw, raw])):
        features = Features({"image": feature, "mean": Value("float64")})
        table = Dataset.from_list([{"image": value, "mean": m} for m in (0, 9)], features)
        table.to_parquet(tmp_path / "t.parquet")
        name = str(tmp_path / "t.parquet")
        config = ScoreDataConfig(
            score_dataset=name, score_eval_dataset=name, image_column="image", mean_column="mean"
        )
        (row, _) = load(config)[0].train
        assert set(map(type, row["images"])) == {bytes}
        found = open_image(row["images"][-1])
        assert found.mode == "RGB" and found.getpixel((0, 0)) == (7, 7, 7)


def test_a_photo_stands_upright(tmp_path):
    photo = Pil.new("RGB", (6, 4))
    exif = photo.getexif()
    exif[274] = 6  # turned by a quarter
    photo.save(tmp_path / "p.jpg", exif=exif)
    assert open_image(str(tmp_path / "p.jpg")).size == (4, 6)
    with pytest.raises(MissingFileError):
        open_image(str(tmp_path / "gone.jpg"))


@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"mean_column": "m", "ratings_column": "r"}, "name one of them"),
        ({}, "have no ratings"),
        ({"ratings_column": "r", "std_column": "s"}, "std_column: 's': goes with mean_column"),
        ({"mean_column": "m", "raters_kept": 3}, "raters_kept: 3: needs single ratings"),
        ({"mean_column": "m", "score_low": 1}, "score_high: None: a scale has two ends"),
        ({"mean_column": "m", "score_low": 5, "score_high": 1}, "the lower first"),
        ({"mean_column": "m", "eval_fraction": 0.0}, "eval_fraction"),
        ({"mean_column": "m", "max_train_rows": 0}, "max_train_rows"),
        ({"mean_column": "m", "scale_per_group": True}, "needs group_column"),
        ({"mean_column": "m", "text_template": "none"}, "no column in braces"),
        ({"mean_column": "m", "messages_column": "c", "image_column": "i"}, "image_column: 'i'"),
    ],
)
def test_settings_that_cannot_be(keys, problem):
    with pytest.raises(RecipeError, match=problem):
        ScoreDataConfig(score_dataset="x.jsonl", **keys)


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(DataError, match=r"text_column: 'words': .*it has text, mean"):
        rated(tmp_path, [{"text": "a", "mean": 1}], text_column="words")
