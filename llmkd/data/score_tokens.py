"""Rated rows to tokens: question and input, the answer's beginning, a level, the answer's end.

Training and scoring build the prompt here and nowhere else, so that they ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from llmkd.data.levels import LevelConfig, Levels
from llmkd.data.score_images import image_size, open_image, shown
from llmkd.errors import DataError, LlmkdError, RecipeError
from llmkd.objectives.token import IGNORE

Row = Mapping[str, Any]
Target = Callable[[Sequence[Row]], Any]
MARK = " ... "
ROUNDS = 64  # cutting moves borders of tokens, and long chats have many turns to cut
HOLE = "{text}"


@dataclass(frozen=True, slots=True)
class ScorePrompt:
    """What is asked and how an answer ends. The input follows the question, or stands where a
    question has `{text}`.
    """

    questions: tuple[str, ...]
    suffix: str = "."
    system: str | None = None

    @classmethod
    def of(cls, config: LevelConfig) -> ScorePrompt:
        """That of a recipe."""
        return cls(tuple(config.questions or ()), config.answer_suffix, config.system_prompt)

    def pick(self, row: int, seed: int) -> str:
        """One of the questions, decided by row and seed alone."""
        draw = np.random.default_rng([seed, row]).integers(len(self.questions))
        return self.questions[int(draw)]


@dataclass(frozen=True)
class Prompted:
    """Ids up to the answer's beginning; the processor's other outputs, those with one number a
    token apart; and whether the text had to be cut.
    """

    ids: list[int]
    per_token: dict[str, list[int]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    cut: bool = False


class ScoreEncoder:
    """Makes tokens of rows for a tokenizer, or for the processor of an image-text model.

    The question goes through the chat template where there is one, as the user's turn; rated
    messages are followed by it, in a turn of their own after an assistant's, else in the last one.
    Texts that do not fit into `max_length` tokens with the answer lose their middle, never the
    question; of messages the longest is cut first. RecipeError for a system prompt without a chat
    template.
    """

    def __init__(
        self, processor: Any, levels: Levels, prompt: ScorePrompt, max_length: int | None = None
    ) -> None:
        self.processor, self.levels, self.prompt = processor, levels, prompt
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_length = max_length or 1 << 30
        self.sees = getattr(processor, "image_processor", None) is not None
        self.chat = self._chat()
        if prompt.system is not None and self.chat is None:
            problem = "the model has no chat template"
            raise RecipeError.of("system_prompt", prompt.system, problem, "leave it out")
        self.prefix = self._ids(levels.prefix)
        self.endings = [self._ending(place) for place in range(len(levels.words))]
        self.room = self.max_length - len(self.prefix) - 1 - max(map(len, self.endings))

    def _chat(self) -> Any:
        """What has the chat template: the processor, its tokenizer, or None."""
        for one in (self.processor, self.tokenizer):
            if getattr(one, "chat_template", None) is not None:
                return one
        return None

    def _ending(self, place: int) -> list[int]:
        """Ids behind a level: the suffix as it is tokenized after this word, and END."""
        word, suffix = self.levels.words[place], self.prompt.suffix
        start = self._ids(word)
        whole = self._ids(word + suffix)
        rest = whole[len(start) :] if whole[: len(start)] == start else self._ids(suffix)
        end = self.tokenizer.eos_token_id
        return rest if end is None else [*rest, end]

    def prompted(self, row: Row, question: str | None = None) -> Prompted:
        """Ids up to and with the answer's beginning, by default for the first question.

        DataError naming the row where there is no room for a part of its text, where it has images
        and the model sees none, and for a chat template that refuses it.
        """
        question = self.prompt.questions[0] if question is None else question
        messages = row.get("messages")
        parts = [turn["content"] for turn in messages] if messages else [row.get("text") or ""]
        images = self._images(row)
        made = self._encode(row, parts, question, images)
        cut = len(made.ids) > self.room
        for number in range(ROUNDS):
            over = len(made.ids) - self.room
            if over <= 0:
                break
            longest = max(range(len(parts)), key=lambda place: len(parts[place]))
            # Of several, half of one at most: the others are then as long.
            most = len(self._ids(parts[longest])) // 2 if len(parts) > 1 else over + number
            parts[longest] = self._cut(parts[longest], min(over + number, max(most, 1)))
            if not parts[longest]:  # nobody rates a text that is gone
                break
            made = self._encode(row, parts, question, images)
        if len(made.ids) > self.room:
            raise self._too_long(row, len(made.ids), bool(images))
        ids = [*made.ids, *self.prefix]
        per_token = {k: [*v, *[0] * len(self.prefix)] for k, v in made.per_token.items()}
        return Prompted(ids, per_token, made.tensors, cut)

    def _too_long(self, row: Row, count: int, images: bool) -> LlmkdError:
        number, what = row.get("row", 0), "question and images" if images else "question"
        problem = (
            f"row {number}: no room for its text beside {what}: still {count} tokens, "
            f"{self.room} are left for a prompt"
        )
        return DataError.of("max_length", self.max_length, problem, "a larger max_length")

    def answered(self, row: Row, target_L: Any, question: str | None = None) -> dict[str, Any]:
        """A row of the trainer's format: `input_ids`, `labels`, `level_at`, `target`, `score_mean`,
        `score_std`, `row`, and what the processor made; and `cut`.
        """
        made = self.prompted(row, question)
        place = level_index(row["mean"], self.levels.values_L)
        answer = [*self.prefix, self.levels.ids_L[place], *self.endings[place]]
        start, behind = len(made.ids) - len(self.prefix), answer[len(self.prefix) :]
        return {
            "input_ids": [*made.ids, *behind],
            "labels": [*[IGNORE] * start, *answer],
            "level_at": len(made.ids),
            "target": [float(one) for one in target_L],
            "score_mean": row["mean"],
            "score_std": row["std"],
            "row": row["row"],
            "cut": made.cut,
            **{key: [*ids, *[0] * len(behind)] for key, ids in made.per_token.items()},
            **made.tensors,
        }

    def _images(self, row: Row) -> list[Any]:
        images = row.get("images") or []
        if images and not self.sees:
            problem = f"row {row.get('row', 0)} has images and the model reads text only"
            raise DataError.of("image_column", len(images), problem, "an image-text model")
        return [open_image(image) for image in images]

    def _encode(self, row: Row, parts: list[str], question: str, images: list[Any]) -> Prompted:
        if self.sees:  # a text that holds the image's mark would be an image more
            mark = getattr(self.processor, "image_token", None) or "<image>"
            parts = [part.replace(mark, "") for part in parts]
        try:
            text = self._text(row, parts, question, len(images))
        except Exception as error:  # templates raise what they like
            problem = f"row {row.get('row', 0)}: the chat template refuses it: {str(error)[:200]}"
            ways = ("some know no system message", "most want user and assistant in turns")
            raise DataError.of("messages_column", len(parts), problem, *ways) from error
        special = self.chat is None  # a template has written them already
        if not images:
            ids = self._ids(text, special=special)
            ends = special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id
            return Prompted(ids[:-1] if ends else ids)
        made = self.processor(
            text=[text], images=[images], add_special_tokens=special, return_tensors="pt"
        )
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        per_token = {key: made.pop(key)[0].tolist() for key in list(made) if _typed(key)}
        return Prompted(ids, per_token, dict(made))

    def _text(self, row: Row, parts: list[str], question: str, images: int) -> str:
        turns = self._turns(row, parts, question)
        if self.chat is None:
            if images:
                mark = getattr(self.processor, "image_token", None) or "<image>"
                both = [question, parts[0]] if HOLE not in question else ["", turns[0]["content"]]
                lines = [both[0], *[mark] * images, both[1]]
                return "\n".join(line for line in lines if line) + "\n"
            if not row.get("messages"):
                return turns[0]["content"] + "\n"
            said = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
            return "\n\n".join([*said, "Assistant:\n"])
        if self.sees:
            asked = turns[-1]["content"]
            turns = [{**turn, "content": _typed_parts(turn["content"])} for turn in turns]
            if images:  # as the official prompt: question, images, text
                head, tail = ("", asked) if HOLE in question else (question, parts[0])
                pictures = [{"type": "image"} for _ in range(images)]
                head, tail = (
                    head and f"{head}\n",
                    tail and f"\n{tail}",
                )  # templates set no line breaks
                turns[-1]["content"] = [*_typed_parts(head), *pictures, *_typed_parts(tail)]
        return self.chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _turns(self, row: Row, parts: list[str], question: str) -> list[dict[str, Any]]:
        messages = row.get("messages")
        if messages:
            pairs = zip(messages, parts, strict=True)
            turns = [{"role": turn["role"], "content": part} for turn, part in pairs]
            if turns[-1]["role"] == "assistant":
                turns.append({"role": "user", "content": question})
            else:
                turns[-1]["content"] = f"{turns[-1]['content']}\n\n{question}"
        elif HOLE in question:
            turns = [{"role": "user", "content": question.replace(HOLE, parts[0])}]
        else:
            both = [part for part in (question, parts[0]) if part]
            turns = [{"role": "user", "content": "\n\n".join(both)}]
        system = self.prompt.system
        if system is not None and turns[0]["role"] not in ("system", "developer"):
            turns = [{"role": "system", "content": system}, *turns]
        return turns

    def _cut(self, text: str, drop: int) -> str:
        """The text without at least `drop` tokens of its middle, and a mark where they were."""
        ids = self._ids(text)
        keep = len(ids) - drop - len(self._ids(MARK))
        if keep < 2:
            return ""
        head, tail = ids[: keep - keep // 2], ids[len(ids) - keep // 2 :]
        parts = [
            self.tokenizer.decode(some, clean_up_tokenization_spaces=False).strip("\ufffd")
            for some in (head, tail)  # a cut through the bytes of a character leaves halves of it
        ]
        return MARK.join(parts)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _typed(key: str) -> bool:
    return key.endswith("token_type_ids")


def _typed_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def level_index(mean: float, values: Sequence[float]) -> int:
    """The level that stands in the answer, which only says where the level token is: of L equal
    bins as in the official code (a bound belongs to the bin below); the nearest value where levels
    are not evenly spaced.
    """
    up = np.sort(np.asarray(values, dtype=np.float64))
    if np.allclose(np.diff(up), (up[-1] - up[0]) / (len(up) - 1)):
        bounds = up[0] + (up[-1] - up[0]) * np.arange(1, len(up)) / len(up)
        value = up[int(np.searchsorted(bounds + 1e-9, mean))]
    else:
        value = up[int(np.abs(up - mean).argmin())]
    return list(values).index(float(value))


class ImageRows(TorchDataset):
    """Tokenized rows whose images are read when they are asked for: pixels of thousands fit in no
    memory. `check` finds out before whether all of them fit.
    """

    def __init__(
        self, rows: list[Row], targets_NL: np.ndarray, ask: Any, encoder: ScoreEncoder
    ) -> None:
        self.rows, self.targets_NL, self.ask, self.encoder = rows, targets_NL, ask, encoder
        self.groups = group_ids(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        made = self.encoder.answered(row, self.targets_NL[place], self.ask(row))
        del made["cut"]
        return {**made, "group_id": self.groups[place]}

    def check(self, rank: int = 0, world: int = 1) -> int:
        """How many texts had to be cut, of every `world`-th row from `rank` on. One of the rows
        with the same text and question and images of the same sizes is encoded for all of them:
        no more decides how many tokens they take.

        DataError naming the row: no room for its text, or the processor refuses its images.
        """
        known: dict[Any, bool] = {}
        cut = 0
        for place in tqdm(range(rank, len(self), world), desc="measuring image rows", delay=2):
            row = self.rows[place]
            question = self.ask(row)
            turns = [(turn["role"], turn["content"]) for turn in row.get("messages") or []]
            sizes = tuple(image_size(image) for image in row.get("images") or [])
            alike = (row.get("text"), tuple(turns), question, sizes)
            if alike not in known:
                known[alike] = self._prompted(row, question).cut
            cut += known[alike]
        return cut

    def _prompted(self, row: Row, question: str | None) -> Prompted:
        try:
            return self.encoder.prompted(row, question)
        except LlmkdError:
            raise
        except Exception as error:  # image processors raise what they like
            problem = (
                f"row {row.get('row', 0)}: the model's processor refuses it: {str(error)[:200]}"
            )
            images = ", ".join(shown(image) for image in row.get("images") or [])
            raise DataError.of("image_column", images, problem, "mend or drop the row") from error


@dataclass(frozen=True)
class ScoreTokens:
    """Tokenized rows, and how many texts had to be cut (None: image rows, which are encoded when
    they are asked for; `rows.check()` counts them).
    """

    rows: Dataset | ImageRows
    cut: int | None


def tokenize_scores(
    rows: Sequence[Row],
    encoder: ScoreEncoder,
    target: Target,
    *,
    training: bool = True,
    seed: int = 0,
) -> ScoreTokens:
    """Rows in the trainer's format. `target` gives [N, L] level targets of N rows, in the levels'
    order; training rows are asked one of the questions each, others the first.

    DataError naming the row for what does not fit; of image rows the first is encoded at once.
    """
    rows = list(rows)
    targets_NL = np.asarray(target(rows), dtype=np.float64)
    if targets_NL.shape != (len(rows), len(encoder.levels.words)):
        shape = (len(rows), len(encoder.levels.words))
        raise ValueError(f"targets are {targets_NL.shape}, rows and levels {shape}")

    ask = _Ask(encoder.prompt, seed, training)
    if any(row.get("images") for row in rows):
        lazy = ImageRows(rows, targets_NL, ask, encoder)
        _ = lazy[0]
        return ScoreTokens(lazy, None)
    made, groups = [], group_ids(rows)
    for place, row in enumerate(tqdm(rows, desc="tokenizing rated rows", delay=2)):
        one = encoder.answered(row, targets_NL[place], ask(row))
        made.append({**one, "group_id": groups[place]})
    cut = sum(one.pop("cut") for one in made)
    return ScoreTokens(Dataset.from_list(made), cut)


@dataclass(frozen=True)
class _Ask:
    """The question of a row; a class, so that a data loader's workers can be sent it."""

    prompt: ScorePrompt
    seed: int
    training: bool

    def __call__(self, row: Row) -> str | None:
        return self.prompt.pick(row["row"], self.seed) if self.training else None


def group_ids(rows: Sequence[Row]) -> list[int]:
    """Groups numbered in the order of their names; rows without one are a group of their own."""
    names = sorted({row.get("group") for row in rows}, key=lambda name: (name is not None, name))
    numbers = {name: place for place, name in enumerate(names)}
    return [numbers[row.get("group")] for row in rows]
