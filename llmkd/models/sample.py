"""K responses of a policy to each prompt, by `transformers` or by vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from llmkd.data.tokenizer import load_tokenizer, tokenizer_digest
from llmkd.errors import DataError, MissingExtraError, RecipeError
from llmkd.files import digest
from llmkd.models.sample_ends import Ends, Sample, StopAt, plain_generation, stop_tokens
from llmkd.models.sampling_config import SamplingConfig
from llmkd.teachers.frozen import collect
from llmkd.teachers.loading import load_model, whole_weights

__all__ = ["Sample", "Sampler", "SamplingConfig", "check_room"]
MODEL = "model_name_or_path"


class Engine(Protocol):
    """What makes tokens: one loaded policy."""

    window: int | None
    vocabulary: int
    own_generation: dict[str, Any]
    ends: Ends

    def sample(self, prompts: Sequence[list[int]], count: int, seed: int) -> list[list[Sample]]:
        """`count` samples a prompt, in order."""
        ...


class Sampler:
    """Samples responses with the settings of a recipe; holds no weights before `load`.

    `tokenizer` None: the policy's own. MissingExtraError where vLLM is asked for and not there.
    """

    def __init__(self, config: SamplingConfig, tokenizer: Any = None) -> None:
        if config.sampling_backend == "vllm" and not _installed("vllm"):
            raise MissingExtraError.of(
                "sampling_backend",
                "vllm",
                "vLLM is not installed",
                "pip install 'llmkd[vllm]' (needs a GPU)",
                "--sampling_backend transformers",
            )
        self.config, self.tokenizer = config, tokenizer
        self._engine: Engine | None = None

    def load(
        self,
        source: str,
        *,
        adapter: str | None = None,
        revision: str | None = None,
        device: Any = "cpu",
        attn: str | None = None,
        quantization: Any = None,
    ) -> None:
        """Take the policy: a folder or Hub id, and a PEFT folder on it that stays unmerged. Whole
        on this rank's `device`, under ZeRO-3 too.

        RecipeError for a model that cannot be loaded or an adapter that is no folder of weights.
        """
        self.release()
        check_adapter(adapter)
        if self.tokenizer is None:
            with_words = adapter and (Path(adapter) / "tokenizer_config.json").is_file()
            self.tokenizer = load_tokenizer(
                adapter if with_words else source,  # type: ignore[arg-type]
                None if with_words else revision,
                key=MODEL,
                needs_end=False,
            )
        if self.config.sampling_backend == "vllm":
            from llmkd.models.sample_vllm import VllmEngine

            self._engine = VllmEngine(self.config, self.tokenizer, source, revision, adapter)
            return
        with whole_weights():
            model = load_model(
                source,
                revision=revision,
                dtype=self.config.sampling_dtype,
                attn=attn,
                key=MODEL,
                quantization=quantization,
            )
            self._engine = TransformersEngine(self.config, self.tokenizer, model, adapter, device)

    def sample(
        self, prompt_ids: Sequence[list[int]], seed: int, count: int | None = None
    ) -> list[list[Sample]]:
        """`count` (num_responses) samples of each prompt, in order.

        The same prompts and seed give the same samples, whatever was sampled before; the caller's
        random state is left alone. RecipeError before anything is sampled where a prompt and
        max_new_tokens do not fit the window, DataError for an empty prompt or ids the policy does
        not have.
        """
        if self._engine is None:
            raise ValueError("load a policy first")
        count = self.config.num_responses if count is None else count
        if self.config.temperature == 0 and count != 1:
            raise RecipeError.of(
                "temperature", 0.0, f"greedy decoding says the same {count} times", "sample one"
            )
        if not prompt_ids:
            return []
        _check_ids(prompt_ids, self._engine.vocabulary)
        longest = max(map(len, prompt_ids))
        check_room(longest, self._engine.window, self.config.max_new_tokens)
        return self._engine.sample(prompt_ids, count, seed)

    def release(self) -> None:
        """Give the memory back."""
        self._engine = None
        collect()

    def settings(self) -> dict[str, Any]:
        """All that decides the samples of a policy beside its weights: sampling settings, tokenizer
        and chat template (hashes). The same before and after `load`.
        """
        found = self.config.settings()
        if self.tokenizer is None:
            return found
        template = getattr(self.tokenizer, "chat_template", None)
        return {
            **found,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "chat_template": None if template is None else digest(template),
        }

    def facts(self) -> dict[str, Any]:
        """What is known once a policy is loaded: the ids that end a response, and what the policy's
        own generation config would have said (set aside, but for its END tokens).
        """
        if self._engine is None:
            raise ValueError("load a policy first")
        return {
            "stop_tokens": sorted(self._engine.ends.tokens),
            "generation_config_set_aside": self._engine.own_generation,
        }


class TransformersEngine:
    """`generate` in batches padded on the left, without gradients."""

    def __init__(
        self, config: SamplingConfig, tokenizer: Any, model: Any, adapter: str | None, device: Any
    ) -> None:
        self.config, self.device = config, torch.device(device)
        own = model.generation_config
        self.ends = Ends(tokenizer, stop_tokens(tokenizer, own), config.stops)
        self.own_generation = plain_generation(own)
        text = model.config.get_text_config()
        self.window = getattr(text, "max_position_embeddings", None)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.pad = _pad(tokenizer, self.ends)
        if not getattr(model, "is_quantized", False):
            model.to(self.device)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter, is_trainable=False)
        model.requires_grad_(False)
        self.model = model.eval()

    def sample(self, prompts: Sequence[list[int]], count: int, seed: int) -> list[list[Sample]]:
        """`count` samples a prompt. Prompts of like length are sampled together."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        size, found = self.config.sampling_batch_size, {}
        with seeded(seed, self.device):
            for start in range(0, len(order), size):
                places = order[start : start + size]
                answers = self._batch([prompts[place] for place in places], count)
                found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, prompts: list[list[int]], count: int) -> list[list[Sample]]:
        length = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), length), self.pad, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask_BT[row, length - len(prompt) :] = 1
        generation = self._generation(count)
        # `generate` fills every gap of the config it is given from the model's own
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        self.model.generation_config = base.generation_config = generation
        criteria = [StopAt(self.ends, length)] if self.ends.strings else []
        out_NT = self.model.generate(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=False,  # every rank has the whole model, and prompts of its own
        )
        rows = out_NT[:, length:].tolist()
        samples = [self.ends.cut(row) for row in rows]
        return [samples[start : start + count] for start in range(0, len(samples), count)]

    def _generation(self, count: int) -> GenerationConfig:
        """A generation config in which nothing is left to the model's own."""
        config = self.config
        found: dict[str, Any] = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            found |= {
                "temperature": config.temperature,
                "top_p": config.top_p,
                "top_k": config.top_k,
                "min_p": config.min_p or None,
            }
        return GenerationConfig(
            **found,
            max_new_tokens=config.max_new_tokens,
            repetition_penalty=config.repetition_penalty,
            num_return_sequences=count,
            eos_token_id=sorted(self.ends.tokens) or None,
            pad_token_id=self.pad,
            use_cache=True,
        )


def check_room(longest: int, window: int | None, max_new_tokens: int) -> None:
    """RecipeError where a prompt of `longest` tokens and a response do not fit `window`."""
    if window is not None and longest + max_new_tokens > window:
        raise RecipeError.of(
            "max_new_tokens",
            max_new_tokens,
            f"with a prompt of {longest} tokens that is more than the policy's window of {window}",
            *([f"--max_new_tokens {window - longest}"] if longest < window else []),
            f"--max_prompt_length {max(window - max_new_tokens, 1)} --long_prompts drop",
        )


def check_adapter(adapter: str | None) -> None:
    """RecipeError where an adapter is no folder with a config and safetensors."""
    if adapter is None:
        return
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / name).is_file():
            raise RecipeError.of("adapter", adapter, f"holds no {name}, so it is no PEFT adapter")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of `seed` on the CPU and on `device`, and the caller's again afterwards."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
        return
    index = device.index
    if index is None:
        index = getattr(torch, device.type).current_device() if device.type != "mps" else 0
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _check_ids(prompts: Sequence[list[int]], vocabulary: int) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise DataError.of("prompt_ids", row, "the prompt has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise DataError.of(
                "prompt_ids",
                max(prompt),
                f"prompt {row} holds an id that the policy does not have ({vocabulary} entries)",
                "tokenize with the policy's own tokenizer",
            )


def _pad(tokenizer: Any, ends: Ends) -> int:
    """An id for places that are masked or behind the end; any will do."""
    found = getattr(tokenizer, "pad_token_id", None)
    return int(found) if found is not None else min(ends.tokens, default=0)


def _installed(name: str) -> bool:
    return find_spec(name) is not None
