"""What a judge is asked, word for word; the same for a local model and for one behind a server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from llmkd.annotators.base import Prompt
from llmkd.errors import RecipeError

LETTERS = ("A", "B")
LEVELS: dict[str, float] = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}

PAIR_TEMPLATE = """\
Below are an instruction and two responses to it, A and B. Decide which response is better: it \
does what the instruction asks, is correct and is clear. The order of the responses and their \
length say nothing about their quality.

[Instruction]
{prompt}

[Response A]
{response_a}

[Response B]
{response_b}

Which response is better? Answer with a single letter, A or B, and nothing else."""

LEVEL_TEMPLATE = """\
Below are an instruction and a response to it. Rate how well the response does what the \
instruction asks, how correct and how clear it is.

[Instruction]
{prompt}

[Response]
{response}

How good is the response? Answer with a single word, one of {levels}, and nothing else."""

NAMES = {"pair": ("prompt", "response_a", "response_b"), "level": ("prompt", "response")}
_HOLE = re.compile(r"\{(prompt|response_a|response_b|response|levels)\}")


def check_template(key: str, template: str, mode: str) -> None:
    """RecipeError where a template has no place for something a judge of this mode must see."""
    found = set(_HOLE.findall(template))
    for name in NAMES[mode]:
        if name not in found:
            shown = template if len(template) < 80 else template[:77] + "..."
            wanted = ", ".join(f"{{{name}}}" for name in NAMES[mode])
            raise RecipeError.of(
                key, shown, f"has no {{{name}}}", f"a template of mode {mode} needs {wanted}"
            )


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its {names} replaced, once: braces in a response stay what they are."""
    return _HOLE.sub(lambda hole: values.get(hole[1], hole[0]), template)


def pair_question(template: str, prompt: Prompt, response_a: str, response_b: str) -> str:
    """The text that asks which of two responses is better."""
    values = {"prompt": prompt_text(prompt), "response_a": response_a, "response_b": response_b}
    return fill(template, values)


def level_question(
    template: str, prompt: Prompt, response: str, levels: Sequence[str] = tuple(LEVELS)
) -> str:
    """The text that asks how good a response is, in one of the words `levels`."""
    known = ", ".join(levels)
    return fill(template, {"prompt": prompt_text(prompt), "response": response, "levels": known})


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a judge reads it: plain text, a lone user message as its content, and longer
    chats with the speaker before each message.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)


def check_levels(key: str, levels: Mapping[str, float]) -> dict[str, float]:
    """Words of a scale with their values; RecipeError where they are no scale."""
    if not isinstance(levels, Mapping) or len(levels) < 2:
        raise RecipeError.of(key, levels, "must map at least two words to numbers", f"{LEVELS}")
    found: dict[str, float] = {}
    for word, value in levels.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not np.isfinite(value) or not str(word).strip():
            raise RecipeError.of(f"{key}.{word}", value, "must be a word with a finite number")
        found[str(word).strip().lower()] = float(value)
    if len(set(found.values())) < len(levels):
        raise RecipeError.of(key, dict(levels), "needs different words with different numbers")
    return found


def level_score(log_probs_L: np.ndarray, values_L: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the score under softmax(`log_probs_L`), closed over the L levels.

    A level stands for everything that rounds to it: the variance holds that of a uniform error one
    (mean) step of the scale wide, step²/12, so that it is never 0 and no logit is infinite.
    """
    log_probs_L = np.asarray(log_probs_L, dtype=np.float64)
    values_L = np.asarray(values_L, dtype=np.float64)
    p_L = np.exp(log_probs_L - log_probs_L.max())
    p_L /= p_L.sum()
    mean = float(p_L @ values_L)
    step = float(np.ptp(values_L)) / (len(values_L) - 1)
    return mean, float(p_L @ (values_L - mean) ** 2) + step**2 / 12


def cut_to(room: int, prompt: Prompt, responses: Sequence[str]) -> tuple[Prompt, list[str], bool]:
    """Prompt and responses of at most `room` characters together, and whether anything was cut.

    The middle of the prompt goes first, down to a quarter of the room; then the middles of the
    responses, all to one length, so that no order or side gains by it.
    """
    text, room = prompt_text(prompt), max(room, 0)
    total = sum(map(len, responses))
    if len(text) + total <= room:
        return prompt, list(responses), False
    each = (room - min(len(text), room // 4)) // len(responses)
    cut = [cut_middle(response, each) for response in responses] if total else list(responses)
    return cut_middle(text, max(room - sum(map(len, cut)), 0)), cut, True


def cut_middle(text: str, most: int) -> str:
    """`text` with its middle replaced by [...] where it is longer than `most` characters."""
    mark = " [...] "
    if len(text) <= most:
        return text
    kept = max(most - len(mark), 0)
    head = (kept + 1) // 2
    return (text[:head] + mark + text[len(text) - (kept - head) :])[:most]
