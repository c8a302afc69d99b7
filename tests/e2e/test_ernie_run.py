"""`llmkd ernie-tiny` from a task and text to a model anybody opens: run, run again, go on."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import sentences, tiny_llama
from ernie_kit import (
    SETTINGS,
    STAGES,
    break_off,
    many_labels,
    numbers,
    quick,
    recipe,
    refused,
    reviews,
    same,
    save_teacher,
    stage,
    stage_folders,
    tagged,
    unfinish,
    weights,
)
from task_kit import write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from llmkd.cli import main
from llmkd.files import read_json
from llmkd.methods import ernie_tiny

__all__ = ["quick"]  # a fixture
GENERAL = {"stages": ["gd"], "task_dataset": None, "task_eval_dataset": None}
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def done(path, *flags):
    assert main(["ernie-tiny", path, *flags]) == 0


def logits_of(folder, texts):
    """What a finished model says, text by text, opened as anybody does."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_four_stages_end_in_a_model_that_anybody_opens(tmp_path, capsys):
    path, run = recipe(tmp_path, learning_rate=0.02), tmp_path / "run"
    done(path)
    assert "retention" in capsys.readouterr().out
    dev = reviews(21, seed=1)
    logits = logits_of(run, [row["text"] for row in dev])
    kept = np.load(run / "predictions.npz")
    np.testing.assert_allclose(kept["outputs"], logits, rtol=0, atol=1e-5)
    gold = [int(row["label"] == "pos") for row in dev]
    assert kept["labels"].tolist() == gold
    scores = read_json(run / "eval.json")
    right = (logits.argmax(-1) == torch.tensor(gold)).double().mean().item()
    assert scores["task"]["accuracy"] == pytest.approx(right)
    assert scores["task"]["hard"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(gold)).item(), rel=1e-5
    )
    assert scores["latency"]["student"]["batch_1_ms"] > 0

    classify = pipeline("text-classification", model=str(run))
    answers = [answer["label"] for answer in classify([row["text"] for row in dev])]
    assert answers == [["neg", "pos"][place] for place in logits.argmax(-1)]

    expected = AutoModelForSequenceClassification.from_pretrained(run).state_dict().keys()
    assert weights(run).keys() == expected  # no projection, nothing missing
    assert not (run / "projections.safetensors").exists()
    assert {p.name for p in run.iterdir()} > MODEL_FILES
    config = read_json(run / "config.json")
    assert config["id2label"] == {"0": "neg", "1": "pos"} and config["num_hidden_layers"] == 2
    assert "llmkd" not in (run / "config.json").read_text()

    facts = read_json(run / "run.json")
    assert facts["status"] == "done" and [s["name"] for s in facts["stages"]] == list(STAGES)
    assert [s["steps"] for s in facts["stages"]] == [4, 3, 3, 4]
    assert facts["tokens"] == sum(s["tokens"] for s in facts["stages"]) > 0
    assert (run / "report.html").is_file()
    for name in STAGES:
        lines = [line for line in lines_of(stage(run, name)) if "loss" in line]
        parts = {"attn", "hidden"} | ({"soft", "hard"} if name == "tsd" else set())
        assert parts == {"attn", "hidden", "soft", "hard"} & lines[-1].keys()
        assert (stage(run, name) / "projections.safetensors").is_file()
    for name in ("gd", "ged", "tad"):
        assert set(read_json(stage(run, name) / "eval.json")["held_out"]) >= {"attn", "hidden"}


def test_run_again_everything_is_reused(tmp_path, capsys, quick):
    path, run = recipe(tmp_path), tmp_path / "run"
    done(path)
    files = [p for p in run.parent.rglob("*.safetensors") if "bert" not in p.parts]
    stamps = {p: p.stat().st_mtime_ns for p in files}
    assert len(stamps) == 2 + 2 * 4  # teacher, export, and each stage with its projections
    capsys.readouterr()
    done(path)
    assert capsys.readouterr().out.count("holds this very run") == 6
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert read_json(run / "run.json")["resumed"] == 0


def test_stages_hand_on_every_bit(tmp_path, quick):
    """A stage of no learning rate begins, and so ends, with the weights of the one before."""
    idle = {**SETTINGS, **{name: {"max_steps": 1, "learning_rate": 0.0} for name in STAGES[1:]}}
    done(recipe(tmp_path, stage_settings=idle))
    run = tmp_path / "run"
    before = weights(stage(run, "gd"))
    projections = (stage(run, "gd") / "projections.safetensors").read_bytes()
    for name in ("ged", "tad"):
        assert same(weights(stage(run, name)), before)
        assert (stage(run, name) / "projections.safetensors").read_bytes() == projections
    last = weights(stage(run, "tsd"))
    assert (stage(run, "tsd") / "projections.safetensors").read_bytes() == projections
    body = {k.removeprefix("bert."): v for k, v in last.items() if k.startswith("bert.")}
    assert same(body, before)
    assert set(last) - {f"bert.{k}" for k in before} == {"classifier.weight", "classifier.bias"}
    assert same(weights(run), last)
    key = read_json(stage(run, "gd") / "run.json")["key"]
    assert read_json(stage(run, "ged") / "run.json")["student"]["start"] == key


def test_from_gd_to_ged_only_the_teacher_changes(tmp_path, quick):
    done(recipe(tmp_path, stages=["gd", "ged"]))
    run = tmp_path / "run"
    one, two = (read_json(stage(run, name) / "run.json") for name in ("gd", "ged"))
    assert one["data"] == two["data"] and one["losses"] == two["losses"]
    assert one["teacher"]["fingerprint"] != two["teacher"]["fingerprint"]
    assert two["teacher"]["source"] == str(run / "teacher")
    differ = {k for k in one["settings"] if one["settings"][k] != two["settings"][k]}
    assert differ == {"max_steps"}  # as the recipe has it


def test_arms_share_equal_beginnings(tmp_path, quick):
    arms = {
        "full": {},
        "no_tad": {"stages": ["gd", "ged", "tsd"]},
        "tinybert": {"stages": ["gd", "tad", "prediction"]},
        "plain": {"stages": ["finetune"]},
    }
    settings = {**SETTINGS, "prediction": {"max_steps": 2}, "finetune": {"max_steps": 2}}
    done(recipe(tmp_path, arms=arms, stage_settings=settings))
    run = tmp_path / "run"
    counted = {name: len(folders) for name, folders in stage_folders(run).items()}
    # tad follows ged or gd; tsd follows tad or ged
    assert counted == {"gd": 1, "ged": 1, "tad": 2, "tsd": 2, "prediction": 1, "finetune": 1}
    made = {name: read_json(run / name / "run.json") for name in arms}
    folders = {name: [s["folder"] for s in facts["stages"]] for name, facts in made.items()}
    assert folders["full"][:2] == folders["no_tad"][:2]
    assert folders["full"][0] == folders["tinybert"][0]
    for name, facts in made.items():
        assert facts["status"] == "done" and facts["name"] == name
        assert weights(run / name).keys() == weights(run / "full").keys()
        assert not same(weights(run / name), weights(run / "full")) or name == "full"
    lines = lines_of(stage(run, "prediction"))
    assert "soft" in lines[0] and "attn" not in lines[0] and "hidden" not in lines[0]
    assert not (stage(run, "finetune") / "projections.safetensors").exists()
    assert set(read_json(run / "eval.json")["arms"]) == set(arms)
    assert read_json(run / "run.json")["status"] == "done"


def test_a_new_arm_joins_an_old_run(tmp_path, capsys, quick):
    done(recipe(tmp_path, arms={"full": {}}))
    run = tmp_path / "run"
    before = weights(run / "full")
    capsys.readouterr()
    done(recipe(tmp_path, arms={"full": {}, "short": {"stages": ["gd", "tsd"]}}))
    assert "full: reused" in capsys.readouterr().out
    assert same(weights(run / "full"), before) and (run / "short" / "model.safetensors").is_file()
    assert len(stage_folders(run)["gd"]) == 1


def test_general_distillation_is_shared_by_tasks(tmp_path, capsys, quick):
    shared, text = str(tmp_path / "shared"), str(tmp_path / "a" / "general.jsonl")
    teacher = save_teacher(tmp_path / "bert")
    both = {"general_stages": shared, "teacher_model_name_or_path": teacher}
    done(recipe(tmp_path / "a", **both))
    capsys.readouterr()
    (tmp_path / "b").mkdir()
    write_rows(tmp_path / "b" / "train.jsonl", numbers())
    write_rows(tmp_path / "b" / "dev.jsonl", numbers(12, seed=1))
    done(recipe(tmp_path / "b", dataset=text, teacher_floor=-1.0, **both))
    assert "gd: reused" in capsys.readouterr().out
    assert len([p for p in (tmp_path / "shared").iterdir() if p.is_dir()]) == 1
    stages = [read_json(tmp_path / x / "run" / "run.json")["stages"] for x in "ab"]
    assert stages[0][0] == stages[1][0] and stages[0][1]["key"] != stages[1][1]["key"]
    # another dtype of the teacher is another general stage
    other = recipe(tmp_path / "c", dataset=text, **both, teacher_dtype="bfloat16", **GENERAL)
    done(other)
    assert len([p for p in (tmp_path / "shared").iterdir() if p.is_dir()]) == 2


def test_a_kill_in_the_middle_of_any_stage(tmp_path, capsys, quick):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    path, run = recipe(tmp_path, **saving), tmp_path / "run"
    done(path)
    expected = weights(run)
    for name in STAGES:
        folder, steps = stage(run, name), SETTINGS[name]["max_steps"]
        log = lines_of(folder)
        for later in STAGES[STAGES.index(name) + 1 :]:  # they were never begun
            shutil.rmtree(stage(run, later))
        break_off(folder, f"checkpoint-{steps}")
        with (folder / "metrics.jsonl").open("a") as handle:
            handle.write('{"step": 6, "los')
        unfinish(run)
        capsys.readouterr()
        assert main(["resume", str(run)]) == 0
        assert f"{name}: goes on from checkpoint-{steps - 1}" in capsys.readouterr().out
        assert same(weights(run), expected)
        assert steady(lines_of(folder)) == steady(log)
        assert read_json(folder / "run.json")["resumed"] == 1
    assert counted(run) == dict.fromkeys(STAGES, 1)


def steady(log):
    """What of a stage's log depends neither on the clock nor on how often it was begun."""
    clock = ("runtime", "second")
    lines = [line for line in log if "train_loss" not in line]
    return [{k: v for k, v in x.items() if not any(c in k for c in clock)} for x in lines]


def test_resume_knows_a_run_that_never_reached_its_end(tmp_path, capsys, quick, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    path, run = recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ernie_tiny, "export", killed)
        assert main(["ernie-tiny", path]) == 130
    assert not (run / "model.safetensors").exists()
    assert read_json(run / "run.json")["status"] == "running"
    assert main(["resume", str(stage(run, "tad"))]) == 0  # a stage's folder means its run
    assert read_json(run / "run.json")["status"] == "done"
    assert main(["resume", str(stage(run, "gd"))]) == 1
    assert "several runs may share" in capsys.readouterr().err


def test_report_is_made_again(tmp_path, capsys):
    done(recipe(tmp_path, stages=["tsd"]))
    page = tmp_path / "run" / "report.html"
    page.unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert page.is_file() and str(page) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ged", "tad", "tsd", "prediction", "finetune"])
def test_single_stages(tmp_path, quick, name):
    done(recipe(tmp_path, stages=[name], stage_settings={**SETTINGS, name: {"max_steps": 2}}))
    run = tmp_path / "run"
    assert list(stage_folders(run)) == [name]
    head = "sequence" if name in ("tsd", "prediction", "finetune") else "none"
    assert read_json(run / "run.json")["student"]["head"] == head
    assert (run / "teacher").exists() == (name != "finetune")
    assert any("classifier" in k for k in weights(run)) == (head == "sequence")


def test_a_teacher_that_is_given_is_scored_not_trained(tmp_path, capsys, quick):
    done(recipe(tmp_path / "a", stages=["tsd"]))
    made = tmp_path / "a" / "run" / "teacher"
    base = {"teacher_model_name_or_path": str(tmp_path / "a" / "bert")}
    given = {**base, "finetuned_teacher_name_or_path": str(made)}
    path, run = recipe(tmp_path / "b", stages=["tsd"], **given), tmp_path / "b" / "run"
    done(path)
    assert same(weights(run), weights(tmp_path / "a" / "run"))
    teacher = read_json(run / "run.json")["teacher"]
    assert teacher["source"] == str(made) and not teacher["finetuned_here"]
    assert teacher["score"] == read_json(made / "eval.json")["task"]["accuracy"]
    assert not list((run / "teacher").glob("*.safetensors"))
    capsys.readouterr()
    done(path)
    assert "teacher: reused" in capsys.readouterr().out

    model = AutoModelForSequenceClassification.from_pretrained(made)  # other weights, same name
    with torch.no_grad():
        model.classifier.weight.mul_(0.5)
    model.save_pretrained(made)
    before = weights(run)
    error = refused(path, capsys)
    assert "output_dir" in error and f"its {made} was another" in error
    assert same(weights(run), before)
    done(path, "--overwrite_run", "true")  # the way out it names
    assert not same(weights(run), before)


def test_a_teacher_below_the_floor_stops_before_any_stage(tmp_path, capsys, quick):
    bad = {**SETTINGS, "teacher": {"max_steps": 1, "learning_rate": 1e-6}}
    error = refused(recipe(tmp_path, stage_settings=bad), capsys)
    for words in ("teacher_floor: 0.619", "has accuracy 0.", "--teacher_floor 0"):
        assert words in error
    run = tmp_path / "run"
    assert not stage_folders(run) and not (run / "model.safetensors").exists()
    done(recipe(tmp_path / "b", stage_settings=bad, stages=["ged"]), "--teacher_floor", "0")


def test_the_shuffled_teacher_learned_other_labels(tmp_path, quick):
    stages = ["gd", {"stage": "ged", "teacher": "shuffled"}, "tsd"]
    done(recipe(tmp_path, arms={"control": {"stages": stages}, "full": {}}))
    run = tmp_path / "run"
    one, two = (read_json(run / name / "run.json") for name in ("shuffled", "teacher"))
    assert one["data"]["fingerprint"] == two["data"]["fingerprint"] + "-permuted"
    assert not same(weights(run / "shuffled"), weights(run / "teacher"))
    score = read_json(run / "shuffled" / "eval.json")["task"]["accuracy"]
    assert score < read_json(run / "teacher" / "eval.json")["task"]["accuracy"]
    assert counted(run) == {"gd": 1, "ged": 2, "tad": 1, "tsd": 2}
    roles = [read_json(p / "run.json")["teacher"]["source"] for p in stage_folders(run)["ged"]]
    assert set(roles) == {str(run / "shuffled"), str(run / "teacher")}


def counted(run):
    return {name: len(folders) for name, folders in stage_folders(run).items()}


def test_a_student_that_exists_and_one_of_copied_layers(tmp_path, quick):
    idle = {**SETTINGS, "gd": {"max_steps": 1, "learning_rate": 0.0}}
    shape = {"student_layers": None, "student_hidden_size": None, "stage_settings": idle}
    student = save_teacher(tmp_path / "student", seed=3, layers=2, width=8)
    loaded = {**shape, "student_name_or_path": student, **GENERAL}
    done(recipe(tmp_path / "a", **loaded))
    assert same(weights(tmp_path / "a" / "run"), weights(tmp_path / "student"))
    copied = {**shape, "student_init": "copy", "student_copy_layers": [2, 3], **GENERAL}
    done(recipe(tmp_path / "b", layer_map="last", **copied))
    own, teacher = weights(tmp_path / "b" / "run"), weights(tmp_path / "b" / "bert")
    assert len([k for k in own if k.endswith("attention.self.query.weight")]) == 2
    for name, value in own.items():
        for here, there in ((0, 1), (1, 2)):
            name = name.replace(f"layer.{here}.", f"LAYER.{there}.")
        assert torch.equal(value, teacher[name.replace("LAYER", "layer")]), name


def test_other_weights_of_the_student_are_another_run(tmp_path, capsys, quick):
    student = save_teacher(tmp_path / "student", seed=3, layers=2, width=8)
    shape = {"student_layers": None, "student_hidden_size": None, "student_name_or_path": student}
    path = recipe(tmp_path, **shape, **GENERAL)
    done(path)
    before = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "student")
    save_teacher(tmp_path / "student", seed=4, layers=2, width=8)
    assert f"its {student} was another" in refused(path, capsys)
    assert same(weights(tmp_path / "run"), before)


def test_changed_text_task_or_teacher_is_another_run(tmp_path, capsys, quick):
    path, run = recipe(tmp_path), tmp_path / "run"
    done(path)
    before = weights(run)

    def changed(name, text):
        kept = (tmp_path / name).read_bytes()
        write_rows(tmp_path / name, text)
        error = refused(path, capsys)
        (tmp_path / name).write_bytes(kept)
        return error

    other = [{"text": t} for t in sentences(40, seed=9)]
    assert "its general was another" in changed("general.jsonl", other)
    assert "its task was another" in changed("train.jsonl", reviews(48, seed=9))
    shutil.rmtree(tmp_path / "bert")
    save_teacher(tmp_path / "bert", seed=9)
    assert "its pretrained was another" in refused(path, capsys)
    assert "learning_rate: 0.01 -> 0.02" in refused(path, capsys, "--learning_rate", "0.02")
    assert same(weights(run), before)
    done(path, "--overwrite_run", "true", "--teacher_floor", "0")
    assert not same(weights(run), before)


@pytest.mark.parametrize("kind", ["regression", "token", "multi_label"])
def test_tasks_of_other_kinds(tmp_path, quick, kind):
    rows = {"regression": numbers, "token": tagged, "multi_label": many_labels}[kind]
    write_rows(tmp_path / "train.jsonl", rows())
    write_rows(tmp_path / "dev.jsonl", rows(15, seed=1))
    done(recipe(tmp_path, teacher_floor=-1.0, stages=["gd", "tad", "tsd"]))
    run = tmp_path / "run"
    scores = read_json(run / "eval.json")["task"]
    metric = {"regression": "pearson", "token": "token_accuracy", "multi_label": "micro_f1"}[kind]
    assert {"attn", "hidden", "soft", "hard", metric} <= scores.keys()
    auto = (
        AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    )
    model, tokenizer = auto.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    names = {"regression": ["LABEL_0"], "token": ["opinion", "other"]}
    assert list(model.config.id2label.values()) == names.get(kind, ["long", "neg", "pos"])
    kept = np.load(run / "predictions.npz")
    for place, row in enumerate(rows(15, seed=1)):
        split = kind == "token"
        inputs = tokenizer(row["text"], is_split_into_words=split, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
        known = kept["outputs"][place]
        np.testing.assert_allclose(known[: len(logits)] if split else known, logits, atol=1e-5)
    if kind == "multi_label":
        assert model.config.problem_type == "multi_label_classification"


def test_several_teachers_and_stages_with_settings_of_their_own(tmp_path, quick):
    done(recipe(tmp_path / "a", stages=["tsd"]))
    made = str(tmp_path / "a" / "run" / "teacher")
    done(recipe(tmp_path / "b", stages=["tsd"], seed=7))
    other = str(tmp_path / "b" / "run" / "teacher")
    teachers = [{"model_name_or_path": made}, {"model_name_or_path": other, "weight": 2.0}]
    stages = ["gd", {"stage": "tsd", "name": "last", "max_steps": 2, "attn": "none", "soft": "nkd"}]
    given = {"finetuned_teacher_name_or_path": made, "teachers": teachers, "stages": stages}
    path = recipe(tmp_path / "c", **given, teacher_model_name_or_path=str(tmp_path / "a" / "bert"))
    done(path)
    run = tmp_path / "c" / "run"
    facts = read_json(stage(run, "last") / "run.json")
    assert [entry["source"] for entry in facts["soft"]] == [made, other]
    line = lines_of(stage(run, "last"))[0]
    assert "attn" not in line and {"hidden", "soft", "hard"} <= line.keys()
    assert facts["settings"]["attn"] == "none" and facts["settings"]["soft"] == "nkd"


def test_general_text_may_be_a_stream(tmp_path, quick):
    path = recipe(tmp_path, streaming=True, max_eval_rows=4, **GENERAL)
    done(path)
    assert read_json(tmp_path / "run" / "run.json")["general"]["train_tokens"] is None
    held_out = read_json(tmp_path / "run" / "eval.json")["held_out"]
    assert held_out["attn"] > 0 and "task" not in read_json(tmp_path / "run" / "eval.json")


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_without_a_task_is_a_language_model(tmp_path, tokenizer, quick, tied):
    teacher = tiny_llama(0, vocab=len(tokenizer), width=16, tied=tied)
    teacher.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    shape = {"student_layers": 1, "teacher_model_name_or_path": str(tmp_path / "llama")}
    done(recipe(tmp_path, **shape, **GENERAL))
    run = tmp_path / "run"
    model, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    body = weights(stage(run, "gd"))
    assert torch.equal(model.lm_head.weight, body["embed_tokens.weight"])
    assert model.config.num_hidden_layers == 1 and model.config.hidden_size == 8
    assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in body.items())
    assert len(model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)[0]) <= 5


def test_a_decoder_learns_a_task(tmp_path, tokenizer, quick):
    tiny_llama(0, vocab=len(tokenizer), width=16).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    teacher = {"teacher_model_name_or_path": str(tmp_path / "llama"), "teacher_floor": 0.0}
    longer = {"task_max_length": 64, "max_length": 64, "student_layers": 1}
    done(recipe(tmp_path, **teacher, **longer))
    run = tmp_path / "run"
    kept = np.load(run / "predictions.npz")["outputs"]
    logits = logits_of(run, [row["text"] for row in reviews(21, seed=1)])
    np.testing.assert_allclose(kept, logits, rtol=0, atol=1e-5)
