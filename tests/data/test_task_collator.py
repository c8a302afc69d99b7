"""Rows of a task or of general text to padded batches."""

import pytest
import torch

from llmkd.data import TaskCollator

ROWS = [
    {"input_ids": [2, 9, 3], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 1], "row": 7},
    {"input_ids": [2, 3], "attention_mask": [1, 1], "token_type_ids": [0, 1], "row": 4},
]


def labelled(*labels):
    return [{**row, "labels": label} for row, label in zip(ROWS, labels, strict=True)]


@pytest.mark.parametrize(
    "side, ids, mask, types, labels",
    [
        ("right", [2, 3, 5, 5], [1, 1, 0, 0], [0, 1, 0, 0], [-100, 1, -100, -100]),
        ("left", [5, 5, 2, 3], [0, 0, 1, 1], [0, 0, 0, 1], [-100, -100, -100, 1]),
    ],
)
def test_padding_on_both_sides(side, ids, mask, types, labels):
    collate = TaskCollator(5, pad_to_multiple_of=4, kind="token", padding_side=side)
    batch = collate(labelled([-100, 0, -100], [-100, 1]))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "rows"}
    assert batch["input_ids"][1].tolist() == ids and batch["attention_mask"][1].tolist() == mask
    assert batch["token_type_ids"][1].tolist() == types
    assert batch["labels"][1].tolist() == labels
    assert batch["rows"].tolist() == [7, 4]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("multiple, width", [(1, 3), (2, 4), (8, 8)])
def test_width_is_that_of_the_longest_row_rounded_up(multiple, width):
    assert TaskCollator(0, pad_to_multiple_of=multiple)(ROWS)["input_ids"].shape == (2, width)


@pytest.mark.parametrize("named", [True, False], ids=["named", "read from the label"])
@pytest.mark.parametrize(
    "kind, labels, dtype",
    [
        ("single_label", [1, 0], torch.int64),
        ("regression", [0.5, 2.0], torch.float32),
        ("multi_label", [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], torch.float32),
    ],
)
def test_labels_have_the_type_of_the_task(kind, labels, dtype, named):
    batch = TaskCollator(0, kind=kind if named else None)(labelled(*labels))
    assert batch["labels"].dtype == dtype and batch["labels"].tolist() == labels


def test_whole_targets_of_a_regression_stay_floats():
    assert TaskCollator(0, kind="regression")(labelled(1, 0))["labels"].dtype == torch.float32


def test_general_rows_have_no_labels_and_a_mask_is_made():
    batch = TaskCollator(0, pad_to_multiple_of=1)([{"input_ids": [0, 4]}, {"input_ids": [6]}])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]  # an id of padding is no padding


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="padding_side is 'up'"):
        TaskCollator(0, padding_side="up")
