"""vLLM behind the sampler's call: an optional extra, for GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from llmkd.errors import RecipeError
from llmkd.files import read_json
from llmkd.models.sample_ends import Ends, Sample, plain_generation, stop_tokens
from llmkd.models.sampling_config import SamplingConfig
from llmkd.teachers.loading import load_config

SEEDS = 1 << 31


class VllmEngine:
    """One vLLM engine on this rank's GPU, with the adapter as a LoRA request (unmerged)."""

    def __init__(
        self,
        config: SamplingConfig,
        tokenizer: Any,
        source: str,
        revision: str | None,
        adapter: str | None,
    ) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        self.config = config
        text = load_config(source, revision, "model_name_or_path").get_text_config()
        self.window = getattr(text, "max_position_embeddings", None)
        self.vocabulary = text.vocab_size
        own = _own_generation(source, revision)
        self.ends = Ends(tokenizer, stop_tokens(tokenizer, own, text), config.stops)
        self.own_generation = plain_generation(own)
        options: dict[str, Any] = {
            "model": source,
            "revision": revision,
            "dtype": config.sampling_dtype,
            "trust_remote_code": False,
            "generation_config": "vllm",  # not the model's own: what is recorded is what is done
            "load_format": "safetensors",
        }
        self.lora: Any = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

            options |= {"enable_lora": True, "max_lora_rank": _rank_of(adapter)}
            self.lora = LoRARequest("policy", 1, str(Path(adapter).absolute()))
        asked = config.vllm_options
        self.llm = LLM(**{**options, **(asked if isinstance(asked, dict) else {})})

    def sample(self, prompts: Sequence[list[int]], count: int, seed: int) -> list[list[Sample]]:
        """`count` samples a prompt, each prompt from a seed of its own."""
        answers = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._params(count, (seed + place * count) % SEEDS) for place in range(len(prompts))],
            lora_request=self.lora,
            use_tqdm=False,
        )
        return [
            [self._one(one) for one in sorted(answer.outputs, key=lambda one: one.index)]
            for answer in answers
        ]

    def _params(self, count: int, seed: int) -> Any:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        config = self.config
        return SamplingParams(
            n=count,
            seed=seed,  # the n-th of a prompt gets seed + n
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k or -1,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            max_tokens=config.max_new_tokens,
            stop=config.stops or None,
            stop_token_ids=sorted(self.ends.tokens),
            include_stop_str_in_output=True,
            skip_special_tokens=True,
        )

    def _one(self, answer: Any) -> Sample:
        ids, stopped = list(answer.token_ids), answer.finish_reason == "stop"
        by_token = isinstance(answer.stop_reason, int) or answer.stop_reason is None
        if stopped and by_token and not self.ends.tokens.intersection(ids):
            # some versions keep the END token to themselves; log-probabilities need it
            end = answer.stop_reason
            ids.append(end if isinstance(end, int) else self._end())
        return self.ends.cut(ids, ended=stopped)

    def _end(self) -> int:
        end = getattr(self.ends.tokenizer, "eos_token_id", None)
        return int(end) if end is not None else min(self.ends.tokens)


def _own_generation(source: str, revision: str | None) -> Any:
    try:
        return GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:  # a model need not have one
        return None


def _rank_of(adapter: str) -> int:
    """The adapter's highest rank, up to a size vLLM knows."""
    found = read_json(Path(adapter) / "adapter_config.json")
    if found.get("peft_type") != "LORA":
        raise RecipeError.of(
            "sampling_backend", "vllm", f"takes LoRA adapters only, not {found.get('peft_type')}"
        )
    rank = max([found["r"], *(found.get("rank_pattern") or {}).values()])
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)
    return next((size for size in sizes if size >= rank), rank)
