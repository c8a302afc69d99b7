"""Recipe keys of annotators: what is made of them, and each slip."""

import json

import pytest
from annotator_kit import PAIR, save_judge

from llmkd.annotators.config import KINDS, AnnotatorConfig, make_annotators
from llmkd.annotators.human import HumanAnnotator
from llmkd.annotators.judge import JudgeAnnotator
from llmkd.annotators.rule import RuleAnnotator
from llmkd.errors import MissingFileError, RecipeError
from llmkd.trainers import IrepoConfig


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text("def one(prompt, response, seed): return seed\n")
    return f"{path}:one"


def make(tmp_path, *entries, **keys):
    return make_annotators(
        AnnotatorConfig(annotators=list(entries), **keys), seed=9, folder=tmp_path
    )


def test_each_type_is_made_with_its_keys(tmp_path, rules, tokenizer):
    save_judge(tmp_path / "judge", tokenizer)
    rule, human, judge = make(
        tmp_path / "run",
        {"type": "rule", "function": rules},
        {"type": "human", "file": str(tmp_path / "rated.jsonl"), "name": "people"},
        {"type": "judge", "model": str(tmp_path / "judge"), "mode": "pair", "template": PAIR},
        annotation_batch_size=3,
    )
    assert isinstance(rule, RuleAnnotator) and rule.seed == 9 and rule.name == rules
    assert isinstance(human, HumanAnnotator) and human.name == "people"
    assert human.to_rate == tmp_path / "run" / "to_rate.jsonl"
    assert isinstance(judge, JudgeAnnotator) and judge.batch_size == 3


def test_json_of_the_command_line_and_one_mapping(tmp_path, rules):
    entry = {"type": "rule", "function": rules, "seed": 4}
    for given in (json.dumps([entry]), entry):
        (made,) = make_annotators(AnnotatorConfig(annotators=given), seed=9, folder=tmp_path)  # type: ignore[arg-type]
        assert isinstance(made, RuleAnnotator) and made.seed == 4  # what is written goes first


def test_a_name_is_what_reports_call_it(tmp_path, rules):
    entry = {"type": "rule", "function": rules}
    with pytest.raises(RecipeError, match=r"annotators\[1\]\.name: .* is another annotator's"):
        make(tmp_path, entry, entry)
    assert [a.name for a in make(tmp_path, entry, {**entry, "name": "two"})] == [rules, "two"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_type_loads_and_says_what_it_needs(kind):
    assert KINDS[kind].load().__doc__
    with pytest.raises(RecipeError, match=rf"annotators\[0\]\.\w+: None: a {kind} annotator needs"):
        AnnotatorConfig(annotators=[{"type": kind}])


@pytest.mark.parametrize(
    "given, problem",
    [
        ("[{", "annotators: .* is not JSON"),
        ("3", "must be a list of mappings"),
        ([], "must be a list of mappings"),
        (["rule"], r"annotators\[0\]: 'rule': must be a mapping with a type"),
        ([{"function": "f.py:f"}], "must be a mapping with a type"),
        ([{"type": "rules"}], r"annotators\[0\]\.type: 'rules': unknown\n  - did you mean 'rule'"),
        ([{"type": ["rule"]}], r"annotators\[0\]\.type"),
        (
            [{"type": "judge", "model": "m", "templat": "x"}],
            r"annotators\[0\]\.templat: 'x': a judge annotator has no such key\n"
            "  - did you mean 'template'",
        ),
        ([{"type": "server", "url": "u"}], r"annotators\[0\]\.model: None: a server"),
    ],
)
def test_slips_in_the_list(given, problem):
    with pytest.raises(RecipeError, match=problem):
        AnnotatorConfig(annotators=given)


@pytest.mark.parametrize(
    "key, value",
    [
        ("combine", "mean"),
        ("annotator_flip_rate", 0.5),
        ("annotator_flip_rate", -0.1),
        ("logit_temperature", 0.0),
        ("annotator_max_logit", 0.0),
        ("annotator_max_logit", float("nan")),
        ("annotation_batch_size", 0),
    ],
)
def test_numbers_out_of_range(key, value):
    with pytest.raises(RecipeError, match=key):
        AnnotatorConfig(**{key: value})


def test_nobody_to_ask(tmp_path):
    with pytest.raises(RecipeError, match="nobody compares the responses"):
        make_annotators(AnnotatorConfig(), seed=0, folder=tmp_path)


def test_what_a_constructor_refuses_names_the_place(tmp_path, rules):
    good = {"type": "rule", "function": rules}
    with pytest.raises(MissingFileError, match=r"annotators\[1\]: .*no such file"):
        make(tmp_path, good, {"type": "rule", "function": "./gone.py:f"})
    with pytest.raises(RecipeError, match=r"annotators\[0\]: "):
        make(tmp_path, {"type": "human", "file": 3})


def test_a_recipe_can_hold_the_trainers_keys_too():
    from trl import TrlParser

    TrlParser((AnnotatorConfig, IrepoConfig))  # type: ignore[arg-type]  # argparse refuses doubles
