"""llmkd: distillation and alignment on soft labels, with Hugging Face trainers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkd.trainers import IrepoConfig as IrepoConfig
    from llmkd.trainers import IrepoTrainer as IrepoTrainer
    from llmkd.trainers import LatentDistillConfig as LatentDistillConfig
    from llmkd.trainers import LatentDistillTrainer as LatentDistillTrainer
    from llmkd.trainers import SaltConfig as SaltConfig
    from llmkd.trainers import SaltTrainer as SaltTrainer
    from llmkd.trainers import ScoreConfig as ScoreConfig
    from llmkd.trainers import ScoreTrainer as ScoreTrainer

__version__ = "0.1.0"
__all__ = [
    "IrepoConfig",
    "IrepoTrainer",
    "LatentDistillConfig",
    "LatentDistillTrainer",
    "SaltConfig",
    "SaltTrainer",
    "ScoreConfig",
    "ScoreTrainer",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `llmkd --help` does not wait for torch.
    if name in __all__:
        return getattr(import_module("llmkd.trainers"), name)
    raise AttributeError(f"module 'llmkd' has no attribute {name!r}")
