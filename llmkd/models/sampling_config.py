"""Recipe keys that say how a policy answers prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmkd.data.config import from_json
from llmkd.errors import RecipeError
from llmkd.models.build import DTYPES

BACKENDS = ("transformers", "vllm")


@dataclass(kw_only=True)
class SamplingConfig:
    """Sampling of responses. Whatever the model's own generation config says is set aside."""

    num_responses: int = field(default=4, metadata={"help": "Responses to each prompt (K)."})
    max_new_tokens: int = field(
        default=256,
        metadata={"help": "Tokens of a response at most; one that is cut off is truncated."},
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Logits are divided by it. 1 samples from the policy itself, as the theory "
            "wants it; 0 is greedy and gives one response a prompt."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Sample from the likeliest tokens that hold this share of the probability; 1 "
            "is off. This, top_k, min_p and repetition_penalty bias estimates of KL."
        },
    )
    top_k: int = field(
        default=0, metadata={"help": "Sample from this many of the likeliest tokens; 0 is off."}
    )
    min_p: float = field(
        default=0.0,
        metadata={
            "help": "Leave out tokens below this share of the likeliest one's probability; 0 is "
            "off."
        },
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1 makes tokens that were there less likely."}
    )
    stop_strings: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Texts that end a response: a list, or JSON of one. The response's text ends "
            "before it; its token ids keep it, because the policy said it to stop."
        },
    )
    sampling_batch_size: int = field(
        default=8,
        metadata={"help": "Prompts sampled at once on one device (times num_responses)."},
    )
    sampling_backend: str = field(
        default="transformers",
        metadata={"help": "transformers, or vllm (pip install 'llmkd[vllm]'; needs a GPU)."},
    )
    sampling_dtype: str = field(
        default="auto",
        metadata={
            "help": f"Type of the weights while sampling: {', '.join(DTYPES)} (auto: as they are "
            "stored; float32 is often the faster one without a GPU)."
        },
    )
    vllm_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of vllm.LLM, as a mapping, e.g. "
            "'{\"gpu_memory_utilization\": 0.5}'."
        },
    )

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_warps()
        if self.sampling_backend not in BACKENDS:
            raise RecipeError.of(
                "sampling_backend", self.sampling_backend, f"use one of {', '.join(BACKENDS)}"
            )
        if self.sampling_dtype not in DTYPES:
            raise RecipeError.of("sampling_dtype", self.sampling_dtype, f"known: {DTYPES}")
        self.stop_strings = from_json("stop_strings", self.stop_strings)
        stops = self.stop_strings
        if not isinstance(stops, list | None):
            raise RecipeError.of("stop_strings", stops, "must be a list", '["###"], for example')
        for text in stops or []:
            if not isinstance(text, str) or not text:
                raise RecipeError.of("stop_strings", text, "each must be text, and not empty")
        self.vllm_options = from_json("vllm_options", self.vllm_options)
        if not isinstance(self.vllm_options, dict | None):
            raise RecipeError.of("vllm_options", self.vllm_options, "must be a mapping")

    def _check_counts(self) -> None:
        for key in ("num_responses", "max_new_tokens", "sampling_batch_size"):
            if getattr(self, key) < 1:
                raise RecipeError.of(key, getattr(self, key), "must be at least 1")
        if self.temperature == 0 and self.num_responses != 1:
            raise RecipeError.of(
                "temperature",
                self.temperature,
                f"greedy decoding says the same {self.num_responses} times",
                "a temperature above 0; 1 samples from the policy itself",
                "--num_responses 1, where one response is enough",
            )

    def _check_warps(self) -> None:
        bounds = {
            "temperature": (0 <= self.temperature < float("inf"), "at least 0, and finite"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]; 1 is off"),
            "top_k": (self.top_k >= 0, "at least 0; 0 is off"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1); 0 is off"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
        }
        for key, (fine, wanted) in bounds.items():
            if not fine:
                raise RecipeError.of(key, getattr(self, key), f"must be {wanted}")

    @property
    def stops(self) -> list[str]:
        """The stop strings; empty for none."""
        return list(self.stop_strings or [])

    def settings(self) -> dict[str, Any]:
        """All keys, for a record."""
        return {**asdict(self), "stop_strings": self.stops}
