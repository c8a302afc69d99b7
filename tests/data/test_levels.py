"""Level words as tokens: what serves, what breaks and what is offered instead."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkd.data.levels import QUALITY, LevelConfig, Levels, find_levels
from llmkd.errors import DataError, RecipeError

PREFIX = "it is"
FIVE = (5.0, 4.0, 3.0, 2.0, 1.0)


def word_bpe(*words, digits_alone=False):
    """A byte-level BPE that has these words, blank included, and single bytes, as tokens."""
    vocab, merges = {b: i for i, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    for word in ("it", "Ġis", *words):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def spaced(*words):
    return word_bpe(*(f"Ġ{word}" for word in words))


def test_the_ids_are_those_of_the_whole_text():
    tokenizer = spaced(*QUALITY)
    found = find_levels(tokenizer, QUALITY, FIVE, PREFIX)
    assert (found.words, found.values_L, found.prefix) == (QUALITY, FIVE, PREFIX)
    for word, own in zip(QUALITY, found.ids_L, strict=True):
        assert tokenizer(f"it is {word}")["input_ids"] == [*tokenizer(PREFIX)["input_ids"], own]
    assert len(set(found.ids_L)) == 5


def test_digits_that_stand_alone_leave_the_blank_to_the_prefix():
    tokenizer = word_bpe(digits_alone=True)
    found = find_levels(tokenizer, ["3", "2", "1"], [3, 2, 1], PREFIX)
    assert found.prefix == "it is "
    start = tokenizer(found.prefix)["input_ids"]
    for word, own in zip(found.words, found.ids_L, strict=True):
        assert tokenizer(f"it is {word}")["input_ids"] == [*start, own]
    again = find_levels(tokenizer, found.words, found.values_L, found.prefix)
    assert again == found


def test_a_word_after_a_line_break_has_no_blank():
    tokenizer = word_bpe("good", "bad")
    found = find_levels(tokenizer, ["good", "bad"], [2, 1], "it is\n")
    assert found.ids_L == (tokenizer("good")["input_ids"][0], tokenizer("bad")["input_ids"][0])
    assert find_levels(tokenizer, ["good", "bad"], [2, 1], PREFIX).prefix == "it is "


def test_the_word_that_breaks_is_named_with_its_pieces_and_a_way_out():
    words = [word for word in QUALITY if word != "poor"]
    with pytest.raises(DataError) as caught:
        find_levels(spaced(*words, *"54321"), QUALITY, FIVE, PREFIX, key="level_words")
    said = str(caught.value)
    assert said.startswith(
        "level_words: 'poor': is not one token after 'it is' but 5: ' ' + 'p' + "
    )
    assert 'level_words: ["5", "4", "3", "2", "1"]' in said


def test_the_way_out_works_and_runs_the_way_of_the_values():
    tokenizer = spaced("good", "fair", "1", *"ABC")  # "1" alone has a blank of its own
    with pytest.raises(DataError, match=r'level_words: \["C", "B", "A"\]'):
        find_levels(tokenizer, ["bad", "fair", "good"], [1, 2, 3], PREFIX)
    find_levels(tokenizer, ["C", "B", "A"], [1, 2, 3], PREFIX)
    # digits that stand apart would do, too, and come first
    alone = word_bpe("Ġgood", digits_alone=True)
    with pytest.raises(DataError, match=r'level_words: \["3", "2", "1"\]'):
        find_levels(alone, ["good", "fair", "bad"], [3, 2, 1], PREFIX)


def test_a_blank_at_the_end_of_the_prefix_is_in_the_way():
    tokenizer = spaced("good", "bad")
    with pytest.raises(DataError, match=r"'it is ': ends with a blank.*take it away"):
        find_levels(tokenizer, ["good", "bad"], [2, 1], "it is ")
    with pytest.raises(RecipeError, match="answer_prefix: 'it is ': ends with a blank"):
        LevelConfig(answer_prefix="it is ")


def test_nothing_works_is_said():
    with pytest.raises(DataError, match="no set known here works"):
        find_levels(spaced("1", "A"), ["good", "bad"], [2, 1], PREFIX)


def test_one_token_for_two_words_is_no_pair_of_levels():
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({"[UNK]": 0, "is": 1, "good": 2, "bad": 3}, "[UNK]")
        ),
        unk_token="[UNK]",
    )
    lower.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="'Good': is the same token as 'good'"):
        find_levels(lower, ["good", "Good"], [2, 1], "is")
    with pytest.raises(DataError, match="'fair': is unknown to this tokenizer"):
        find_levels(lower, ["good", "fair"], [2, 1], "is")


@pytest.mark.parametrize(
    "words, values, problem",
    [
        (["good"], [1], "at least two"),
        (["good", "good"], [2, 1], "all different"),
        ([" good", "bad"], [2, 1], "no blanks around it"),
        (["good", ""], [2, 1], "not empty"),
        (["good", "bad"], [1], "as many values"),
        (["a", "b", "c"], [3, 1, 2], "all the way"),
        (["a", "b"], [1, 1], "all the way"),
        (["a", "b"], [1, float("inf")], "finite"),
        (["a", "b"], ["x", 1], "list of numbers"),
        ("ab", [2, 1], "list of words"),
    ],
)
def test_what_are_no_levels(words, values, problem):
    with pytest.raises(RecipeError, match=problem):
        find_levels(spaced("good", "bad"), words, values, PREFIX)


def test_the_recipe_keys():
    config = LevelConfig()
    assert config.level_words == [*QUALITY] and config.level_values == [*FIVE]
    assert len(config.questions) == 10 and config.answer_suffix == "."
    given = LevelConfig(
        level_words='["bad", "good"]', level_values="[0, 10]", questions='["How is it?"]',
        answer_prefix=PREFIX,
    )  # fmt: skip
    found = given.find(spaced("good", "bad"))
    assert isinstance(found, Levels) and len(found) == 2
    assert found.words == ("bad", "good") and found.values_L == (0.0, 10.0)
    assert LevelConfig(level_words=[3, 2, 1]).level_words == ["3", "2", "1"]
    for settings, problem in (
        ({"questions": []}, "questions"),
        ({"questions": [" "]}, "not empty"),
        ({"level_words": "good"}, "is not JSON"),
        ({"level_words": '"good"'}, "must be a list"),
    ):
        with pytest.raises(RecipeError, match=problem):
            LevelConfig(**settings)


def test_a_command_line_gives_lists_as_json_or_yaml():
    assert LevelConfig(level_words='["good", "bad"]').level_values == [2.0, 1.0]
    assert LevelConfig(level_words="[good, bad]").level_words == ["good", "bad"]
    assert LevelConfig(level_words=None, questions=None).level_words == [*QUALITY]
    with pytest.raises(RecipeError, match=r"(?s)questions.*is a list"):
        LevelConfig(questions="How good?")
