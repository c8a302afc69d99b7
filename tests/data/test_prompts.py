"""Prompts: formats, templates, each once, held-out apart, shares that never overlap."""

import json

import pytest
from conftest import sentences
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from llmkd.data.prompts import PromptConfig, encode_prompt, load_prompts, slices
from llmkd.errors import DataError, MissingFileError, RecipeError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat(tokenizer):
    """The session's tokenizer with a chat template, which is taken off again."""
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def write(path, prompts, column="prompt"):
    path.write_text("".join(json.dumps({column: prompt}) + "\n" for prompt in prompts))
    return str(path)


def load(path, tokenizer, say=lambda text: None, **settings):
    config = PromptConfig(prompt_dataset=path, **{"held_out_prompts": 2, **settings})
    return load_prompts(config, tokenizer, say)


def prompts_of(rows):
    return [row["prompt"] for row in rows]


def test_plain_text_without_a_template_stays_text(tmp_path, tokenizer):
    texts = sentences(10)
    found = load(write(tmp_path / "p.jsonl", texts), tokenizer)
    rows = [*found.train, *found.held_out]
    assert sorted(prompts_of(rows)) == sorted(texts)
    assert len(found.held_out) == 2 and found.dropped == {"duplicate": 0, "long": 0, "held_out": 0}
    for row in rows:
        assert row["prompt"] == texts[row["row"]]
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
    assert found.longest == max(len(row["prompt_ids"]) for row in rows)


def test_auto_makes_a_chat_where_there_is_a_template(tmp_path, chat):
    texts = ["the cat", "two dogs", "rain"]
    path = write(tmp_path / "p.jsonl", texts)
    row = load(path, chat, held_out_prompts=0, max_prompts=1).train[0]
    assert row["prompt"] == [{"role": "user", "content": texts[row["row"]]}]
    said = chat.decode(row["prompt_ids"])
    assert said == f"[user]{row['prompt'][0]['content']}\n[assistant]"
    plain = load(path, chat, held_out_prompts=0, as_chat="false").train
    assert all(isinstance(row["prompt"], str) for row in plain)
    assert load(path, chat, as_chat=True).train[0]["prompt"][0]["role"] == "user"  # YAML's true


def test_messages_and_system_prompts(tmp_path, chat):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "two"}]
    path = write(tmp_path / "p.jsonl", [[{"role": "user", "content": "one"}], own])
    rows = load(path, chat, held_out_prompts=0, system_prompt="be kind").train
    assert {tuple(m["content"] for m in row["prompt"]) for row in rows} == {
        ("be kind", "one"),
        ("own", "two"),
    }
    one = next(row for row in rows if row["row"] == 0)
    assert chat.decode(one["prompt_ids"]) == "[system]be kind\n[user]one\n[assistant]"


def test_a_path_reaches_into_lists_and_mappings(tmp_path, tokenizer):
    rows = [{"turns": [{"content": f"ask {n}"}, {"content": f"then {n}"}]} for n in range(4)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    firsts = load(str(path), tokenizer, prompt_column="turns.0.content", held_out_prompts=0)
    lasts = load(str(path), tokenizer, prompt_column="turns.-1.content", held_out_prompts=0)
    assert sorted(prompts_of(firsts.train)) == [f"ask {n}" for n in range(4)]
    assert sorted(prompts_of(lasts.train)) == [f"then {n}" for n in range(4)]
    for column, problem in [
        ("turns.2.content", "row 0 .*has no place 2"),
        ("turns.0.text", "there is no text, but content"),
        ("turns.0.content.x", "cannot be looked up in str"),
        ("turn.0", "no column turn; it has turns"),
    ]:
        with pytest.raises(DataError, match=problem):
            load(str(path), tokenizer, prompt_column=column)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "txt", "folder"])
def test_local_formats_give_the_same_prompts(tmp_path, tokenizer, kind):
    texts = sentences(12)
    path = tmp_path / f"p.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts[:5]) + "\n\n\n" + "\n".join(texts[5:]) + "\n")
    elif kind == "json":
        path.write_text(json.dumps([{"prompt": text} for text in texts]))
    elif kind == "folder":
        path.mkdir()
        write(path / "train-0.jsonl", texts[:6])
        write(path / "train-1.jsonl", texts[6:])
    elif kind == "jsonl":
        write(path, texts)
    else:
        getattr(Dataset.from_dict({"prompt": texts}), f"to_{kind}")(path)
    found = load(str(path), tokenizer)
    rows = [*found.train, *found.held_out]
    assert {row["row"]: row["prompt"] for row in rows} == dict(enumerate(texts))


def test_duplicates_go_before_the_split(tmp_path, tokenizer):
    texts = [f"ask {n % 5}" + " " * (n // 5) for n in range(30)] + ["ASK 3"]
    said = []
    for seed in range(10):
        found = load(write(tmp_path / "p.jsonl", texts), tokenizer, said.append, prompt_seed=seed)
        assert found.dropped["duplicate"] == 26
        train, held_out = set(prompts_of(found.train)), set(prompts_of(found.held_out))
        assert len(train) == 3 and len(held_out) == 2 and not train & held_out
    assert "26 duplicate" in said[0] and "3 to train on and 2 held out" in said[0]


def test_held_out_prompts_of_another_file_are_not_trained_on(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [f"ask {n}" for n in range(6)])
    other = write(tmp_path / "h.jsonl", ["ask 2", "Ask  4", "ask 99"])
    found = load(path, tokenizer, held_out_dataset=other, held_out_prompts=5)
    assert sorted(prompts_of(found.held_out)) == ["Ask  4", "ask 2", "ask 99"]
    assert sorted(prompts_of(found.train)) == ["ask 0", "ask 1", "ask 3", "ask 5"]
    assert found.dropped["held_out"] == 2


def test_seed_and_cap(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", sentences(40))
    whole, again = load(path, tokenizer), load(path, tokenizer)
    assert whole.fingerprint == again.fingerprint and whole.train == again.train
    other = load(path, tokenizer, prompt_seed=1)
    assert other.fingerprint != whole.fingerprint and other.held_out != whole.held_out
    few = load(path, tokenizer, max_prompts=5)
    assert few.train == whole.train[:5] and few.held_out == whole.held_out
    assert few.fingerprint != whole.fingerprint


def test_long_prompts_are_refused_with_their_row_or_dropped(tmp_path, tokenizer):
    texts = ["the", "the cat sat on a mat and saw two dogs run far from home", "cat", "dogs"]
    path = write(tmp_path / "p.jsonl", texts)
    with pytest.raises(DataError, match=r"max_prompt_length: 4: the prompt of row 1 has \d+") as e:
        load(path, tokenizer, max_prompt_length=4)
    assert "--long_prompts drop" in str(e.value)
    found = load(path, tokenizer, max_prompt_length=4, long_prompts="drop", held_out_prompts=1)
    assert found.dropped["long"] == 1
    assert {row["row"] for row in (*found.train, *found.held_out)} == {0, 2, 3}
    config = PromptConfig(prompt_dataset=path, held_out_prompts=0)
    with pytest.raises(DataError, match="there is room for 4"):
        load_prompts(config, tokenizer, print, window=4)


@pytest.mark.parametrize(
    "value, problem",
    [
        ("  ", "the prompt is empty"),
        (None, "there is no prompt"),
        ([], "has no messages"),
        ([{"role": "user"}], "no message with role and content"),
        ([{"role": "user", "content": " "}], "the chat says nothing"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "nothing to answer",
        ),
    ],
)
def test_what_is_no_prompt_is_named_with_its_row(tmp_path, chat, value, problem):
    good = "fine" if not isinstance(value, list) else [{"role": "user", "content": "fine"}]
    path = write(tmp_path / "p.jsonl", [good, value])
    with pytest.raises(DataError, match=f"row 1 of .*{problem}"):
        load(path, chat)


def test_numbers_are_no_prompts(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"row 0 .*is int; text or a list"):
        load(write(tmp_path / "p.jsonl", [3, 4]), tokenizer)


def test_places_that_lead_nowhere(tmp_path, tokenizer):
    with pytest.raises(MissingFileError, match="prompt_dataset"):
        load(str(tmp_path / "none.jsonl"), tokenizer)
    path = write(tmp_path / "p.jsonl", sentences(4))
    with pytest.raises(DataError, match="prompt_column") as caught:
        load(path, tokenizer, prompt_column="question")
    assert "--prompt_column prompt" in str(caught.value)
    with pytest.raises(DataError, match="prompt_split") as caught:
        load(path, tokenizer, prompt_split="test")
    assert "eval" not in str(caught.value)  # that is a key of another recipe
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"prompt_dataset.*is empty"):
        load(str(tmp_path / "empty.jsonl"), tokenizer)


def test_too_few_prompts_name_the_numbers(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", ["a cat", "a dog", "A  cat"])
    for held_out in (2, 3):
        with pytest.raises(DataError, match=r"has 2 prompts .*1 duplicate"):
            load(path, tokenizer, held_out_prompts=held_out)


def test_chats_need_a_template(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", ["a", "b"])
    for settings in ({"as_chat": "true"}, {"system_prompt": "be kind"}):
        with pytest.raises(DataError, match="no chat template"):
            load(path, tokenizer, **settings)
    path = write(tmp_path / "m.jsonl", [[{"role": "user", "content": "a"}]])
    with pytest.raises(DataError, match="row 0: the chat template"):
        load(path, tokenizer, held_out_prompts=0)


def test_what_a_template_refuses_is_named(tmp_path, chat):
    chat.chat_template = "{{ raise_exception('no system message here') }}"
    with pytest.raises(DataError, match=r"row 0: .*no system message here"):
        load(write(tmp_path / "p.jsonl", ["a"]), chat, held_out_prompts=0)


def test_an_end_token_never_ends_a_prompt(tokenizer):
    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **_):
            return {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}

    assert encode_prompt("the cat", Ending()) == tokenizer("the cat")["input_ids"]


def test_the_default_is_prose_of_the_standard_library(tokenizer):
    said = []
    found = load_prompts(PromptConfig(max_prompts=500, prompt_words=6), tokenizer, said.append)
    assert len(found.train) == 500 and len(found.held_out) == 64
    prompts = prompts_of([*found.train, *found.held_out])
    assert len(set(prompts)) == 564
    for prompt in prompts:
        assert len(prompt.split()) == 6 and prompt[0].isupper()
    assert "first 6 words" in said[0]


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"as_chat": "maybe"}, "as_chat"),
        ({"long_prompts": "cut"}, "long_prompts"),
        ({"max_prompts": 0}, "max_prompts"),
        ({"held_out_prompts": -1}, "held_out_prompts"),
        ({"held_out_dataset": "x.jsonl", "held_out_prompts": 0}, "held_out_prompts"),
        ({"system_prompt": " "}, "system_prompt"),
        ({"system_prompt": "a", "as_chat": "false"}, "system_prompt"),
        ({"max_prompt_length": 0}, "max_prompt_length"),
    ],
)
def test_settings_that_cannot_be(settings, key):
    with pytest.raises(RecipeError, match=key):
        PromptConfig(**settings)


ROWS = [{"row": n} for n in range(200)]


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 5))
def test_shares_never_overlap_and_stay_when_more_follow(iterations, each, seed):
    shares = slices(ROWS, iterations, each, seed)
    numbers = [row["row"] for share in shares for row in share]
    assert [len(share) for share in shares] == [each] * iterations
    assert len(set(numbers)) == len(numbers)
    assert slices(ROWS, iterations + 1, min(each, 28), seed)[:iterations] == slices(
        ROWS, iterations, min(each, 28), seed
    )


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 5))
def test_without_a_number_all_rows_are_shared_out(iterations, more, seed):
    rows = ROWS[: iterations + more]
    shares = slices(rows, iterations, None, seed)
    assert sorted(row["row"] for share in shares for row in share) == list(range(len(rows)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_shares_follow_the_seed():
    assert slices(ROWS, 2, 50, 0) == slices(ROWS, 2, 50, 0) != slices(ROWS, 2, 50, 1)


def test_too_few_rows_for_the_iterations():
    with pytest.raises(DataError, match="3 iterations need 30 prompts; there are 20") as caught:
        slices(ROWS[:20], 3, 10, 0)
    assert "--prompts_per_iteration 6" in str(caught.value)
    with pytest.raises(DataError, match="--iterations 2"):
        slices(ROWS[:2], 3, None, 0)
