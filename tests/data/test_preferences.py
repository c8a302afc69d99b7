"""Offline preference files: formats, labels, ids, the split, and what is refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkd.data import load_tokenizer
from llmkd.data.preference_config import PreferenceConfig
from llmkd.data.preferences import _Labels, load_preferences
from llmkd.data.tokenizer import END
from llmkd.errors import DataError, MissingFileError, RecipeError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}" + END + "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HARD = math.log(0.99 / 0.01)


def row(number=0, **changes):
    made = {
        "prompt": f"the cat {number}",
        "chosen": " sat on a mat",
        "rejected": " ran far from home",
    }
    return {k: v for k, v in {**made, **changes}.items() if v is not ...}


def file_of(folder, rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def load(folder, tokenizer, rows, *, window=None, **settings):
    config = PreferenceConfig(preference_dataset=file_of(folder, rows), **settings)
    return load_preferences(config, tokenizer, window=window)


@pytest.fixture
def chatty(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "chat")
    made = load_tokenizer(str(tmp_path / "chat"))
    made.chat_template = CHAT
    return made


def test_plain_text_is_prompt_and_completion_with_its_end(tmp_path, tokenizer):
    found = load(tmp_path, tokenizer, [row(0), row(1)])
    assert found.label == "hard" and found.dropped == {"long": 0} and found.held_out is None
    pair = sorted(found.train, key=lambda one: one["row"])[1]
    assert pair["pref_logit"] == pytest.approx(HARD) and pair["wins"] is None
    assert (pair["response_1"], pair["response_2"]) == (" sat on a mat", " ran far from home")
    whole = tokenizer("the cat 1 sat on a mat")["input_ids"]
    assert pair["prompt_ids"] + pair["ids_1"] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(pair["ids_1"]) == " sat on a mat" + END


def test_an_end_in_the_text_is_not_doubled(tmp_path, tokenizer):
    (pair,) = load(tmp_path, tokenizer, [row(chosen=" sat" + END)]).train
    assert pair["ids_1"].count(tokenizer.eos_token_id) == 1


def test_tokens_that_merge_across_the_border_are_kept_apart(tmp_path, tokenizer):
    # "the c" + "at ran": alone "at" is another token than inside " cat"
    pair = load(tmp_path, tokenizer, [row(prompt="the c", chosen="at ran", rejected="ow")]).train[0]
    prompt = tokenizer("the c")["input_ids"]
    assert tokenizer("the cat ran")["input_ids"][: len(prompt)] != prompt  # they do merge
    assert pair["prompt_ids"] == prompt
    assert tokenizer.decode(pair["ids_1"]) == "at ran" + END


def test_a_chat_ends_with_its_end_token(tmp_path, chatty):
    def said(text):
        return [{"role": "assistant", "content": text}]

    prompt = [{"role": "user", "content": "where is the cat"}]
    rows = [row(prompt=prompt, chosen=said("on a mat"), rejected=said("far from home"))]
    pair = load(tmp_path, chatty, rows).train[0]
    assert pair["prompt"] == prompt and pair["response_1"] == "on a mat"
    assert chatty.decode(pair["prompt_ids"]) == "<user>where is the cat\n<assistant>"
    assert chatty.decode(pair["ids_2"]) == "far from home" + END  # and no line end behind it


def test_ids_of_a_chat_are_trls(tmp_path, chatty):
    # but for what the template writes behind the END token
    from trl.data_utils import _tokenize

    prompt = [{"role": "user", "content": "where is the cat"}]
    answer = [{"role": "assistant", "content": "on a mat"}]
    other = [{"role": "assistant", "content": "home"}]
    pair = load(tmp_path, chatty, [row(prompt=prompt, chosen=answer, rejected=other)]).train[0]
    whole = _tokenize(chatty, prompt + answer)["input_ids"]
    assert whole[: len(pair["prompt_ids"]) + len(pair["ids_1"])] == (
        pair["prompt_ids"] + pair["ids_1"]
    )


def test_a_prompt_inside_the_responses_is_found(tmp_path, tokenizer, chatty):
    rows = [row(prompt=..., chosen="the cat sat on", rejected="the cat ran far")]
    pair = load(tmp_path, tokenizer, rows).train[0]
    assert (pair["prompt"], pair["response_1"], pair["response_2"]) == (
        "the cat",
        " sat on",
        " ran far",
    )
    user = {"role": "user", "content": "where is the cat"}
    sides = [[user, {"role": "assistant", "content": text}] for text in ("here", "there")]
    pair = load(tmp_path, chatty, [row(prompt=..., chosen=sides[0], rejected=sides[1])]).train[0]
    assert pair["prompt"] == [user] and pair["response_2"] == "there"
    # as UltraFeedback has it: the prompt as text, and again in both chats
    named = row(prompt="where is the cat", chosen=sides[0], rejected=sides[1])
    assert load(tmp_path, chatty, [named]).train[0]["prompt"] == [user]


@pytest.mark.parametrize(
    "columns, label, logit",
    [
        ({"pref_logit": -1.25}, "pref_logit", -1.25),
        ({"probability": 0.75}, "probability", math.log(3)),
        ({"probability": 0.0}, "probability", -HARD),
        ({"wins": 4, "votes": 5}, "votes", math.log(4.5 / 1.5)),
        ({"wins": 0, "votes": 1}, "votes", math.log(0.5 / 1.5)),
        ({"wins": 1.5, "votes": 3.0}, "votes", 0.0),
        ({"reward_chosen": 1.5, "reward_rejected": 2.0}, "reward", -0.5),
        ({"score_chosen": 7, "score_rejected": 4}, "reward", 3.0),
        ({}, "hard", HARD),
    ],
)
@pytest.mark.parametrize("names", ["chosen", "numbered"])
def test_labels_by_hand(tmp_path, tokenizer, columns, label, logit, names):
    one = row(**columns)
    if names == "numbered":
        swap = {"chosen": "1", "rejected": "2"}
        one = {("response_" * (k in swap) + swap[k]) if k in swap else k: v for k, v in one.items()}
        one = {k.replace("_chosen", "_1").replace("_rejected", "_2"): v for k, v in one.items()}
        if label == "hard":
            with pytest.raises(DataError, match="nothing says which of response_1 and response_2"):
                load(tmp_path, tokenizer, [one])
            return
    found = load(tmp_path, tokenizer, [one])
    assert found.label == label
    assert found.train[0]["pref_logit"] == pytest.approx(logit, abs=1e-12)
    votes = columns.get("votes")
    assert found.train[0]["votes"] == votes and found.train[0]["wins"] == columns.get("wins")


def test_clip_and_temperature(tmp_path, tokenizer):
    clipped = load(tmp_path, tokenizer, [row()], hard_label_clip=0.1).train[0]
    assert clipped["pref_logit"] == pytest.approx(math.log(9))
    rows = [row(reward_chosen=3.0, reward_rejected=1.0)]
    cooled = load(tmp_path, tokenizer, rows, reward_temperature=4.0).train[0]
    assert cooled["pref_logit"] == pytest.approx(0.5)


def test_two_labels_need_a_choice(tmp_path, tokenizer):
    rows = [row(pref_logit=1.0, score_chosen=7.0, score_rejected=1.0)]
    with pytest.raises(DataError, match=r"more than one label: pref_logit, reward") as caught:
        load(tmp_path, tokenizer, rows)
    assert "--preference_label reward" in str(caught.value)
    for label, logit in (("pref_logit", 1.0), ("reward", 6.0), ("hard", HARD)):
        found = load(tmp_path, tokenizer, rows, preference_label=label)
        assert found.train[0]["pref_logit"] == pytest.approx(logit)


@given(st.floats(0, 1), st.floats(0.001, 0.49))
def test_probabilities_are_antisymmetric_and_finite(p, clip):
    labels = _Labels("probability", ("", ""), PreferenceConfig(hard_label_clip=clip))
    one, _, _ = labels({"probability": p}, 0)
    other, _, _ = labels({"probability": 1.0 - p}, 0)
    assert math.isfinite(one) and one == pytest.approx(-other, abs=1e-9)
    assert abs(one) <= math.log((1 - clip) / clip) + 1e-9


@given(st.integers(1, 50).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_votes_are_haldanes(votes):
    wins, count = votes
    labels = _Labels("votes", ("", ""), PreferenceConfig())
    logit, *_ = labels({"wins": wins, "votes": count}, 0)
    other, *_ = labels({"wins": count - wins, "votes": count}, 0)
    assert logit == pytest.approx(-other, abs=1e-12)
    assert logit == pytest.approx(math.log((wins + 0.5) / (count - wins + 0.5)))


def test_held_out_pairs_share_no_prompt_and_the_seed_decides(tmp_path, tokenizer):
    rows = [row(n % 10, chosen=f" sat {n}") for n in range(40)]
    found = load(tmp_path, tokenizer, rows, held_out_pairs=5)
    prompts = [{one["prompt"] for one in part} for part in (found.train, found.held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 10
    assert len(found.held_out) == 8 and len(found.train) == 32  # whole prompts of four
    numbers = list(found.train["row"])
    assert numbers == list(load(tmp_path, tokenizer, rows, held_out_pairs=5).train["row"])
    assert numbers != sorted(numbers)
    other = load(tmp_path, tokenizer, rows, held_out_pairs=5, preference_seed=1)
    assert list(other.train["row"]) != numbers
    assert other.fingerprint == found.fingerprint
    few = load(tmp_path, tokenizer, rows, held_out_pairs=5, max_pairs=3)
    assert list(few.train["row"]) == numbers[:3]
    with pytest.raises(DataError, match=r"held_out_pairs: 40: leaves nothing to train on"):
        load(tmp_path, tokenizer, rows, held_out_pairs=40)


def test_long_rows_are_refused_or_dropped_and_counted(tmp_path, tokenizer):
    rows = [row(0), row(1, rejected=" ran far from home" * 30), row(2)]
    with pytest.raises(DataError, match=r"row 1 has \d+ tokens; the window is 40"):
        load(tmp_path, tokenizer, rows, window=40)
    found = load(tmp_path, tokenizer, rows, window=40, drop_long_rows=True)
    assert sorted(found.train["row"]) == [0, 2] and found.dropped == {"long": 1}
    with pytest.raises(DataError, match="no pair is left"):
        load(tmp_path, tokenizer, rows, window=3, drop_long_rows=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"wins": 6, "votes": 5}, r"wins: 6\.0: row 1: must lie in \[0, 5\]"),
        ({"wins": -1, "votes": 5}, r"wins: -1\.0: row 1"),
        ({"wins": 0, "votes": 0}, r"votes: 0\.0: row 1: nobody voted"),
        ({"wins": None, "votes": 5}, r"wins: None: row 1: must be a number"),
        ({"probability": 1.5}, r"probability: 1\.5: row 1"),
        ({"probability": -0.1}, r"probability: -0\.1: row 1"),
        ({"pref_logit": float("nan")}, r"pref_logit: nan: row 1: must be finite"),
        ({"pref_logit": float("inf")}, r"pref_logit: inf: row 1: must be finite"),
        ({"reward_chosen": float("nan"), "reward_rejected": 0.0}, r"reward_chosen: nan: row 1"),
        ({"chosen": " "}, r"chosen: ' ': row 1: the response is empty"),
        ({"rejected": ""}, r"rejected: '': row 1: the response is empty"),
        ({"chosen": " ran far from home"}, r"row 1: both responses are the same"),
        ({"prompt": ""}, r"prompt: '': row 1: there is no prompt"),
        ({"chosen": None}, r"chosen, rejected: .*row 1: both must be text, or both messages"),
    ],
)
def test_broken_rows_name_row_and_column(tmp_path, tokenizer, changes, words):
    good = {"wins": 1, "votes": 2, "probability": 0.5, "pref_logit": 1.0}
    good |= {"reward_chosen": 1.0, "reward_rejected": 0.0}
    label = {name: good[name] for name in changes if name in good}
    with pytest.raises(DataError, match=words):
        load(tmp_path, tokenizer, [row(0, **label), row(1, **changes)])


def test_files_without_pairs_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no pair of responses; its columns: prompt, text"):
        load(tmp_path, tokenizer, [{"prompt": "a", "text": "b"}])
    both = {**row(), "response_1": " a", "response_2": " b"}
    with pytest.raises(DataError, match="two sets of responses"):
        load(tmp_path, tokenizer, [both])
    with pytest.raises(DataError, match=r"preference_label: 'votes': no such columns"):
        load(tmp_path, tokenizer, [row()], preference_label="votes")
    with pytest.raises(MissingFileError, match="preference_dataset"):
        load_preferences(PreferenceConfig(preference_dataset=str(tmp_path / "no.jsonl")), tokenizer)
    with pytest.raises(DataError, match="preference_dataset: None"):
        load_preferences(PreferenceConfig(), tokenizer)


def test_a_chat_without_a_template_is_refused(tmp_path, tokenizer):
    prompt = [{"role": "user", "content": "where"}]
    sides = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    with pytest.raises(DataError, match=r"prompt: .*row 0: cannot be tokenized"):
        load(tmp_path, tokenizer, [row(prompt=prompt, **sides)])


@pytest.mark.parametrize(
    "key, value",
    [
        ("preference_label", "vote"),
        ("hard_label_clip", 0.0),
        ("hard_label_clip", 0.5),
        ("reward_temperature", 0.0),
        ("max_pairs", 0),
        ("held_out_pairs", -1),
    ],
)
def test_settings_out_of_range_name_key_and_value(key, value):
    with pytest.raises(RecipeError, match=f"{key}: {value!r}"):
        PreferenceConfig(**{key: value})


def test_pairs_go_straight_into_the_trainer(tmp_path, tokenizer):
    from conftest import tiny_llama
    from pair_kit import irepo_args

    from llmkd import IrepoTrainer

    rows = [row(n, wins=n % 4, votes=3) for n in range(8)]
    found = load(tmp_path, tokenizer, rows, window=64, held_out_pairs=2)
    trainer = IrepoTrainer(
        tiny_llama(1, vocab=300),
        irepo_args(tmp_path / "run"),
        train_dataset=found.train,
        eval_dataset=found.held_out,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.evaluate()["eval_pairs"] == 2
