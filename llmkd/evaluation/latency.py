"""How long a forward pass takes and how large a model is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import RecipeError

WARM_UPS = 3  # forwards before the clock counts, fewer where one takes longer than a second
LEAST_ROUNDS = 3  # a median of fewer says nothing, however slow the model


def measure_latency(
    model: nn.Module,
    vocab_size: int,
    *,
    length: int = 128,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    repeats: int = 30,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Median milliseconds a forward as `batch_<size>_ms`, with what was measured beside it.

    Rows of `length` random token ids (or of the model's longest position, if that is shorter; the
    `length` in the answer is the one measured) on the model's own device. Each batch size runs up
    to `repeats` rounds or about `seconds` seconds, at least three rounds. Evaluation mode, no
    gradients, `threads` CPU threads; modes and thread count are put back afterwards. Raises
    RecipeError for sizes below 1.
    """
    return _measure({"model": (model, vocab_size)}, length, batches, threads, repeats, seconds)[
        "model"
    ]


def compare_latency(
    student: nn.Module,
    teacher: nn.Module,
    vocab_size: int,
    *,
    teacher_vocab_size: int | None = None,
    length: int = 128,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    repeats: int = 30,
    seconds: float = 10.0,
) -> dict[str, dict[str, Any]]:
    """`measure_latency` of both models in turn, so that what else the machine does hits both.

    {"student": {"batch_1_ms": ...}, "teacher": {...}, "ratio": {"batch_1": ...}}; a ratio is the
    median over rounds of teacher time / student time: above 1 the student is faster. `seconds` is
    the budget of the pair. Ids are below `vocab_size` (the teacher's own where it has another).
    """
    models = {
        "student": (student, vocab_size),
        "teacher": (teacher, teacher_vocab_size or vocab_size),
    }
    return _measure(models, length, batches, threads, repeats, seconds)


def model_size(model: nn.Module) -> dict[str, float]:
    """`parameters`, and `mib`: MiB of its weights and saved buffers as safetensors holds them.

    Tied weights count once, as they are saved once.
    """
    saved = set(model.state_dict())
    buffers = [tensor for name, tensor in model.named_buffers() if name in saved]
    tensors = [*model.parameters(), *buffers]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "mib": sum(t.numel() * t.element_size() for t in tensors) / 2**20,
    }


def _measure(
    models: dict[str, tuple[nn.Module, int]],
    length: int,
    batches: Sequence[int],
    threads: int,
    repeats: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    sizes = {"length": length, "threads": threads, "repeats": repeats}
    for key, value in {**sizes, "batches": min(batches, default=0)}.items():
        if value < 1:
            raise RecipeError.of(key, value, "must be at least 1")
    length = min(length, *(_window(model) for model, _ in models.values()))
    answer: dict[str, dict[str, Any]] = {
        name: {"length": length, "threads": threads, "device": str(_device(model))}
        for name, (model, _) in models.items()
    }
    ratios = {}
    with _quiet([model for model, _ in models.values()], threads), torch.no_grad():
        for batch in batches:
            inputs = {n: _ids(m, v, batch, length) for n, (m, v) in models.items()}
            runs = [(name, models[name][0], inputs[name]) for name in models]
            times = _rounds(runs, repeats, seconds)
            for name, row in times.items():
                answer[name][f"batch_{batch}_ms"] = round(1e3 * statistics.median(row), 4)
            if len(models) == 2:
                student, teacher = times.values()
                pairs = zip(student, teacher, strict=True)
                ratios[f"batch_{batch}"] = round(statistics.median(t / s for s, t in pairs), 4)
    return {**answer, "ratio": ratios} if ratios else answer


def _rounds(
    runs: list[tuple[str, nn.Module, Tensor]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each round by name; every round runs all models, the order turning round."""
    for _, model, ids in runs:
        for _ in range(WARM_UPS):
            if _time(model, ids) > 1:
                break
    times: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    end = time.perf_counter() + seconds
    for done in range(max(repeats, LEAST_ROUNDS)):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, model, ids in runs if done % 2 == 0 else runs[::-1]:
            times[name].append(_time(model, ids))
    return times


def _time(model: nn.Module, ids: Tensor) -> float:
    _wait(ids.device)
    start = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    # A GPU answers before it has computed.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _ids(model: nn.Module, vocab_size: int, batch: int, length: int) -> Tensor:
    make = torch.Generator().manual_seed(0)  # its own, so that the run's randomness stays as it was
    return torch.randint(vocab_size, (batch, length), generator=make).to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _window(model: nn.Module) -> int:
    """Longest row the model has positions for. RoBERTa's kind spends the first ones on padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padding = module.padding_idx
            return module.num_embeddings - (0 if padding is None else padding + 1)
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) or 1 << 62


@contextmanager
def _quiet(models: list[nn.Module], threads: int) -> Iterator[None]:
    """Evaluation mode and `threads` CPU threads inside; every module's mode and the count after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for model in models:
            model.eval()
        yield
    finally:
        torch.set_num_threads(before)
        for module, training in modes:
            module.training = training
