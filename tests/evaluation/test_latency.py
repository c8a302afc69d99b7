"""Latency on width-8 models: what is run, in which order, and that nothing is left changed."""

import pytest
import torch
from safetensors.torch import save_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from llmkd.errors import RecipeError
from llmkd.evaluation import latency
from llmkd.evaluation.latency import compare_latency, measure_latency, model_size

SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES))


class Sleeper(torch.nn.Module):
    """Takes as many ticks of a false clock as it is told, and writes down how it was called."""

    def __init__(self, name, ticks, clock, calls):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.name, self.ticks, self.clock, self.calls = name, ticks, clock, calls

    def forward(self, input_ids, attention_mask):
        assert attention_mask.shape == input_ids.shape and attention_mask.all()
        quiet = not self.training and not torch.is_grad_enabled()
        self.calls.append((self.name, tuple(input_ids.shape), quiet, torch.get_num_threads()))
        # 1 ms a tick, but every third call meets a busy machine
        self.clock[0] += 1e-3 * self.ticks * (100 if len(self.calls) % 3 == 0 else 1)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    return now


def test_the_median_of_a_forward_in_milliseconds(clock):
    calls = []
    model = Sleeper("m", 2, clock, calls).train()
    found = measure_latency(model, 50, length=16, batches=(1, 4), threads=1, repeats=9)
    assert found["batch_1_ms"] == pytest.approx(2.0) and found["batch_4_ms"] == pytest.approx(2.0)
    assert (found["length"], found["threads"], found["device"]) == (16, 1, "cpu")
    assert [shape for _, shape, _, _ in calls] == [(1, 16)] * 12 + [(4, 16)] * 12  # 3 warm up
    assert all(quiet for _, _, quiet, _ in calls)


def test_student_and_teacher_take_turns(clock):
    calls = []
    models = [Sleeper("s", 2, clock, calls), Sleeper("t", 10, clock, calls)]
    found = compare_latency(*models, 50, length=8, batches=(1,), repeats=4)
    assert "".join(name for name, *_ in calls) == "sss" + "ttt" + "st" + "ts" + "st" + "ts"
    assert set(found) == {"student", "teacher", "ratio"}
    assert found["ratio"].keys() == {"batch_1"} and "batch_1_ms" in found["teacher"]


def test_the_ratio_says_how_much_faster_the_student_is(clock):
    calls = []
    models = [Sleeper("s", 2, clock, calls), Sleeper("t", 10, clock, calls)]
    found = compare_latency(*models, 50, length=8, batches=(1, 2), repeats=31)
    assert found["student"]["batch_1_ms"] == pytest.approx(2.0)
    assert found["teacher"]["batch_2_ms"] == pytest.approx(10.0)
    assert found["ratio"] == {"batch_1": pytest.approx(5.0), "batch_2": pytest.approx(5.0)}


def test_a_slow_model_stops_at_its_budget_after_three_rounds(clock):
    calls = []
    slow = Sleeper("m", 4000, clock, calls)
    measure_latency(slow, 50, batches=(1,), repeats=50, seconds=10.0)
    assert len(calls) == 1 + 3  # one forward of 4 s is warm-up enough


def test_modes_and_threads_are_put_back(monkeypatch):
    model = bert().train()
    model.bert.embeddings.dropout.eval()
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    state = torch.random.get_rng_state()
    found = measure_latency(model, 50, length=8, threads=2, batches=(1,), repeats=3)
    assert seen == [2, 7] and found["batch_1_ms"] > 0
    assert model.training and not model.bert.embeddings.dropout.training
    assert torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_latency(model, 50, length=8, batches=(1,))
    assert seen == [2, 7, 1, 7] and model.training


def test_rows_are_no_longer_than_the_models_positions():
    assert measure_latency(bert(), 50, batches=(1,), repeats=3)["length"] == 20
    roberta = RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=1))
    pair = compare_latency(bert(), roberta, 50, batches=(2,), repeats=3)
    assert pair["student"]["length"] == pair["teacher"]["length"] == 18  # two are padding's


@pytest.mark.parametrize("settings", [{"length": 0}, {"batches": (0,)}, {"batches": ()}])
def test_sizes_below_one_are_refused(settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        measure_latency(bert(), 50, **settings)


def test_the_size_is_that_of_the_file(tmp_path):
    model = bert()
    save_model(model, str(tmp_path / "model.safetensors"))
    size, file = model_size(model), (tmp_path / "model.safetensors").stat().st_size
    assert size["parameters"] == model.num_parameters()
    assert 0 <= file - size["mib"] * 2**20 < 4096  # the rest is the file's table of contents
    assert model_size(model.half())["mib"] == pytest.approx(size["mib"] / 2)
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert model_size(tied) == {"parameters": 16, "mib": 64 / 2**20}
