"""Image rows of a DeQA-Score run: ranks share the check of what fits, and a reused run skips it."""

import pytest
from deqa_kit import done, pictures, recipe, save_image_scorer, write_rows

from llmkd.cli import main
from llmkd.data.score_tokens import ImageRows
from llmkd.errors import DataError
from llmkd.methods import deqa_plan


@pytest.fixture
def path(tmp_path):
    write_rows(tmp_path / "rated.jsonl", pictures(tmp_path, 8))
    keys = {"model_name_or_path": save_image_scorer(tmp_path / "sees"), "image_column": "image"}
    return recipe(tmp_path, **keys, per_device_train_batch_size=4, num_train_epochs=1)


def test_a_finished_run_is_reused_without_the_check(path, monkeypatch):
    seen, plain = [], ImageRows.check
    monkeypatch.setattr(
        ImageRows, "check", lambda self, *a: seen.append(len(self)) or plain(self, *a)
    )
    done(path)
    assert sorted(seen) == [2, 6]  # held out and training rows, once each
    done(path)
    assert len(seen) == 2
    done(path, "--seed", "1", "--overwrite_run", "true")  # another run in its place
    assert len(seen) == 4


def test_all_ranks_raise_what_one_finds(path, tmp_path, capsys, monkeypatch):
    asked = []

    def gathered(mine):
        asked.extend(mine)
        return [*mine, (DataError.of("max_length", 9, "row 5: no room"), 0)]

    monkeypatch.setattr(deqa_plan, "gather_object", gathered)
    assert main(["deqa", path]) == 1
    assert "row 5: no room" in capsys.readouterr().err
    assert asked == [(None, 0)] and not (tmp_path / "run").exists()
