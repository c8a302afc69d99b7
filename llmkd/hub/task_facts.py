"""What the card of an ERNIE-Tiny run needs to know, read out of the run's facts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmkd.hub.benchmarks import finite, mapping
from llmkd.hub.facts import DATA_SUFFIXES, RunFacts

PAPER_STAGES = ("gd", "ged", "tad", "tsd")
METRICS = {  # key in eval.json -> title, metric id on the Hub
    "accuracy": ("accuracy", "accuracy"),
    "token_accuracy": ("token accuracy", "accuracy"),
    "macro_f1": ("macro F1", "f1"),
    "micro_f1": ("micro F1", "f1"),
    "f1": ("F1 of class 1", "f1"),
    "exact_match": ("exact match", "exact_match"),
    "matthews": ("Matthews correlation", "matthews_correlation"),
    "pearson": ("Pearson correlation", "pearsonr"),
    "spearman": ("Spearman correlation", "spearmanr"),
    "mse": ("mean squared error", "mse"),
    "loss": ("loss", "loss"),
}
LOWER_IS_BETTER = ("mse", "loss")
WEIGHT = re.compile(r"^[\d.e+-]+ of ")  # before every part of a mixture


@dataclass(frozen=True, slots=True)
class Head:
    """What sits on the encoder, and by which names transformers and the Hub know it."""

    pipeline: str
    auto: str  # class that loads it
    noun: str
    options: str = ""  # further arguments of `pipeline`


_SEQUENCE = "text-classification", "AutoModelForSequenceClassification"
TASK_HEADS = {  # by run.json's kind of task
    "single_label": Head(*_SEQUENCE, "text classifier"),
    "multi_label": Head(
        *_SEQUENCE, "multi-label text classifier", ', top_k=None, function_to_apply="sigmoid"'
    ),
    "regression": Head(*_SEQUENCE, "text regression model", ', function_to_apply="none"'),
    "token": Head("token-classification", "AutoModelForTokenClassification", "token classifier"),
}
HEADS = {  # by the end of the architecture's name, where there is no task
    "ForSequenceClassification": TASK_HEADS["single_label"],
    "ForTokenClassification": TASK_HEADS["token"],
    "ForCausalLM": Head("text-generation", "AutoModelForCausalLM", "causal language model"),
    "LMHeadModel": Head("text-generation", "AutoModelForCausalLM", "causal language model"),
    "": Head("feature-extraction", "AutoModel", "text encoder"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where data came from: a Hub id, with a subset where the dataset has some, or a path."""

    name: str
    subset: str | None = None

    @property
    def tail(self) -> str:
        """What follows the name on run.json's line."""
        return f"/{self.subset}" if self.subset else ""


class TaskFacts:
    """A run folder of kind `ernie-tiny`; a part that was not recorded is empty or None."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.task = facts.section("task")
        self.general = facts.section("general")
        self.student = facts.section("student")
        self.teacher = facts.section("teacher")
        self.latency = mapping(facts.scores.get("latency"))
        stages = facts.run.get("stages")
        stages = stages if isinstance(stages, list) else []
        self.stages = [stage for stage in stages if isinstance(stage, dict)]
        self.is_teacher = facts.name == "teacher"

    @cached_property
    def architecture(self) -> str:
        """Class of the model, as config.json names it."""
        return str(next(iter(self.facts.config.get("architectures") or []), ""))

    @cached_property
    def head(self) -> Head:
        """By the task's kind; by the architecture where no task, or no known kind, is recorded."""
        ends = (head for end, head in HEADS.items() if self.architecture.endswith(end))
        return TASK_HEADS.get(str(self.task.get("kind"))) or next(ends)

    @cached_property
    def teachers(self) -> list[str]:
        """The distinct teachers of the stages, `none` left out."""
        named = (str(stage.get("teacher") or "none") for stage in self.stages)
        return [name for name in dict.fromkeys(named) if name != "none"]

    @cached_property
    def own(self) -> dict[str, Any]:
        """This model's scores on the dev set."""
        arms = mapping(self.facts.above.get("arms"))
        if self.is_teacher:
            arms = self.facts.above
        above = mapping(arms.get(self.facts.name) or arms.get(self.facts.folder.name))
        return {**above, **mapping(self.facts.scores.get("task"))}

    @cached_property
    def others(self) -> dict[str, dict[str, Any]]:
        """Scores of the recipe's other arms, by name."""
        return {name: row for name, row in self.facts.others.items() if name != "teacher"}

    @cached_property
    def teacher_scores(self) -> dict[str, Any]:
        """The teacher's scores on the dev set: all of them, or the one in run.json."""
        if self.is_teacher:
            return {}
        found = mapping(self.facts.scores.get("teacher") or self.facts.above.get("teacher"))
        known = self.teacher.get("score")
        return {**({} if known is None or not self.metric else {self.metric: known}), **found}

    @cached_property
    def metric(self) -> str | None:
        """The score that decides, else the first one recorded; None without a task."""
        asked = self.task.get("metric")
        return str(asked) if asked else next((key for key in self.own if key in METRICS), None)

    def retention(self, scores: dict[str, Any]) -> float | None:
        """Main score of a model / that of the teacher; None where the quotient says nothing."""
        if self.metric is None or self.metric in LOWER_IS_BETTER:
            return None
        mine, top = finite(scores.get(self.metric)), finite(self.teacher_scores.get(self.metric))
        return None if mine is None or top is None or top <= 0 else mine / top

    @cached_property
    def times_larger(self) -> float | None:
        """The teacher's parameters / the student's."""
        return ratio(self.teacher.get("parameters"), self.student.get("parameters"))

    def sources(self, section: dict[str, Any]) -> list[Source]:
        """The parts of a section's line on its source, which may be a mixture's."""
        line = str(section.get("source") or "")
        return [self._source(WEIGHT.sub("", part)) for part in line.split(" + ") if part]

    def _source(self, name: str) -> Source:
        """`owner/name/subset` is a subset of a dataset, unless it looks like a file's path."""
        repository, _, subset = name.rpartition("/")
        known = self.facts.hub_id(repository) and not name.endswith(DATA_SUFFIXES)
        return Source(repository, subset) if known and subset else Source(name)


def title_of(metric: str) -> str:
    """A score's name as a reader writes it."""
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ")


def ratio(above: object, below: object) -> float | None:
    """`above / below` where both are numbers above 0."""
    top, bottom = finite(above), finite(below)
    return top / bottom if top and bottom and min(top, bottom) > 0 else None
