"""`llmkd judge` end to end on a rule, and on a server that looks at places only."""

import json

import numpy as np
import pytest
import yaml
from annotators.server_kit import ChatServer, says

from llmkd.errors import AnnotatorError, MissingFileError, RecipeError
from llmkd.evaluation import judge_report
from llmkd.files import read_json
from llmkd.methods.judge import TYPES, check_recipe, main
from llmkd.methods.recipe import read_recipe

RULE = """
import math, pathlib
def score(prompt, responses):
    with open(pathlib.Path(__file__).with_name("calls"), "a") as handle:
        handle.write("x")
    return [3.0 * float(text) for text in responses]
def absent(prompt, responses):
    return [[0, None], [None, 0]]
def contrary(prompt, responses):
    return [-float(text) for text in responses]
"""


@pytest.fixture
def world(tmp_path):
    """Pairs of numbers; people prefer the greater one with sigma(difference); five votes a pair."""
    (tmp_path / "rules.py").write_text(RULE)
    make = np.random.default_rng(0)
    rows = []
    for number in range(150):
        one, two = make.normal(0, 1, 2)
        wins = int(make.binomial(5, 1 / (1 + np.exp(two - one))))
        row = {"prompt": f"q{number} <b>", "response_1": f"{one:.6f}", "response_2": f"{two:.6f}"}
        rows.append({**row, "wins": wins, "votes": 5, "part": "ab"[number % 2]})
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(world, annotators, **settings):
    recipe = {"annotators": annotators, "output_dir": str(world / "out")}
    (world / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **settings}))
    return [str(world / "recipe.yaml"), "--rated_pairs", str(world / "rated.jsonl")]


def rule(world, name="score"):
    return {"type": "rule", "function": f"{world / 'rules.py'}:{name}", "name": name}


def test_a_rule_that_is_three_times_too_sure(world, capsys):
    page = main(words(world, [rule(world)], rated_columns={"group": "part"}))
    found = read_json(world / "out" / "judge.json")
    assert found["logit_temperature"]["fitted"] == pytest.approx(3, rel=0.25)
    assert found["logit_temperature"]["ece_fitted"] < found["logit_temperature"]["ece_now"]
    judge = found["judges"][0]
    assert judge["name"] == "score" and judge["pairs"] == 150 and judge["position"] is None
    assert judge["accuracy"]["low"] > 0.6 and found["groups"]["a"]["pairs"] == 75
    assert found["between"] == [] and found["rater_agreement"] > 0.5
    text = page.read_text()
    assert page == world / "out" / "judge.html" and "data:image/png" in text
    assert "&lt;b&gt;" in text and "<b> " not in text  # examples are escaped
    printed = capsys.readouterr().out
    assert "score" in printed and "logit_temperature: " in printed and str(page) in printed


def test_a_temperature_that_fits_is_left_alone(world, capsys):
    main(words(world, [rule(world)]))
    fitted = read_json(world / "out" / "judge.json")["logit_temperature"]["fitted"]
    capsys.readouterr()
    main(words(world, [rule(world)], logit_temperature=1.05 * fitted))
    assert f"logit_temperature: {1.05 * fitted:g} is right" in capsys.readouterr().out


def test_a_second_call_asks_nothing(world):
    main(words(world, [rule(world)]))
    first, calls = read_json(world / "out" / "judge.json"), (world / "calls").stat().st_size
    main(words(world, [rule(world)]))
    assert calls == 150 == (world / "calls").stat().st_size
    again = read_json(world / "out" / "judge.json")
    assert first["judges"][0]["accuracy"] == again["judges"][0]["accuracy"]


def test_several_judges_are_combined_and_compared(world):
    main(words(world, [rule(world), rule(world, "contrary")]))
    found = read_json(world / "out" / "judge.json")
    assert [judge["name"] for judge in found["judges"]] == ["score", "contrary"]
    assert found["between"][0]["agreement"] == 0 and found["between"][0]["kappa"] == -1
    assert found["combined"]["accuracy"] == found["judges"][0]["accuracy"]  # (3 - 1) / 2 > 0
    assert any("contrary: accuracy" in w and "coin" in w for w in found["warnings"])


def test_a_server_that_always_says_a_is_found_out(world, capsys):
    server = ChatServer(lambda body, number: says("A"))
    try:
        entry = {"type": "server", "url": server.url, "model": "m", "name": "[first]"}
        main(words(world, [entry], max_rated_pairs=20))
    finally:
        server.close()
    found = read_json(world / "out" / "judge.json")
    judge = found["judges"][0]
    assert judge["position"]["first"] == judge["position"]["disagree"] == 1
    assert judge["pairs"] == 20 and judge["notes"]["calls"] == 40
    assert judge["accuracy"]["mean"] == 0.5 and found["logit_temperature"]["fitted"] is None
    printed = capsys.readouterr().out
    assert "prefers the first response whatever it says" in " ".join(printed.split())
    assert "[first]" in printed and "none fits" in printed
    assert (world / "out" / "judge_answers").is_dir()


def test_an_annotator_without_an_answer_is_an_error(world):
    with pytest.raises(AnnotatorError):
        main(words(world, [rule(world, "absent")]))


def test_keys_of_an_irepo_recipe_are_no_hindrance(world):
    settings = {"beta": 0.1, "iterations": 2, "loss": "irepo", "num_responses": 4, "seed": 3}
    assert main(words(world, [rule(world)], **settings)).is_file()


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--rated_pairs", ""], "rated_pairs"),
        (["--annotators", "null"], "annotators"),
        (["--max_rated_pairs", "0"], "max_rated_pairs"),
        (["--rated_columns", '{"promt": "x"}'], "rated_columns.promt"),
        (["--rated_columns", "[1]"], "rated_columns"),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_anything(world, flags, wanted):
    with pytest.raises(RecipeError, match=f"^{wanted}"):
        check_recipe(read_recipe([*words(world, [rule(world)]), *flags], TYPES))


def test_a_file_that_is_not_there(world):
    flags = ["--rated_pairs", str(world / "none.jsonl")]
    with pytest.raises(MissingFileError, match="rated_pairs"):
        main([*words(world, [rule(world)]), *flags])


def test_long_texts_are_cut_in_the_page():
    assert len(judge_report._cut("x" * 9999)) == judge_report.LONGEST
