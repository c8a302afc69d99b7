"""Trainers: one optimizer step with soft labels, on `transformers.Trainer`."""

from llmkd.trainers.config import SaltConfig
from llmkd.trainers.irepo import IrepoTrainer
from llmkd.trainers.irepo_config import IrepoConfig
from llmkd.trainers.latent import LatentDistillTrainer
from llmkd.trainers.latent_config import LatentDistillConfig
from llmkd.trainers.salt import SaltTrainer
from llmkd.trainers.score import ScoreTrainer
from llmkd.trainers.score_config import ScoreConfig

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
