"""Two ranks align as one does: DDP, ZeRO-2 and ZeRO-3 on gloo share sampling, annotating, steps."""

import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from test_ranks import launch

from llmkd.files import read_json

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from irepo_kit import done, metrics_of, pairs_of, recipe, rows_of, stamps, weights

pytestmark = pytest.mark.slow
# Plain SGD: the difference of the weights is the difference of the updates times the rate.
KEYS = {
    "iterations": 1,
    "optim": "sgd",
    "learning_rate": 0.01,
    "max_grad_norm": 0.0,
    "sampling_batch_size": 2,  # four parts of responses for two ranks
}
HALF = ["--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        done(recipe(folder, **KEYS))
    assert gap(folder / "run", folder / "policy") > 1e-3  # a gap of 1e-6 is none
    return folder


def start(config, path, *flags):
    found = launch(f"cpu/{config}", path, *HALF, *flags, script="run_irepo.py")
    assert found.returncode == 0, found.stdout[-1000:] + found.stderr[-4000:]
    return found.stdout


def gap(one: Path, other: Path) -> float:
    here, there = weights(one), weights(other)
    for found in (here, there):  # upstream writes tied weights twice under ZeRO-2
        if (head := found.pop("lm_head.weight", None)) is not None:
            assert torch.equal(head, found["model.embed_tokens.weight"])
    assert here.keys() == there.keys()
    return max((value - there[name]).abs().max().item() for name, value in here.items())


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("part-*.jsonl"))}


def with_policy_of(one_rank: Path, folder: Path, **changes) -> str:
    shutil.copytree(one_rank / "policy", folder / "policy")
    return recipe(folder, **KEYS, **changes)


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_two_ranks_are_one(tmp_path, one_rank, config):
    said = start(config, with_policy_of(one_rank, tmp_path))
    assert said.count("report: ") == 1  # one rank speaks
    run, whole = tmp_path / "run", one_rank / "run"
    for place in ("iteration-0/held_out", "iteration-1/responses", "iteration-1/annotations"):
        assert texts(run / place) == texts(whole / place) != {}
    assert len(texts(run / "iteration-1" / "responses")) == 4
    assert pairs_of(run, 1).to_list() == pairs_of(whole, 1).to_list()
    assert gap(run, whole) < 1e-6  # two steps
    own, theirs = (metrics_of(folder, 1) for folder in (run, whole))
    assert own["train"] == pytest.approx(theirs["train"], abs=1e-5)
    for name in ("prompts", "responses", "pairs", "dropped", "tokens"):
        assert own[name] == theirs[name], name
    assert own["held_out"]["kl_initial"]["mean"] == pytest.approx(
        theirs["held_out"]["kl_initial"]["mean"], abs=1e-4
    )
    assert metrics_of(run, 0)["held_out"]["kl_initial"]["mean"] == 0
    assert read_json(run / "run.json")["status"] == "done"
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_two_iterations_on_two_ranks_with_sharded_weights(tmp_path, one_rank):
    """The second trainer, its references and the reuse of the first work under ZeRO-3 too."""
    path = with_policy_of(one_rank, tmp_path)
    start("zero3", path)
    run = tmp_path / "run"
    kept = stamps(run / "iteration-1" / "model")
    said = start("zero3", path, "--iterations", "2")
    assert "iteration 1: reused" in said and stamps(run / "iteration-1" / "model") == kept
    assert gap(run, run / "iteration-2" / "model") == 0 < gap(run, run / "iteration-1" / "model")
    rows = rows_of(run / "iteration-2" / "held_out")
    assert len(rows) == 6 and metrics_of(run, 2)["held_out"]["kl_previous"]["mean"] != 0


def test_adapters_on_two_ranks(tmp_path, one_rank):
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    path = with_policy_of(one_rank, tmp_path, **adapter)
    start("ddp", path, "--iterations", "2", "--learning_rate", "1.0")
    run = tmp_path / "run"
    assert gap(run, run / "iteration-2" / "model") == 0 < gap(run, run / "iteration-1" / "model")
    assert not list(run.rglob("model.safetensors"))


def test_a_mistake_is_said_once(tmp_path, one_rank):
    path = with_policy_of(one_rank, tmp_path, max_prompt_length=2)
    found = launch("cpu/ddp", path, *HALF, script="run_irepo.py")
    assert found.returncode != 0
    assert found.stderr.count("llmkd irepo: max_prompt_length: 2") == 1
    assert not (tmp_path / "run").exists()
