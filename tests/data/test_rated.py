import json

import numpy as np
import pytest
from datasets import Dataset

from llmkd.data.rated import load_rated
from llmkd.errors import DataError, MissingFileError

ROW = {"prompt": "p", "response_1": "a", "response_2": "b"}


def written(folder, rows, name="rated.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" if name.endswith("l") else json.dumps(rows))
    return str(path)


def test_every_form_of_a_vote(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    said = [{"role": "assistant", "content": text} for text in ("good", "bad")]
    rows = [
        {**ROW, "wins": 2, "votes": 3},
        {**ROW, "preferred": 1},
        {**ROW, "preferred": "2"},
        {**ROW, "preferred": "tie", "group": 7},
        {"prompt": chat, "chosen": said[:1], "rejected": said[1:]},
        {"chosen": [*chat, said[0]], "rejected": [*chat, said[1]]},
        {"prompt": "p", "chosen": "x", "rejected": "y", "wins": 1, "votes": 4},
    ]
    found = load_rated(written(tmp_path, rows))
    assert found.wins_N.tolist() == [2, 1, 0, 0.5, 1, 1, 1]
    assert found.votes_N.tolist() == [3, 1, 1, 1, 1, 1, 4]
    assert [pair.row for pair in found.pairs] == list(range(7))
    assert found.pairs[3].group == "7" and found.pairs[4].prompt == found.pairs[5].prompt == chat
    assert (found.pairs[5].response_1, found.pairs[5].response_2) == ("good", "bad")


def test_json_parquet_and_other_column_names(tmp_path):
    rows = [{"input": "q", "output_1": "a", "output_2": "b", "label": 2, "part": "x"}] * 2
    columns = {"prompt": "input", "response_1": "output_1", "response_2": "output_2"}
    columns |= {"preferred": "label", "group": "part"}
    one = load_rated(written(tmp_path, rows, "r.json"), columns=columns)
    Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    other = load_rated(str(tmp_path / "r.parquet"), columns=columns)
    assert one == other and one.wins_N.tolist() == [0, 0] and one.pairs[0].group == "x"


def test_identical_and_unrated_pairs_are_counted(tmp_path):
    rows = [
        {**ROW, "response_2": " a"},
        ROW,
        {**ROW, "wins": 0, "votes": 0},
        {**ROW, "preferred": 1},
    ]
    found = load_rated(written(tmp_path, rows))
    assert (len(found.pairs), found.identical, found.unrated) == (1, 1, 2)


def test_a_part_is_drawn_by_the_seed(tmp_path):
    path = written(tmp_path, [{**ROW, "prompt": str(i), "preferred": 1} for i in range(50)])
    drawn = [load_rated(path, most=10, seed=seed).pairs for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
    assert np.all(np.diff([pair.row for pair in drawn[0]]) > 0)


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({**ROW, "wins": 3, "votes": 2}, "row 1, wins.*more wins"),
        ({**ROW, "wins": 3}, "row 1, votes"),
        ({**ROW, "wins": -1, "votes": 2}, "row 1, wins"),
        ({**ROW, "wins": float("nan"), "votes": 2}, "row 1, wins"),
        ({**ROW, "wins": True, "votes": 2}, "row 1, wins"),
        ({**ROW, "preferred": 3}, 'row 1, preferred.*1, 2 or "tie"'),
        ({**ROW, "preferred": True}, "row 1, preferred"),
        ({**ROW, "preferred": 1, "votes": 1}, "row 1, preferred.*beside"),
        ({**ROW, "prompt": " "}, "row 1, prompt"),
        ({**ROW, "prompt": [{"content": "x"}]}, "row 1, prompt"),
        ({**ROW, "response_2": None}, "row 1, response_2"),
        ({"prompt": "p", "chosen": "x"}, "row 1, rejected"),
        ({"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}, "another prompt"),
        ("{", "line 2"),
        ([1], "no list of mappings"),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path, row, wanted):
    path = written(tmp_path, [{**ROW, "preferred": 1}, row])
    with pytest.raises(DataError, match=wanted):
        load_rated(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(MissingFileError, match="rated_pairs"):
        load_rated(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no rated pair"):
        load_rated(written(tmp_path, [ROW]))
    with pytest.raises(DataError, match=r"rated_columns\.promt"):
        load_rated(written(tmp_path, [ROW]), columns={"promt": "x"})
