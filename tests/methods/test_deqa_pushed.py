"""What one does with a finished DeQA-Score run: push it, report it again, ask lm_eval about it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deqa_kit import done, recipe, refused, stamps
from hub_run import TOKEN, load_code
from hub_server import HubServer
from huggingface_hub import constants

from llmkd.cli import main
from llmkd.files import read_json, write_json
from llmkd.models.scorer import Scorer

REPO = "me/rates"
TEMPLATE = "Text: {text}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of one scorer in `one/run` and of two arms in `arms/run`."""
    folder = tmp_path_factory.mktemp("pushed")
    keys = {"num_train_epochs": 1, "save_strategy": "no"}
    done(recipe(folder / "one", text_template=TEMPLATE, **keys))
    done(recipe(folder / "arms", arms={"bin": {"label": "onehot_bin"}, "tilt": {}}, **keys))
    (folder / "held_out.jsonl").write_text('{"text": "a cat sat on a mat"}\n')
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, and a client that knows its token."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no" / "token"))
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(constants, name, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer({TOKEN: "write"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def by_http(code: str, url: str, folder: Path) -> str:
    """What the lines of a card print in a fresh process whose Hub is `url`."""
    own = {"HF_ENDPOINT": url, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    fixed = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **own, **fixed},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_finished_run_is_pushed_by_its_recipe_and_scores_by_the_lines_of_its_card(
    made, hub, tmp_path, capsys
):
    run = made / "one" / "run"
    before = stamps(run)
    capsys.readouterr()
    done(str(made / "one" / "recipe.yaml"), "--push_to_hub", "true", "--hub_model_id", REPO)
    said = capsys.readouterr().out
    assert "reused" in said and f"pushed run to {hub.url}/{REPO}" in said
    after = stamps(run)
    assert {path for path in after if after[path] != before.get(path)} == {run / "README.md"}
    files = hub.files(REPO)
    assert {"model.safetensors", "levels.json", "tokenizer.json", "README.md", "eval.json"} <= {
        *files
    }
    # what people said of single rows stays at home, and so does the adapter
    assert not {name for name in files if name.startswith(("predictions", "checkpoint"))}
    code = load_code(files["README.md"].decode())
    assert f'Scorer("{REPO}")' in code
    printed = by_http(code, hub.url, tmp_path / "home").strip().splitlines()[-1]
    expected = Scorer(str(run), device="cpu")("Put a text here")
    found = json.loads(printed.replace("'", '"'))
    assert found["probs"] == pytest.approx(expected["probs"], abs=1e-6)
    assert found["score"] == pytest.approx(expected["score"], abs=1e-6)


def test_a_run_of_arms_names_them_and_each_is_pushed_alone(made, hub, capsys):
    run = made / "arms" / "run"
    error = refused(str(run), capsys, REPO, verb="push")
    assert f"push one of its models: {run / 'bin'}" in error and str(run / "tilt") in error
    assert REPO not in hub.repos and not (run / "README.md").exists()
    assert main(["push", str(run / "tilt"), REPO]) == 0
    assert capsys.readouterr().out.startswith(f"pushed to {hub.url}/{REPO}/commit/")
    card = hub.files(REPO)["README.md"].decode()
    mae = {
        n: read_json(run / n / "eval.json")["held_out"]["measures"]["mae"] for n in ("bin", "tilt")
    }
    assert re.search(rf"\*\*tilt\*\* \(this model\) \|.*{mae['tilt']['value']:.3f}", card)
    assert re.search(rf"\n\| bin \|.*{mae['bin']['value']:.3f}", card)
    assert "| level targets | gauss_tilt |" in card and "onehot_bin" not in card


def test_the_report_shows_the_table_again(made, capsys):
    for run, names in ((made / "one/run", ["scorer"]), (made / "arms/run", ["bin", "tilt"])):
        (run / "report.html").unlink()
        capsys.readouterr()
        assert main(["report", str(run)]) == 0
        said = capsys.readouterr().out
        assert all(re.search(rf"(?m)^ *{name} +[-\d]", said) for name in names), said
        assert said.endswith(f"{run / 'report.html'}\n") and (run / "report.html").is_file()


def test_the_report_of_a_run_that_began_or_broke(tmp_path, capsys):
    run = tmp_path / "run"
    write_json(run / "run.json", {"kind": "deqa", "arms": ["a"], "status": "running"})
    assert main(["report", str(run)]) == 0
    assert "no scorer has been measured yet" in capsys.readouterr().out
    (run / "a").mkdir()
    (run / "a" / "eval.json").write_text('{"held_out": ')
    error = refused(str(run), capsys, verb="report")
    assert "is not JSON" in error and "held_out" in error
    (run / "run.json").write_text("{")
    assert "is not JSON" in refused(str(run), capsys, verb="report")
    assert "holds no run.json" in refused(str(tmp_path), capsys, verb="report")


def test_eval_asks_lm_eval_and_its_answer_comes_into_report_and_card(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    flags = ["--tasks", "heldout_bpb", "--batch_size", "1", "--device", "cpu"]
    one, arms = made / "one/run", made / "arms/run"
    assert main(["eval", str(one), "--baseline", str(made / "one/base"), *flags]) == 0
    assert main(["eval", str(arms), *flags]) == 0
    capsys.readouterr()

    def bits(folder):
        found = read_json(folder / "eval.json")
        assert found["held_out"]["rows"] == 6  # what was there stays
        return found["lm_eval"]["tasks"]["heldout_bpb"]["metrics"]["bits_per_byte"]["value"]

    both = read_json(one / "eval.json")["lm_eval"]["side_by_side"]["tasks"]["heldout_bpb"]
    page = (one / "report.html").read_text()
    rows = re.sub(r"<[^>]+>", " ", page[page.index("Evaluation harness") :]).split()
    assert f"{both['bits_per_byte']['values']['baseline']:.4f}" in rows
    assert f"{bits(one):.4f}" in rows
    page = (arms / "report.html").read_text()
    rows = re.sub(r"<[^>]+>", " ", page[page.index("Evaluation harness") :]).split()
    place = rows.index("bits_per_byte")
    assert rows[place + 3 : place + 5] == [f"{bits(arms / n):.4f}" for n in ("bin", "tilt")]
    done(str(made / "arms" / "recipe.yaml"))  # a second call measures nothing again
    assert (
        "lm_eval" in read_json(arms / "eval.json")
        and "Evaluation harness" in (arms / "report.html").read_text()
    )


def test_eval_of_an_image_model_names_the_verbs_that_measure_it(tmp_path, capsys):
    write_json(tmp_path / "run.json", {"kind": "deqa", "student": {"images": True}})
    error = refused(str(tmp_path), capsys, "--tasks", "piqa", verb="eval")
    assert "image-text model" in error and f"llmkd report {tmp_path}" in error
