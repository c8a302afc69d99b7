"""What every model card is made of: cells, tables, links, and the sections all methods share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.hub.benchmarks import finite
from llmkd.hub.facts import RunFacts
from llmkd.hub.method import MethodInfo

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData


def card_data(
    facts: RunFacts,
    *,
    method: MethodInfo,
    repo_id: str | None,
    pipeline_tag: str,
    tags: Sequence[str] = (),
    sources: Iterable[str] = (),
    results: Sequence[EvalResult] = (),
) -> ModelCardData:
    """The YAML head, built by the Hub's own class. Of `sources` only Hub ids become metadata."""
    from huggingface_hub import ModelCardData

    base = facts.base_model()
    return ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=pipeline_tag,
        tags=["llmkd", method.name, *tags],
        base_model=base,
        base_model_relation="adapter" if facts.adapter and base else None,
        datasets=[name for name in map(facts.hub_id, sources) if name] or None,
        license=license_of(facts),
        model_name=model_title(facts, repo_id) if results else None,
        eval_results=list(results) or None,
    )


def whole_card(head: ModelCardData, sections: Iterable[str]) -> str:
    """Front matter and the sections that say something."""
    return "\n\n".join([f"---\n{head.to_yaml()}\n---", *filter(None, sections)]) + "\n"


def model_title(facts: RunFacts, repo_id: str | None) -> str:
    """The repository's name without its owner, else the run's."""
    return (repo_id or facts.name).split("/")[-1]


def place(facts: RunFacts, repo_id: str | None) -> str:
    """What `from_pretrained` is given, as a Python literal: the repository, else the folder."""
    return repr(repo_id or f"./{facts.folder.name}").replace("'", '"')


def paper_section(method: MethodInfo) -> str:
    """Title, address and bibtex of the method's paper."""
    return (
        f"## Paper\n\n{method.title}: [{method.paper_title}]({method.url}), "
        f"arXiv {method.arxiv_id}.\n\n```bibtex\n{method.bibtex}\n```"
    )


def teacher_rows(facts: RunFacts) -> list[list[str]]:
    """What is known of the teacher's model, as rows of a table; none without a teacher."""
    teacher = facts.section("teacher")
    if not teacher:
        return []
    rows = [["model", link(facts, teacher.get("source"))]]
    rows += [["revision", f"`{teacher['revision']}`"]] if teacher.get("revision") else []
    rows += [["fingerprint", f"`{teacher['fingerprint']}`"]] if teacher.get("fingerprint") else []
    rows += [["parameters", show(teacher["parameters"])]] if teacher.get("parameters") else []
    return rows


def run_section(facts: RunFacts) -> str:
    """Seed, cost, command and the versions of the libraries."""
    run = facts.run
    rows = [["seed", str(run["seed"])]] if "seed" in run else []
    rows += [["tokens seen", show(run["tokens"])]] if run.get("tokens") else []
    if finite(run.get("wall_seconds")) is not None:
        rows += [["wall time (h:mm:ss)", duration(run["wall_seconds"])]]
    if finite(run.get("peak_memory_bytes")):
        rows += [["peak memory", f"{run['peak_memory_bytes'] / 2**30:,.2f} GiB"]]
    rows += [["llmkd's git revision", f"`{run['git']}`"]] if run.get("git") else []
    rows += [["command", f"`{run['command']}`"]] if run.get("command") else []
    rows += [[name, str(version)] for name, version in facts.section("versions").items()]
    return titled("Run and versions", table(["", ""], rows) if rows else "")


def benchmark_table(facts: RunFacts) -> str:
    """One row a metric, the other models of a side-by-side run beside it."""
    others = list(dict.fromkeys(name for row in facts.benchmarks for name in row.others))
    gap = any(row.gap_closed is not None for row in facts.benchmarks)
    titles = ["task", "metric", "documents", "shots", "this model", *others]
    rows = [
        [
            row.task,
            row.metric,
            row.size or "-",
            show(row.shots),
            score(row.value) + (f" ± {score(row.stderr)}" if row.stderr is not None else ""),
            *(score(row.others.get(name)) for name in others),
            *([_share(row.gap_closed)] if gap else []),
        ]
        for row in facts.benchmarks
    ]
    return table([*titles, "gap closed"] if gap else titles, rows)


def benchmark_results(facts: RunFacts) -> list[EvalResult]:
    """The benchmark scores for the `model-index`."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.task,
            dataset_name=row.task,
            metric_type=row.metric.partition(",")[0],
            metric_name=f"{row.metric} (lm_eval{f', {row.size} documents' if row.size else ''})",
            metric_value=row.value,
        )
        for row in facts.benchmarks
    ]


def license_of(facts: RunFacts) -> str | None:
    """The licence the run or its recipe names, if one of them does."""
    return facts.run.get("license") or facts.recipe.get("license")


def linked(facts: RunFacts, line: str, sources: Iterable[str]) -> str:
    """`line` with every one of `sources` in it as a link; weights of a mixture stay in it."""
    ids = "|".join(map(re.escape, sorted(sources, key=len, reverse=True)))
    return re.sub(ids, lambda found: link(facts, found[0], "datasets/"), line) if ids else line


def public(facts: RunFacts, source: str) -> str:
    """A Hub id as it is; of a path on somebody's machine the last part only."""
    return source if facts.hub_id(source) else Path(source).name or source


def link(facts: RunFacts, source: object, prefix: str = "") -> str:
    """A link to what `source` names on the Hub, else its public name as code."""
    name = facts.hub_id(source)
    if name:
        return f"[{name}](https://huggingface.co/{prefix}{name})"
    return f"`{public(facts, str(source))}`"


def titled(title: str, *parts: str) -> str:
    """A section; empty if none of `parts` says anything."""
    said = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *said]) if said else ""


def pairs(keys: Iterable[tuple[str, str]], values: Mapping[str, Any]) -> str:
    """A table of (key, title) and the value under the key; what has no value is left out."""
    rows = [[name, show(values[key])] for key, name in keys if values.get(key) not in (None, "")]
    return table(["", ""], rows) if rows else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars and line ends inside cells cannot break it."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
        for line in lines
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def score(value: object) -> str:
    """A table cell with a measured value: four decimals, and tokens as whole numbers."""
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else show(value)


def show(value: object) -> str:
    """A table cell: thousands separated, six digits, words for what is no number."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not finite"
    return str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
