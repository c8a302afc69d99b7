"""The report of an ERNIE-Tiny run: ratios by hand, stages drawn once, and folders with gaps."""

import json
import shutil

import pytest

from llmkd.evaluation import distill_report
from llmkd.evaluation.distill_arms import read_run, table_rows
from llmkd.evaluation.distill_plots import draw_arms, draw_stages
from llmkd.evaluation.distill_report import print_arm_table, write_distill_report

PNG = b"\x89PNG"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def log(folder, *parts, steps=4):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": s, "loss": 3.0 / s, **dict.fromkeys(parts, 1.0 / s)} for s in range(1, steps)]
    lines.append({"step": steps, "eval_loss": 0.7, "eval_accuracy": 0.625, "eval_soft": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def stage(name, folder, **facts):
    known = {"name": name, "folder": str(folder), "key": name, "teacher": "finetuned"}
    known |= {"data": "task", "losses": ["latent"], "steps": 4, "wall_seconds": 60.0}
    return known | {"peak_memory_bytes": 1 << 30, "tokens": 2000} | facts


def arm(folder, score, stages, **facts):
    size = {"parameters": 250, "layers": 1}
    teacher = {"source": "big", "parameters": 1000, "score": 0.9}
    known = {"kind": "ernie-tiny", "name": folder.name, "status": "done", "wall_seconds": 1.0}
    known |= {"student": size, "teacher": teacher, "stages": stages, "seed": 3}
    write(folder / "run.json", known | facts)
    student, whole = {"batch_1_ms": 2.0, "batch_32_ms": 8.0}, {"batch_1_ms": 9.0}
    latency = {"student": student, "teacher": whole, "ratio": {"batch_1": 4.0}}
    write(folder / "eval.json", {"task": {"accuracy": score, "examples": 8}, "latency": latency})


@pytest.fixture
def run(tmp_path):
    """Two arms that share `gd`: one folder told relative, one absolute."""
    out = tmp_path / "run"
    log(out / "stages" / "gd", "attn", "hidden")
    log(out / "stages" / "tsd-full", "soft", "hard")
    log(out / "stages" / "tsd-short", "hard")
    first = stage("gd", "stages/gd", data="general", teacher="pretrained", wall_seconds=120.0)
    again = {**first, "folder": str(out / "stages" / "gd")}
    arm(out / "full", 0.72, [first, stage("tsd", out / "stages" / "tsd-full")])
    arm(out / "short", 0.45, [again, stage("tsd", "stages/tsd-short")])
    task = {"source": "sst2", "kind": "single_label", "labels": ["bad", "good"], "metric": None}
    task |= {"train_examples": 8000, "eval_examples": 8}
    general = {"source": "<b>stdlib</b>", "train_tokens": 1_200_000}
    facts = {"kind": "ernie-tiny", "arms": ["full", "short"], "seed": 3}
    write(out / "run.json", facts | {"task": task, "general": general})
    write(out / "teacher" / "eval.json", {"task": {"accuracy": 0.9, "examples": 8}})
    write(out / "teacher" / "run.json", {"student": {"parameters": 1000}, "wall_seconds": 30.0})
    return out


def test_the_rows_by_hand(run):
    full, short, teacher = table_rows(read_run(run))
    assert (full.name, short.name, teacher.name) == ("full", "short", "teacher")
    assert full.retention == pytest.approx(0.8) and short.retention == pytest.approx(0.5)
    assert full.smaller == 4.0  # 1000 / 250 parameters
    assert full.speed_up_1 == 4.0  # round by round, which 9 / 2 of the medians is not
    assert full.speed_up_32 is None  # the teacher was not measured at 32
    assert full.minutes == 3.0 and short.minutes == 3.0  # the shared 2 minutes count in both
    assert (teacher.score, teacher.retention, teacher.parameters) == (0.9, 1.0, 1000)
    assert teacher.batch_1_ms == 9.0 and teacher.minutes == 0.5


def test_a_shared_stage_is_drawn_once(run, monkeypatch):
    stages = read_run(run).stages()
    found = [(one.name, one.folder.name, one.arms) for one in stages]
    assert found == [
        ("gd", "gd", ("full", "short")),
        ("tsd", "tsd-full", ("full",)),
        ("tsd", "tsd-short", ("short",)),
    ]
    drawn = []
    monkeypatch.setattr(distill_report, "draw_stages", lambda some: drawn.append(some) and None)
    write_distill_report(run)
    assert [title for title, _ in drawn[0]] == ["gd: full and 1 more", "tsd: full", "tsd: short"]
    assert [len(some) for some in drawn] == [3, 1, 1, 1, 1]  # curves.png, three stages, teacher


def test_the_page_is_one_file_and_says_what_it_shows(run):
    log(run / "teacher", "hard")
    page = write_distill_report(run).read_text()
    assert (run / "curves.png").read_bytes()[:4] == (run / "arms.png").read_bytes()[:4] == PNG
    assert not list(run.glob(".*part")) and 'src="http' not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 6  # two of the arms, three stages, the teacher
    assert "<b>stdlib" not in page and "&lt;b&gt;stdlib" in page and "1.20 M tokens" in page
    assert "sst2 (single label, 2 labels)" in page and "8,000 to train" in page and "seed 3" in page
    assert "4 minutes of distillation" in page  # gd once: 2 + 1 + 1
    for cell in ("72.00%", "80.0%", "250", "4.0x", "100.0%"):
        assert f"<td>{cell}</td>" in page
    words = "gd, general distillation: pretrained teacher, general text, latent, 4 steps."
    assert f"{words} Arms: full, short. accuracy at its end: 62.50%." in page
    for words in ("Retention is", "speed-up is", "One seed is one draw", "full: gd → tsd"):
        assert words in page


def test_a_moved_run_still_finds_its_stages(run, tmp_path):
    moved = tmp_path / "elsewhere" / "other-name"
    moved.parent.mkdir()
    shutil.move(run, moved)
    places = [one.folder for one in read_run(moved).stages()]
    assert places == [moved / "stages" / name for name in ("gd", "tsd-full", "tsd-short")]
    alone = read_run(moved / "full").stages()  # one arm of it, asked by itself
    assert [one.folder for one in alone] == places[:2]


def test_one_unnamed_arm_is_the_folder_itself(tmp_path):
    out = tmp_path / "single"
    log(out / "tsd", "hard")
    task = {"source": "stsb", "kind": "regression", "labels": 1, "metric": "spearman"}
    arm(out, 0.5, [stage("tsd", "tsd")], name="ernie-tiny", task=task)
    write(out / "eval.json", {"task": {"pearson": 0.7, "spearman": 0.5, "examples": 8}})
    found = read_run(out)
    assert found.metric == "spearman" and [one.name for one in found.arms] == ["ernie-tiny"]
    # nobody wrote teacher/eval.json: what the arm knows of its teacher serves
    assert table_rows(found)[0].retention == pytest.approx(0.5 / 0.9)
    page = write_distill_report(out).read_text()
    assert "<td>0.5000</td>" in page and "stsb (regression)" in page
    assert page.count("data:image/png") == 2  # no close-up of a single arm


def test_an_arm_that_did_not_finish_leaves_gaps(run):
    (run / "short" / "eval.json").unlink()
    facts = json.loads((run / "short" / "run.json").read_text())
    facts |= {"status": "running", "stages": [stage("gd", "gone"), {"name": "tsd"}]}
    write(run / "short" / "run.json", facts)
    short = table_rows(read_run(run))[1]
    assert short.name == "short (running)" and short.score is None and short.retention is None
    page = write_distill_report(run).read_text()
    assert "<td>short (running)</td><td>-</td><td>-</td>" in page
    # the parent's own table serves where an arm's folder has none
    write(run / "eval.json", {"arms": {"short": {"task": {"accuracy": 0.18}}}})
    assert table_rows(read_run(run))[1].retention == pytest.approx(0.2)
    write(run / "eval.json", {"arms": {"short": {"accuracy": 0.27}}})
    assert table_rows(read_run(run))[1].retention == pytest.approx(0.3)


@pytest.mark.parametrize("facts", [None, {"kind": "ernie-tiny", "arms": ["a", "b"]}])
def test_an_empty_folder_still_gives_a_page(tmp_path, facts):
    if facts:
        write(tmp_path / "run.json", facts)
    page = write_distill_report(tmp_path).read_text()
    assert "No arm has begun yet." in page and not (tmp_path / "arms.png").exists()
    print_arm_table(tmp_path)


def test_the_terminal_table_fits_and_defines_its_words(run, capsys):
    print_arm_table(run)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.strip().startswith("full"))
    assert line.split() == ["full", "72.00%", "80.0%", "4.0x", "4.0x", "-", "3.0"]
    assert "Retention is the student's score" in said and max(map(len, said.splitlines())) <= 80


def test_pictures_of_nothing_are_none_and_odd_numbers_are_drawn(run, tmp_path):
    assert draw_stages([]) is None and draw_stages([("x", tmp_path / "nowhere")]) is None
    write(run / "full" / "eval.json", {"task": {"accuracy": -0.1, "examples": 0}})
    assert draw_arms(read_run(run))[:4] == PNG
    for name in ("full", "short"):
        (run / name / "eval.json").unlink()
    assert draw_arms(read_run(run)) is None
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.0}\n')
    assert draw_stages([("odd", odd)])[:4] == PNG
