"""bf16 asked of CPUs with and without kernels for it: a warning with a way out, nothing changed."""

import pytest
import torch
import yaml

from llmkd.methods import precision
from llmkd.methods.precision import slow_bf16, warn_of_slow_bf16
from llmkd.methods.recipe import read_recipe
from llmkd.methods.salt_config import TYPES
from llmkd.trainers import SaltConfig


@pytest.fixture
def cpu(monkeypatch):
    def be(capability, machine="x86_64"):
        precision._say_once.cache_clear()
        monkeypatch.setattr(precision, "_capability", lambda: capability)
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    yield be
    precision._say_once.cache_clear()


@pytest.mark.parametrize(
    ("capability", "machine", "slow"),
    [
        ("AVX2", "x86_64", True),
        ("DEFAULT", "AMD64", True),
        ("AVX512", "x86_64", False),
        ("DEFAULT", "arm64", False),
        ("SVE256", "aarch64", False),
    ],
)
def test_slow_is_x86_without_avx512(cpu, capsys, capability, machine, slow):
    cpu(capability, machine)
    assert slow_bf16() is slow
    warn_of_slow_bf16({"bf16": True})
    assert ("--bf16 false" in capsys.readouterr().err) is slow


def test_a_gpu_is_fast_unless_it_is_not_used(cpu, monkeypatch):
    cpu("AVX2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not slow_bf16() and slow_bf16(use_cpu=True)


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        ({"bf16": True, "teacher_dtype": "bfloat16"}, "--bf16 false --teacher_dtype float32"),
        ({"bf16": False, "dtype": "bfloat16"}, "--dtype float32"),
        ({"bf16": False, "dtype": "float32"}, ""),
        ({}, ""),
    ],
)
def test_what_is_slow_is_named(cpu, capsys, settings, ways):
    cpu("AVX2")
    for _ in range(2):
        warn_of_slow_bf16(settings)
    said = capsys.readouterr().err
    assert said.count("AVX-512") == bool(ways) and said.endswith(f"  - {ways}\n" * bool(ways))


def test_only_the_first_rank_speaks(cpu, capsys, monkeypatch):
    cpu("AVX2")
    monkeypatch.setenv("RANK", "1")
    warn_of_slow_bf16({"bf16": True})
    assert capsys.readouterr().err == ""


def test_a_recipe_says_it_and_stays_as_it_is(cpu, tmp_path, capsys):
    cpu("AVX2")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "bf16": True}))
    recipe = read_recipe([str(path)], TYPES)
    assert recipe.settings["bf16"] is True and recipe.build_one(SaltConfig).bf16 is True
    assert capsys.readouterr().err.count("bf16: ") == 1
