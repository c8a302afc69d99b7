"""What a run folder tells about its model: read once, every part optional."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmkd.errors import HubError
from llmkd.files import read_json
from llmkd.hub.benchmarks import Benchmark, mapping, read_benchmarks
from llmkd.hub.secrets import environment_tokens, redact

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")
# What an arm's row in the recipe's eval.json says of the held-out text; the rest is about training.
MEASURED = ("loss", "bits_per_byte", "accuracy", "tokens_to_baseline")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".arrow", ".gz", ".zst")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Contents of a run folder, without tokens. A file that is not there gives an empty value."""

    folder: Path
    run: dict[str, Any]  # run.json
    recipe: dict[str, Any]  # recipe.yaml
    config: dict[str, Any]  # config.json of the model
    adapter: dict[str, Any]  # adapter_config.json; empty unless the folder holds a PEFT adapter
    held_out: dict[str, Any]  # nats/token, bits/byte, accuracy 0..1
    benchmarks: list[Benchmark]
    evaluations: list[dict[str, Any]]  # lines of metrics.jsonl with an eval_loss, by step
    others: dict[str, dict[str, Any]]  # the other models of the same recipe -> held-out scores
    scores: dict[str, Any]  # eval.json
    above: dict[str, Any]  # eval.json of the recipe, if several models share the folder above

    @property
    def name(self) -> str:
        """Name of the run: what run.json says, else the folder's."""
        return str(self.run.get("name") or redact(self.folder.name))

    def section(self, key: str) -> dict[str, Any]:
        """The object run.json holds under `key`; empty where it holds none."""
        return mapping(self.run.get(key))

    def hub_id(self, source: object) -> str | None:
        """`source` if it names something on the Hub, else None.

        `owner/name` is also how a relative path looks, so it must not exist here, beside the run
        or in any folder above it.
        """
        if not isinstance(source, str) or not HUB_ID.fullmatch(source):
            return None
        if source.endswith(DATA_SUFFIXES):
            return None
        here = self.folder.resolve()
        above = (Path.cwd(), here, *here.parents)
        return None if any((place / source).exists() for place in above) else source

    def sources(self) -> list[str]:
        """Where the training text came from: a Hub id, a path or a word such as `stdlib` each."""
        parts = self.setting("dataset_mixture")
        ids = [part.get("id") for part in parts or () if isinstance(part, dict)]
        named = ids or [self.setting("dataset") or self.section("data").get("source")]
        return [str(source) for source in named if source]

    def setting(self, key: str) -> Any:
        """A setting of the run, resolved if run.json has it so, else as the recipe says."""
        return {**self.recipe, **self.section("settings")}.get(key)

    def base_model(self) -> str | None:
        """Hub id of the weights training started from; None for a model from scratch."""
        if self.adapter:
            return self.hub_id(self.adapter.get("base_model_name_or_path"))
        return self.hub_id(self.section("student").get("source"))


def read_facts(folder: Path) -> RunFacts:
    """Everything the card needs. Raises HubError if a file is there but cannot be read."""
    folder = folder.resolve()
    run = _json(folder / "run.json")
    own, parent = _json(folder / "eval.json"), _json(folder.parent / "eval.json")
    names = [str(run.get("name") or folder.name), folder.name]
    arms = _arms(folder, own, parent)
    mine = next((mapping(arms[name]) for name in names if name in arms), {})
    mine = {key: mine[key] for key in MEASURED if key in mine}
    others = {name: mapping(scores) for name, scores in arms.items() if name not in names}
    beside = folder.parent if arms and "arms" not in own else folder
    teacher = mapping(_json(beside / "teacher" / "eval.json").get("held_out"))
    if teacher and "teacher" not in names:
        others.setdefault("teacher", teacher)
    above = parent if arms and "arms" not in own else {}
    return RunFacts(
        folder=folder,
        run=run,
        recipe=_yaml(folder / "recipe.yaml"),
        config=_json(folder / "config.json"),
        adapter=_json(folder / "adapter_config.json"),
        held_out={**mine, **mapping(own.get("held_out"))},
        benchmarks=read_benchmarks(
            mapping(own.get("lm_eval")), mapping(above.get("lm_eval")), names[0]
        ),
        evaluations=_evaluations(folder / "metrics.jsonl"),
        others=others,
        scores=own,
        above=above,
    )


def _arms(folder: Path, own: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """Held-out scores of all models of the recipe, by name. They stand in the folder itself if the
    recipe made one model, in the folder above if it made several; any other folder above belongs to
    somebody else."""
    above = mapping(parent.get("arms"))
    belongs = folder.name in above or (bool(above) and folder.name == "teacher")
    return mapping(own.get("arms")) or (above if belongs else {})


def _evaluations(path: Path) -> list[dict[str, Any]]:
    """Evaluation lines by step. The last line may be a part of one if the machine went down, and a
    resumed run may log a step twice: the later line holds."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = mapping(_clean(json.loads(line)))
        except json.JSONDecodeError:
            continue
        if "eval_loss" in entry and isinstance(entry.get("step"), int):
            found[entry["step"]] = entry
    return [found[step] for step in sorted(found)]


def _json(path: Path) -> dict[str, Any]:
    try:
        return mapping(_clean(read_json(path)))
    except ValueError as error:
        raise _unreadable(path, error) from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return mapping(_clean(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> Exception:
    problem = f"cannot be read ({type(error).__name__})"
    return HubError.of(path.name, str(path), problem, "restore the file, or train the run again")


def _clean(value: Any) -> Any:
    """`value` with every text in it redacted. Here, not in the finished card: a mask in the middle
    of YAML would no longer be YAML."""
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return redact(value, *environment_tokens()) if isinstance(value, str) else value
