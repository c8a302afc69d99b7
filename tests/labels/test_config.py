"""The recipe keys of a label store: what can be refused without text, tokenizer or teacher."""

import pytest

from llmkd.errors import RecipeError
from llmkd.labels import Dense, Hidden, TopK
from llmkd.labels.config import LabelConfig


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"label_encoding": "sampeld"}, "did you mean 'sampled'"),
        ({"label_encoding": "topk", "label_k": 0}, "label_k: 0"),
        ({"label_encoding": "topk", "label_value_bits": 4}, "label_value_bits: 4"),
        ({"label_draws": 0}, "label_draws: 0"),
        ({"label_draws": 256}, "label_draws: 256"),
        ({"label_sampling": "greedy"}, "label_sampling: 'greedy'"),
        ({"label_encoding": "hidden", "label_dtype": "int7"}, "label_dtype: 'int7'"),
        ({"label_encoding": "dense", "label_dtype": "int8"}, "label_dtype: 'int8'"),
        ({"label_encoding": "lowrank", "label_rank": 0}, "label_rank: 0"),
        ({"label_rows": "some"}, "label_rows: 'some'"),
        ({"label_tail": "bin"}, "label_tail: 'bin'"),
        ({"label_batch_size": 0}, "label_batch_size: 0"),
    ],
)
def test_mistakes_are_seen_when_the_recipe_is_read(settings, words):
    with pytest.raises(RecipeError, match=words):
        LabelConfig(**settings)


def test_the_teachers_limits_come_with_the_teacher():
    config = LabelConfig(label_encoding="topk", label_k=100_000)
    with pytest.raises(RecipeError, match="label_k: 100000: teacher and student share 300 tokens"):
        config.encoding(shared=300, width=8)
    assert isinstance(config.encoding(shared=150_000, width=8), TopK)
    with pytest.raises(RecipeError, match="label_rank: 64: the teacher's hidden states have 8"):
        LabelConfig(label_encoding="lowrank").encoding(shared=300, width=8)
    dense = LabelConfig(label_encoding="dense")
    assert dense.encoding(shared=4096, width=8) == Dense(4096, "float32")
    with pytest.raises(RecipeError, match=r"label_encoding: 'dense': .*4,097 classes"):
        dense.encoding(shared=4097, width=8)


def test_an_encoding_has_its_own_default_of_numbers():
    assert LabelConfig(label_encoding="hidden").encoding(shared=9, width=8) == Hidden(8, 9, "int8")
