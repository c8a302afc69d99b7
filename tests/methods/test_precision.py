"""`bf16: true` of a recipe on CPUs with and without kernels for it."""

import pytest
import torch
import yaml

from llmkd.methods import precision
from llmkd.methods.precision import settled, slow_bf16
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
def test_slow_is_x86_without_avx512(cpu, capability, machine, slow):
    cpu(capability, machine)
    assert slow_bf16() is slow
    assert settled({"bf16": True})["bf16"] is not slow


def test_a_gpu_keeps_bf16_and_use_cpu_does_not(cpu, monkeypatch):
    cpu("AVX2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert settled({"bf16": True})["bf16"] is True
    assert settled({"bf16": True, "use_cpu": True})["bf16"] is False
    assert settled({"bf16": False}) == {"bf16": False} and settled({}) == {}


def test_a_recipe_and_its_arms_train_in_float32_and_say_so_once(cpu, tmp_path, capsys):
    cpu("AVX2")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "bf16": True}))
    recipe = read_recipe([str(path)], TYPES)
    arm = recipe.with_changes({"bf16": True})
    for one in (recipe, arm):
        assert one.settings["bf16"] is False
        assert one.public()["bf16"] is True  # what is written down is the recipe as given
    assert recipe.build_one(SaltConfig, bf16=True).bf16 is False
    assert capsys.readouterr().err.count("training in float32") == 1


def test_a_fast_cpu_trains_as_told(cpu, tmp_path, capsys):
    cpu("AVX512")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "bf16": True}))
    assert read_recipe([str(path)], TYPES).build_one(SaltConfig).bf16 is True
    assert capsys.readouterr().err == ""
