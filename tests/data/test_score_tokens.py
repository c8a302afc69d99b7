"""Tokens of rated rows: the place of the level, what is learned, paraphrases, cutting, images."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pil
from score_kit import (
    IMAGE_CHAT,
    PREFIX,
    PROMPT,
    VALUES,
    image_scorer,
    score_levels,
    score_row,
    score_tokenizer,
)

from llmkd.data.levels import QUALITY, find_levels
from llmkd.data.score_collator import ScoreCollator
from llmkd.data.score_tokens import (
    ScoreEncoder,
    ScorePrompt,
    group_ids,
    level_index,
    tokenize_scores,
)
from llmkd.errors import DataError, RecipeError
from llmkd.objectives.token import IGNORE

TEXT = "the cat sat on a mat"
QUESTION = PROMPT.questions[0]


def encoder(*, chat=False, prompt=PROMPT, max_length=None, prefix=PREFIX):
    tokenizer = score_tokenizer(chat=chat)
    levels = find_levels(tokenizer, QUALITY, VALUES, prefix)
    return ScoreEncoder(tokenizer, levels, prompt, max_length)


def uniform(rows):
    return np.full((len(rows), 5), 0.2)


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_is_the_prompt_and_the_answer(chat):
    enc = encoder(chat=chat)
    row = score_row(3, text=TEXT, mean=3.9, std=0.4)
    made = enc.answered(row, [0.1, 0.5, 0.4, 0, 0])
    whole = enc.tokenizer.decode(made["input_ids"])
    asked = f"{QUESTION}\n\n{TEXT}\n"
    want = f"<user>{asked}<assistant>" if chat else asked
    assert whole == f"{want}{PREFIX} good.<|endoftext|>"
    at = made["level_at"]
    assert made["input_ids"][at] == enc.levels.ids_L[1] == made["labels"][at]
    learned = [token for token in made["labels"] if token != IGNORE]
    assert enc.tokenizer.decode(learned) == f"{PREFIX} good.<|endoftext|>"
    assert made["input_ids"][-len(learned) :] == learned
    assert made["input_ids"][:at] == enc.prompted(row).ids
    assert made["target"] == [0.1, 0.5, 0.4, 0, 0] and made["row"] == 3 and not made["cut"]
    assert (made["score_mean"], made["score_std"]) == (3.9, 0.4)


def test_a_template_that_begins_texts_is_not_begun_twice():
    enc = encoder(chat=True)
    enc.tokenizer.chat_template = "<|endoftext|>{{ messages[0].content }}"
    ids = enc.prompted(score_row(0, text="a")).ids
    assert ids.count(enc.tokenizer.eos_token_id) == 1


def test_the_system_prompt_and_the_hole_of_a_question():
    prompt = ScorePrompt(("Read: {text} Good?",), system="Be strict.")
    text = encoder(chat=True, prompt=prompt)
    found = text.tokenizer.decode(text.prompted(score_row(0, text="a b")).ids)
    assert found == f"<system>Be strict.\n<user>Read: a b Good?\n<assistant>{PREFIX}"
    with pytest.raises(RecipeError, match="system_prompt: 'Be strict"):
        encoder(prompt=prompt)


@pytest.mark.parametrize("chat", [False, True])
def test_rated_messages_are_followed_by_the_question(chat):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a cat"}]
    enc = encoder(chat=chat)
    found = enc.tokenizer.decode(enc.prompted(score_row(0, messages=turns)).ids)
    if chat:
        want = f"<user>hi\n<assistant>a cat\n<user>{QUESTION}\n<assistant>{PREFIX}"
    else:
        want = f"User: hi\n\nAssistant: a cat\n\nUser: {QUESTION}\n\nAssistant:\n{PREFIX}"
    assert found == want
    last = enc.tokenizer.decode(enc.prompted(score_row(0, messages=turns[:1])).ids)
    assert f"hi\n\n{QUESTION}" in last and turns[1]["content"] == "a cat"


def test_training_rows_are_asked_differently_and_others_alike():
    enc = encoder()
    rows = [score_row(n, text="a") for n in range(40)]

    def asked(**keys):
        made = tokenize_scores(rows, enc, uniform, **keys).rows["input_ids"]
        return [enc.tokenizer.decode(ids).split("\n")[0] for ids in made]

    first = asked(seed=1)
    assert set(first) == set(PROMPT.questions) and asked(seed=1) == first != asked(seed=2)
    assert set(asked(training=False)) == {QUESTION}
    rows = rows[::-1]  # the row decides, not its place
    assert asked(seed=1) == first[::-1]


@settings(deadline=None, max_examples=40)
@given(st.integers(60, 120), st.integers(0, 300))
def test_a_long_text_loses_its_middle_and_nothing_else(max_length, words):
    enc = encoder(max_length=max_length)
    text = "begin " + "dogs run " * words + "finish"
    made = enc.answered(score_row(0, text=text), [0.2] * 5)
    whole = enc.tokenizer.decode(made["input_ids"])
    assert len(made["input_ids"]) <= max_length
    assert whole.startswith(f"{QUESTION}\n\nb")
    assert whole.endswith(f"{PREFIX} fair.<|endoftext|>")
    if made["cut"]:
        assert " ... " in whole and "finish\n" in whole
        assert len(made["input_ids"]) > max_length - 12  # only as much as must be
    else:
        assert text in whole


def test_of_messages_the_longest_is_cut():
    enc = encoder(chat=True, max_length=90)
    turns = [{"role": "user", "content": "dogs run " * 60}, {"role": "assistant", "content": "ok"}]
    made = enc.prompted(score_row(0, messages=turns))
    found = enc.tokenizer.decode(made.ids)
    assert made.cut and " ... " in found and "<assistant>ok" in found and QUESTION in found
    turns[1]["content"] = "the mat " * 50
    made = enc.prompted(score_row(0, messages=turns))
    found = enc.tokenizer.decode(made.ids)
    assert found.count(" ... ") == 2 and len(made.ids) + 3 <= 90  # level, full stop, END


def test_a_question_that_fills_the_window_is_an_error():
    row = score_row(7, text="a")
    needed = len(encoder().answered(row, [0.2] * 5)["input_ids"])
    assert not encoder(max_length=needed).prompted(row).cut
    for few in (20, needed - 1):  # a text cut to nothing would be rated all the same
        with pytest.raises(DataError, match=rf"max_length: {few}: row 7: no room for its text"):
            encoder(max_length=few).prompted(row)


def test_cut_rows_are_counted_and_groups_numbered():
    enc = encoder(max_length=60)
    rows = [score_row(0, text="a", group="y"), score_row(1, text="dogs run " * 99, group="x")]
    found = tokenize_scores(rows, enc, uniform)
    assert found.cut == 1 and found.rows["group_id"] == [1, 0]
    assert set(found.rows.column_names) == {
        *("input_ids", "labels", "level_at", "target", "score_mean", "score_std"),
        *("group_id", "row"),
    }
    assert group_ids([score_row(0), score_row(1, group="a"), score_row(2)]) == [0, 1, 0]
    with pytest.raises(ValueError, match="targets are"):
        tokenize_scores(rows, enc, lambda rows: np.ones((1, 5)))


def test_an_unknown_std_stays_unknown():
    found = tokenize_scores([score_row(0, text="a", std=None)], encoder(), uniform)
    assert found.rows["score_std"] == [None]


@pytest.mark.parametrize(
    "mean, place", [(5, 0), (4.2, 1), (4.21, 0), (3.4, 2), (3.5, 1), (1.8, 4), (1.81, 3), (1, 4)]
)
def test_the_level_in_the_answer_is_one_of_five_equal_bins(mean, place):
    assert level_index(mean, VALUES) == place
    assert level_index(mean, VALUES[::-1]) == 4 - place


def test_uneven_levels_take_the_nearest():
    assert level_index(2.9, (1, 2, 10)) == 1 and level_index(6.5, (1, 2, 10)) == 2


def pixels(seed, size=(20, 24)):
    shape = (*size, 3)
    return Pil.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


@pytest.mark.parametrize("chat", [False, True])
def test_images_stand_between_question_and_text(chat):
    _, processor = image_scorer(chat=chat)
    enc = ScoreEncoder(processor, score_levels(processor.tokenizer), PROMPT)
    handle = io.BytesIO()
    pixels(0).save(handle, "PNG")
    rows = [
        score_row(0, images=[pixels(0)], text="a <image> cat"),
        score_row(1, images=[handle.getvalue()], group="g"),
    ]
    found = tokenize_scores(rows, enc, uniform, training=False)
    one, two = found.rows[0], found.rows[1]
    assert found.cut is None and found.rows.check() == 0 and len(found.rows) == 2
    text = enc.tokenizer.decode(one["input_ids"])
    marks = "<image>" * 4  # four patches; the one in the text is taken out
    parts = [QUESTION, marks, "a  cat"]
    want = "<user>" * chat + "\n".join(parts) + "\n" + "<assistant>" * chat
    assert text == f"{want}{PREFIX} fair.<|endoftext|>"
    assert one["input_ids"][one["level_at"]] == enc.levels.ids_L[2]
    assert one["pixel_values"].shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(one["pixel_values"], two["pixel_values"])
    assert (one["group_id"], two["group_id"]) == (0, 1)
    batch = ScoreCollator(0)([one, two])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert len(one["labels"]) == len(one["input_ids"])
    assert (one.keys() & {"cut", "attention_mask"}) == set()


def test_an_image_processor_leaves_texts_alone():
    _, processor = image_scorer()
    enc = ScoreEncoder(processor, score_levels(processor.tokenizer), PROMPT)
    made = enc.prompted(score_row(0, text="a cat"))
    assert made.tensors == {} and enc.tokenizer.decode(made.ids).startswith("<user>How good")
    assert processor.chat_template == IMAGE_CHAT


def test_images_for_a_model_without_eyes():
    with pytest.raises(DataError, match="row 4 has images and the model reads text only"):
        encoder().prompted(score_row(4, images=[pixels(0)]))
