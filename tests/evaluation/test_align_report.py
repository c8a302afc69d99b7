"""The report of an iREPO run: its numbers, its examples, folders with gaps, and `llmkd eval`."""

import argparse
import json
import re

import pytest
from align_kit import RUN, metrics, write_align_run, write_answers, write_lines
from harness_kit import Kit

from llmkd.evaluation.align_examples import LONGEST, examples, verdict_words
from llmkd.evaluation.align_harness import harness_rows
from llmkd.evaluation.align_plots import draw_spread, draw_win_kl
from llmkd.evaluation.align_report import headline, print_align_table, write_align_report
from llmkd.evaluation.align_run import read_align_run
from llmkd.files import read_json, write_json

PNG = b"\x89PNG"


@pytest.fixture
def run(tmp_path):
    return write_align_run(tmp_path / "run")


def cells(page, first):
    """The cells of the row of a table that begins with `first`."""
    (row,) = re.findall(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", page)
    return re.findall(r"<td>(.*?)</td>", row)


def section(page, title):
    """The page from one heading to the next."""
    return page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def test_the_numbers_of_the_page(run):
    page = write_align_report(run).read_text()
    policies = section(page, "Policies on held-out prompts")
    assert cells(policies, "start") == [
        "-", "-", "0 ± 0.25", "-", "1", "12.9", "5.0%", "0.812",
    ]  # fmt: skip
    assert cells(policies, "2") == [
        "70.0% [64.0%, 76.0%]", "55.0% [64.0%, 76.0%]", "4 ± 0.25", "2", "3", "14.9", "5.0%",
        "0.613",
    ]  # fmt: skip
    work = section(page, "Iterations")
    assert cells(work, "1") == [
        "200", "800", "31 / 7 / 0", "12", "188", "1.25", "0.75", "62.5%", "60 s", "20 s", "100 s",
    ]  # fmt: skip
    judges = section(page, "Annotators")
    assert cells(judges, "rule") == ["1,200", "+0.00", "-", "-", "71.2%"]
    assert (
        "big picks a place, not a response, mostly the first: turning the order turns 75%" in page
    )
    assert "rule picks a place" not in page
    time = section(page, "Where the time went")
    # 60 + 20 + 5 + 100 = 185 seconds; with both iterations and the start's evaluation 400
    assert (
        cells(time, "iteration 1")[0] == "60 s (32%)" and cells(time, "iteration 1")[-1] == "185 s"
    )
    assert cells(time, "all")[3] == "200 s (50%)" and cells(time, "all")[4] == "30 s (8%)"
    for words in (
        "model: HuggingFaceTB/SmolLM2-135M-Instruct · loss: irepo · beta: 0.1",
        "2 of 2 iterations · seed 17 · 21 min in all",
        "iteration 2: 31 responses said the &lt;same&gt;",
        "Iterate 2 wins 70.0% [64.0%, 76.0%] against the start at a KL of 4 ± 0.25 nats",
        "annotators: rule, reward big",
        "those the policy was trained to please",
    ):
        assert words in page, words
    assert "shows no difference" not in page and "departed" not in page


def test_the_page_is_one_file(run):
    page = write_align_report(run).read_text()
    for name in ("win_kl.png", "rewards.png", "lengths.png"):
        assert (run / name).read_bytes()[:4] == PNG
    assert page.count("data:image/png;base64,") == 3
    assert not list(run.glob("*.part")) and not list(run.glob(".*part"))
    assert 'src="http' not in page and "<script" not in page and "<b>?" not in page


def test_examples_are_spread_and_carry_their_verdict(run):
    found = examples(read_align_run(run))
    assert [one.row for one in found] == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert found[1].start == "policy 0 row 2" and found[1].last == "policy 2 row 2"
    assert found[1].logit == -13.0 and found[1].last_score == 1.5 and found[1].start_score is None
    page = section(write_align_report(run).read_text(), "Side by side")
    assert page.count("<figure") == 24 and page.count("<b>user</b> prompt 5 &lt;b&gt;?") == 1
    assert "<figcaption>iterate 2, score 1.5</figcaption>" in page
    assert "Verdict: a tie." in page  # row 15
    assert "Verdict: the start, with probability 100% (logit -13.00)." in page


def test_verdicts_in_words():
    assert verdict_words(1.0986, "3") == "Verdict: iterate 3, with probability 75% (logit +1.10)."
    assert verdict_words(-1.0986, "3").startswith("Verdict: the start, with probability 75%")
    assert verdict_words(None, "3") == "Not compared by the annotators."


def test_examples_without_verdicts_take_the_first_response(run):
    (run / "iteration-2" / "held_out_verdicts.jsonl").unlink()
    (run / "iteration-0" / "held_out" / "part-00000.jsonl").unlink()
    found = examples(read_align_run(run))
    assert found[0].start is None and found[0].last == "policy 2 row 0" and found[0].logit is None
    assert found[-1].start == "policy 0 row 27"
    page = write_align_report(run).read_text()
    assert "no response" in page and "Not compared by the annotators." in page


def test_the_first_iterate_has_the_start_before_it(tmp_path):
    run = write_align_run(tmp_path / "run", iterations=1)
    path = run / "iteration-1" / "held_out_verdicts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line for line in lines if line["against"] == "previous"])
    assert examples(read_align_run(run))[0].logit == -15.0
    page = write_align_report(run).read_text()
    assert "1 of 2 iterations" in page


def test_long_and_empty_responses(run):
    line = {"row": 3, "against": "start", "response": "x" * (LONGEST + 1500), "other": "\n"}
    write_lines(run / "iteration-2" / "held_out_verdicts.jsonl", [{**line, "logit": None}])
    page = write_align_report(run).read_text()
    assert "x […1,500 more characters]" in page and "x" * (LONGEST + 1) not in page
    assert "(empty)" in page


def test_an_interval_around_a_half_is_said(run):
    held = metrics(2)
    held["held_out"]["win_rate_start"] = {"soft": 0.53, "hard": 0.5, "low": 0.47, "high": 0.6}
    write_json(run / "iteration-2" / "metrics.json", held)
    said = headline(read_align_run(run))
    assert said.endswith("The interval holds 50%: this run alone shows no difference.")


def test_samples_of_another_temperature_have_no_kl(run):
    settings = {**RUN["settings"], "temperature": 0.7, "held_out_annotators": [{"type": "human"}]}
    write_json(run / "run.json", RUN | {"settings": settings})
    page = write_align_report(run).read_text()
    assert "Sampling departed from the policy itself (temperature 0.7)" in page
    assert "trained to please" not in page


@pytest.mark.parametrize("done", [None, 0, 1])
def test_a_run_that_is_half_done(tmp_path, capsys, done):
    run = tmp_path / "run"
    write_json(run / "run.json", RUN | {"status": "running"})
    if done is not None:
        write_align_run(run, iterations=done, status="running")
    (run / "iteration-2" / "responses").mkdir(parents=True)  # it has begun
    page = write_align_report(run).read_text()
    print_align_table(run)
    shown = capsys.readouterr().out
    if done == 1:
        assert "1 of 2 iterations" in page and "60.0%" in shown
    else:
        assert "No trained policy has been measured yet." in page + shown
        assert ("No iteration has been measured yet." in page) == (done is None)


def test_missing_iterations_and_odd_numbers(run):
    (run / "iteration-0" / "metrics.json").unlink()
    (run / "iteration-1" / "metrics.json").write_text("{")
    odd = {"iteration": 2, "held_out": None, "train": 3, "annotators": "x", "dropped": []}
    write_json(run / "iteration-2" / "metrics.json", odd | {"seconds": None, "warnings": "x"})
    (run / "iteration-final").mkdir()
    page = write_align_report(run).read_text()
    assert "iteration-1/metrics.json cannot be read (JSONDecodeError)" in page
    assert cells(section(page, "Iterations"), "2") == ["-"] * 11
    nothing = {"mean": float("nan"), "values": [None, "x", float("inf")]}
    odd["held_out"] = {"reward": nothing, "lengths": [], "win_rate_start": {"soft": 0.5}}
    write_json(run / "iteration-2" / "metrics.json", odd)
    page = write_align_report(run).read_text()
    assert cells(section(page, "Policies on held-out prompts"), "2")[0] == "50.0%"
    (run / "run.json").unlink()
    write_align_report(run)


def test_an_empty_folder_gives_a_page(tmp_path):
    assert "No iteration has been measured yet." in write_align_report(tmp_path).read_text()


def test_broken_lines_of_answers_are_left_out(run):
    path = run / "iteration-2" / "held_out" / "part-00001.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(examples(read_align_run(run))) == 12


def test_pictures(run):
    whole = read_align_run(run)
    assert draw_win_kl(whole)[:4] == PNG
    assert draw_spread(whole, ("reward", "values"), "score")[:4] == PNG
    assert draw_spread(whole, ("nothing",), "score") is None
    for number in (1, 2):
        held = metrics(number)
        held["held_out"]["kl_initial"] = None
        held["held_out"]["lengths"] = [12] * 4
        write_json(run / f"iteration-{number}" / "metrics.json", held)
    assert draw_win_kl(read_align_run(run)) is None
    assert draw_spread(read_align_run(run), ("lengths",), "tokens")[:4] == PNG


def test_the_terminal_table_fits(run, capsys):
    print_align_table(run)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.strip().startswith("2"))
    assert line.split() == [
        "2",
        "70.0%",
        "[64.0%,",
        "76.0%]",
        "4",
        "±",
        "0.25",
        "3",
        "14.9",
        "0.613",
    ]
    assert max(map(len, said.splitlines())) <= 80


def test_harness_rows_by_hand():
    side = {
        "models": {"student": "run", "baseline": "base"},
        "tasks": {
            "arc": {
                "acc": {
                    "higher_is_better": True,
                    "n": 1200,
                    "values": {"student": 0.45, "baseline": 0.5},
                    "stderrs": {"student": 0.03, "baseline": 0.04},
                }
            }
        },
    }
    bpb = {"metrics": {"bpb": {"value": 0.9, "stderr": None, "higher_is_better": False}}, "n": 4}
    scores = {"lm_eval": {"side_by_side": side, "tasks": {"arc": {}, "held_out": bpb}}}
    assert harness_rows(scores) == [
        ["arc", "acc ↑", "1,200", "0.5000 ± 0.0400", "0.4500 ± 0.0300", "-0.0500 ± 0.0500"],
        ["held_out", "bpb ↓", "4", "-", "0.9000", "-"],
    ]
    assert harness_rows({}) == harness_rows({"lm_eval": {"side_by_side": None}}) == []


@pytest.mark.parametrize("adapter", [False, True])
def test_llmkd_eval_before_and_after(tmp_path, monkeypatch, capsys, adapter):
    """A run folder with a whole model or an adapter is measured beside what it started from."""
    from llmkd.evaluation import cli

    kit = Kit(tmp_path, monkeypatch)
    base = kit.model("base")
    if adapter:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=3.0)
        model.save_pretrained(tmp_path / "run")
        kit.tokenizer.save_pretrained(tmp_path / "run")
        run = tmp_path / "run"
    else:
        run = kit.model("run", seed=5)
    write_align_run(run)
    write_json(run / "eval.json", {"policy": {"distinct_2": 0.5}})
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    words = [str(run), "--baseline", str(base), "--tasks", kit.rolling, "--device", "cpu"]
    assert cli.main(parser.parse_args(words)) == 0
    held = read_json(run / "eval.json")
    assert held["policy"] == {"distinct_2": 0.5}
    row = held["lm_eval"]["side_by_side"]["tasks"]["tiny_rolling"]["bits_per_byte"]["values"]
    assert row["baseline"] != row["student"]
    page = section(write_align_report(run).read_text(), "Evaluation harness")
    before, after, change = cells(page, "tiny_rolling")[2:]
    assert before.startswith(f"{row['baseline']:.4f}") and after.startswith(f"{row['student']:.4f}")
    assert change.startswith(f"{row['student'] - row['baseline']:+.4f}")
    capsys.readouterr()


def test_more_rows_after_than_before_are_no_trouble(run):
    write_answers(run, 2, rows=5)
    assert [one.row for one in examples(read_align_run(run))] == [0, 1, 2, 3, 4]
