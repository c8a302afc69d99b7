"""Trainers: one optimizer step with soft labels, on `transformers.Trainer`."""

from llmkd.trainers.config import SaltConfig
from llmkd.trainers.salt import SaltTrainer

__all__ = ["SaltConfig", "SaltTrainer"]
