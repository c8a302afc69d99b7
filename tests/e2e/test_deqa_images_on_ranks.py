"""An image-text scorer sharded over two ranks, as `recipes/deqa/iqa_vlm_zero3.yaml` trains one."""

import numpy as np
import pytest
from PIL import Image
from score_kit import image_scorer
from test_deqa_on_ranks import KEYS, done, losses, prepared, probs, start
from transformers import AutoModelForImageTextToText


def gap(one, other) -> float:
    """Of loaded models: upstream writes other names for the same weights under ZeRO-3."""
    loaded = [
        AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        for folder in (one, other)
    ]
    assert not any(info["missing_keys"] or info["unexpected_keys"] for _, info in loaded)
    here, there = (model.state_dict() for model, _ in loaded)
    return max((value - there[name]).abs().max().item() for name, value in here.items())


@pytest.mark.slow
def test_two_ranks_under_zero3_are_one(tmp_path):
    rows = []
    for number in range(16):
        ratings = [number % 11, min(number % 11 + 1, 10)]
        rows.append({"image": f"../{number}.png", "ratings": ratings})
        Image.new("RGB", (20, 20), (15 * number, 40, 90)).save(tmp_path / f"{number}.png")
    for part in image_scorer():
        part.save_pretrained(tmp_path / "sees")
    keys = {**KEYS, "model_name_or_path": str(tmp_path / "sees"), "image_column": "image"}
    keys |= {"eval_fraction": 0.25, "validation_fraction": None, "bootstrap_draws": 0}
    done(prepared(tmp_path / "one", rows, **keys))
    start("zero3", prepared(tmp_path / "two", rows, **keys))
    whole, run = (tmp_path / name / "run" for name in ("one", "two"))
    assert len(losses(run)) == 2
    np.testing.assert_allclose(losses(run), losses(whole), atol=1e-5)
    assert gap(run, whole) < 1e-6 < 1e-3 < gap(whole, tmp_path / "sees")
    assert len(probs(run)) == 4
    np.testing.assert_allclose(probs(run), probs(whole), atol=1e-5)
