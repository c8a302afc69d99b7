"""The table: crossings and costs worked by hand, and a report that is one file."""

import json

import pytest
from transformers import GPT2Config, LlamaConfig

from llmkd.evaluation.compare import Curve, compare, print_table
from llmkd.evaluation.cost import forward_flops
from llmkd.evaluation.report import write_report


def test_crossing_lies_on_the_line_between_points():
    curve = Curve((100, 200, 300), (5.0, 4.0, 3.0))
    assert curve.first_reaches(3.5) == pytest.approx(250)
    assert curve.first_reaches(4.0) == pytest.approx(200)
    assert curve.first_reaches(6.0) == 100
    assert curve.first_reaches(2.9) is None
    assert Curve((), ()).first_reaches(1.0) is None


def test_the_first_of_several_crossings_counts():
    assert Curve((1, 2, 3, 4), (5.0, 3.0, 4.0, 2.0)).first_reaches(3.5) == pytest.approx(1.75)


def run_folder(folder, losses, *, kd_steps=0, teacher=None, selection_flops=0.0):
    folder.mkdir(parents=True)
    lines = [
        {"step": i + 1, "tokens": 100 * (i + 1), "eval_loss": y, "eval_accuracy": 0.5}
        for i, y in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "x", "train_tokens": 5, "eval_tokens": 5}
    facts = {
        "name": folder.name,
        "seed": 0,
        "tokens": 400,
        "wall_seconds": 60.0,
        "peak_memory_bytes": 1 << 30,
        "data": data,
        "schedule": {"max_steps": 4, "kd_steps": kd_steps},
        "student": {"forward_flops_per_token": 10.0},
        "teacher": teacher,
        "selection_flops": selection_flops,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    scores = {"loss": losses[-1], "bits_per_byte": 1.0, "accuracy": 0.5, "tokens": 5}
    (folder / "eval.json").write_text(json.dumps({"held_out": scores}))
    return folder


def test_costs_are_counted_in_three_ways(tmp_path):
    base = run_folder(tmp_path / "baseline", [5.0, 4.0, 3.5, 3.0])
    teacher = {"forward_flops_per_token": 2.0, "training_flops": 1200.0}
    salt = run_folder(
        tmp_path / "salt", [5.0, 4.0, 3.0, 2.5], kd_steps=1, teacher=teacher, selection_flops=600.0
    )
    rows = {row.name: row for row in compare({"baseline": base, "salt": salt}, "baseline")}
    # the baseline spends 3 * 10 * 400 = 12,000; salt reaches its loss after 300 tokens: 9,000;
    # its teacher answers for 100 tokens: 200; training it cost 1,200 and scoring 600
    one = rows["salt"]
    assert one.tokens_to_baseline == 300 and one.tokens_ratio == pytest.approx(0.75)
    assert one.flops_ratio_free_teacher == pytest.approx(9000 / 12000)
    assert one.flops_ratio_with_forwards == pytest.approx(9200 / 12000)
    assert one.flops_ratio_with_training == pytest.approx(11000 / 12000)
    assert rows["baseline"].tokens_ratio == 1.0


def test_a_given_teachers_training_is_unknown_not_free(tmp_path):
    base = run_folder(tmp_path / "baseline", [5.0, 4.0])
    teacher = {"forward_flops_per_token": 2.0, "training_flops": None}
    salt = run_folder(tmp_path / "salt", [4.5, 3.0], kd_steps=2, teacher=teacher)
    row = compare({"baseline": base, "salt": salt}, "baseline")[1]
    assert row.flops_ratio_with_forwards is not None and row.flops_ratio_with_training is None


def test_without_a_baseline_or_a_crossing_the_ratios_are_empty(tmp_path, capsys):
    base = run_folder(tmp_path / "baseline", [5.0, 3.0])
    slow = run_folder(tmp_path / "slow", [5.0, 4.0])
    alone = compare({"slow": slow}, "baseline")
    assert alone[0].tokens_ratio is None and alone[0].target is None
    print_table(alone, "baseline")
    assert "baseline's final loss" not in capsys.readouterr().out
    assert compare({"baseline": base, "slow": slow}, "baseline")[1].tokens_ratio is None


def test_flops_of_a_llama_by_hand():
    # a layer: q, k, v, o 4 * 2 * 8 * 8, scores 2 * 2 * 8 * 32, MLP 3 * 2 * 8 * 16
    # and the head 2 * 50 * 8
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    assert forward_flops(config, 32) == 2 * (512 + 1024 + 768) + 800


def test_flops_of_another_shape_fall_back_to_parameters():
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    assert forward_flops(config, 16) > 2 * 50 * 8


def test_the_report_is_one_file_and_escapes_what_it_shows(tmp_path):
    run_folder(tmp_path / "baseline", [5.0, 4.0])
    facts = {"kind": "salt", "arms": ["baseline"], "name": "salt"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    evil = tmp_path / "baseline" / "run.json"
    evil.write_text(evil.read_text().replace('"source": "x"', '"source": "<script>alert(1)"'))
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") >= 2 and 'src="http' not in page
