"""The model card: Markdown with metadata, every line of it read from the run folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.hub.benchmarks import finite
from llmkd.hub.facts import RunFacts, read_facts
from llmkd.hub.method import MethodInfo

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

EVALUATION_ROWS = 12  # of the loss table; the picture and metrics.jsonl hold the rest
HELD_OUT = (  # key, title, metric id
    ("loss", "loss (nats/token)", "loss"),
    ("bits_per_byte", "bits/byte", "bits_per_byte"),
    ("accuracy", "next-token accuracy", "accuracy"),
)
SCHEDULE = (  # key of run.json's schedule, else of its settings; title
    ("max_steps", "optimizer steps"),
    ("kd_steps", "of these with the teacher"),
    ("kd_ratio", "share of steps with the teacher"),
    ("kd_weight", "weight of the teacher's term (ω)"),
    ("transition", "transition between the stages"),
    ("teacher_temperature", "teacher temperature"),
    ("student_temperature", "student temperature"),
    ("t2_scale", "teacher's term multiplied by temperature²"),
    ("batch_rows", "sequences per step"),
    ("learning_rate", "peak learning rate"),
    ("lr_scheduler_type", "learning-rate schedule"),
    ("warmup_steps", "warm-up (steps, or share of steps if below 1)"),
    ("optim", "optimizer"),
    ("weight_decay", "weight decay"),
    ("bf16", "bfloat16 autocast"),
)
DATA = (
    ("source", "source"),
    ("fingerprint", "fingerprint"),
    ("train_rows", "training rows"),
    ("train_tokens", "training tokens"),
    ("eval_rows", "held-out rows"),
    ("eval_tokens", "held-out tokens"),
    ("eval_bytes", "held-out bytes"),
    ("max_length", "sequence length (tokens)"),
    ("packing", "packing"),
    ("selection", "rows of the first stage chosen by"),
    ("selected_rows", "rows chosen"),
)


def model_card(
    run_folder: Path, *, repo_id: str | None, method: MethodInfo, revision: str | None = None
) -> str:
    """The card of the model in `run_folder`; what the folder does not hold is left out.

    `repo_id` and `revision` go into the lines that load the model; without a `repo_id` these lines
    load the folder itself. Writes nothing, and no token the folder may hold comes into it. Raises
    HubError if a file of the run is not readable.
    """
    facts = read_facts(Path(run_folder))
    sections = [
        _what_it_is(facts, method, repo_id),
        _how_to_load(facts, repo_id, revision),
        _scores(facts),
        _curves(facts),
        _teacher(facts),
        _table_of("Data", DATA, {**facts.section("data"), "source": _data_source(facts)}),
        _table_of(
            "Schedule",
            SCHEDULE,
            {**facts.recipe, **facts.section("settings"), **facts.section("schedule")},
        ),
        _run(facts),
        _not_measured(facts),
        f"## Paper\n\n{method.title}: [{method.paper_title}]({method.url}), "
        f"arXiv {method.arxiv_id}.\n\n```bibtex\n{method.bibtex}\n```",
    ]
    head = _metadata(facts, method, repo_id).to_yaml()
    return "\n\n".join([f"---\n{head}\n---", *filter(None, sections)]) + "\n"


def _metadata(facts: RunFacts, method: MethodInfo, repo_id: str | None) -> ModelCardData:
    """The YAML head, built by the Hub's own class."""
    from huggingface_hub import ModelCardData

    results = _eval_results(facts)
    base = facts.base_model()
    return ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["llmkd", method.name],
        base_model=base,
        base_model_relation="adapter" if facts.adapter and base else None,
        datasets=[name for name in map(facts.hub_id, facts.sources()) if name] or None,
        license=_license(facts),
        model_name=(repo_id or facts.name).split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _eval_results(facts: RunFacts) -> list[EvalResult]:
    """Held-out and benchmark scores for the `model-index`; numbers that are not finite stay out."""
    from huggingface_hub import EvalResult

    source = ", ".join(_public(facts, name) for name in facts.sources()) or "held-out"
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=f"held-out part of {source}",
            metric_type=metric,
            metric_name=title,
            metric_value=facts.held_out[key],
        )
        for key, title, metric in HELD_OUT
        if finite(facts.held_out.get(key)) is not None
    ]
    return found + [
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


def _what_it_is(facts: RunFacts, method: MethodInfo, repo_id: str | None) -> str:
    parameters = facts.section("student").get("parameters")
    size = f" with {_show(parameters)} parameters" if parameters else ""
    kind = next(iter(facts.config.get("architectures") or []), None)
    kind = f" (`{kind}`)" if kind else ""
    noun = "PEFT adapter of a causal language model" if facts.adapter else "causal language model"
    base = facts.base_model() or (facts.adapter.get("base_model_name_or_path") or "")
    if base:
        base = f" Training started from {_link(facts, base)}."
    return (
        f"# {(repo_id or facts.name).split('/')[-1]}\n\n"
        f"A {noun}{size}{kind}, trained with llmkd. {_role(facts, method)}{base}"
    )


def _role(facts: RunFacts, method: MethodInfo) -> str:
    """One or two sentences on what the method did in this run."""
    schedule = facts.section("schedule")
    steps, total = finite(schedule.get("kd_steps")), finite(schedule.get("max_steps"))
    paper = f"[{method.title}]({method.url})"
    if facts.name == "teacher":
        return f"It is the small model that serves as teacher in a run of {paper}."
    if method.name != "salt" or steps is None or not total:
        return f"Method: {paper}."
    if steps <= 0 or schedule.get("kd_weight") == 0:
        return (
            f"It is the baseline in a run of {paper}: next-token cross-entropy in every step, "
            "no teacher."
        )
    loss = (
        "`(1 - ω) * next-token cross-entropy + ω * KL(teacher || student)` "
        f"with ω = {_show(schedule.get('kd_weight'))}"
    )
    if steps >= total:
        return f"It is the comparison run RKD of {paper}: in every step the loss is {loss}."
    return (
        f"Method: {paper}. In the first {_show(int(steps))} of {_show(int(total))} optimizer steps "
        f"the loss is {loss}; from then on it is next-token cross-entropy alone."
    )


def _how_to_load(facts: RunFacts, repo_id: str | None, revision: str | None) -> str:
    """Lines that run as they stand, given the installed libraries."""
    where = repr(repo_id or f"./{facts.folder.name}").replace("'", '"')
    which = f', revision="{revision}"' if revision else ""
    auto = "AutoPeftModelForCausalLM" if facts.adapter else "AutoModelForCausalLM"
    has_tokenizer = (facts.folder / "tokenizer_config.json").is_file()
    lines = [f"model = {auto}.from_pretrained({where}{which})"]
    if has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({where}{which})")
    if facts.adapter:
        lines.insert(0, "from peft import AutoPeftModelForCausalLM")
        if has_tokenizer:
            lines.insert(1, "from transformers import AutoTokenizer")
    else:
        names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else auto
        lines.insert(0, f"from transformers import {names}")
    code = "\n".join(lines)
    note = "" if repo_id else "\n\nRun it in the folder that holds this one."
    if facts.adapter and not facts.base_model():
        base = facts.adapter.get("base_model_name_or_path")
        note += f"\n\nThe base model is not on the Hub: `{base}` must exist where this runs."
    return f"## How to load it\n\n```python\n{code}\n```{note}"


def _scores(facts: RunFacts) -> str:
    """Held-out scores beside those of the other models of the recipe, then benchmarks."""
    models = {f"**{facts.name}** (this model)": facts.held_out, **facts.others}
    models = {name: scores for name, scores in models.items() if scores}
    columns = [*HELD_OUT, ("tokens_to_baseline", "tokens to the baseline's loss", "")]
    columns = [
        column for column in columns if any(column[0] in scores for scores in models.values())
    ]
    parts = []
    if facts.held_out and columns:
        rows = [
            [name, *(_score(_whole(key, scores)) for key, *_ in columns)]
            for name, scores in models.items()
        ]
        tokens = facts.held_out.get("tokens")
        size = f" over {_show(tokens)} tokens" if tokens else ""
        parts += [
            f"Held-out text{size}, temperature 1:",
            _table(["model", *(title for _, title, _ in columns)], rows),
        ]
    if facts.benchmarks:
        parts += ["Benchmarks (`lm_eval`, ± standard error):", _benchmarks(facts)]
    return "\n\n".join(["## Scores", *parts]) if parts else ""


def _whole(key: str, scores: dict[str, Any]) -> object:
    """The score under `key`; tokens, which were interpolated, as a whole number."""
    value = finite(scores.get(key)) if key == "tokens_to_baseline" else None
    return scores.get(key) if value is None else round(value)


def _benchmarks(facts: RunFacts) -> str:
    """One row a metric, the other models of a side-by-side run beside it."""
    others = list(dict.fromkeys(name for row in facts.benchmarks for name in row.others))
    gap = any(row.gap_closed is not None for row in facts.benchmarks)
    titles = ["task", "metric", "documents", "shots", "this model", *others]
    rows = [
        [
            row.task,
            row.metric,
            row.size or "-",
            _show(row.shots),
            _score(row.value) + (f" ± {_score(row.stderr)}" if row.stderr is not None else ""),
            *(_score(row.others.get(name)) for name in others),
            *([_share(row.gap_closed)] if gap else []),
        ]
        for row in facts.benchmarks
    ]
    return _table([*titles, "gap closed"] if gap else titles, rows)


def _curves(facts: RunFacts) -> str:
    columns = [
        ("step", "step"),
        ("tokens", "tokens"),
        *((f"eval_{key}", title) for key, title, _ in HELD_OUT),
    ]
    columns = [(key, title) for key, title in columns if any(key in e for e in facts.evaluations)]
    rows = [[_score(entry.get(key)) for key, _ in columns] for entry in _thin(facts.evaluations)]
    picture = (facts.folder / "curves.png").is_file()
    parts = ["![held-out loss during training](curves.png)"] if picture else []
    parts += [_table([title for _, title in columns], rows)] if rows else []
    return "\n\n".join(["## Loss curves", *parts]) if parts else ""


def _teacher(facts: RunFacts) -> str:
    teacher = facts.section("teacher")
    if not teacher:
        return ""
    rows = [["model", _link(facts, teacher.get("source"))]]
    rows += [["revision", f"`{teacher['revision']}`"]] if teacher.get("revision") else []
    rows += [["fingerprint", f"`{teacher['fingerprint']}`"]] if teacher.get("fingerprint") else []
    rows += [["parameters", _show(teacher["parameters"])]] if teacher.get("parameters") else []
    return f"## Teacher\n\n{_table(['', ''], rows)}"


def _table_of(title: str, keys: Iterable[tuple[str, str]], values: dict[str, Any]) -> str:
    rows = [[name, _show(values[key])] for key, name in keys if values.get(key) not in (None, "")]
    return f"## {title}\n\n{_table(['', ''], rows)}" if rows else ""


def _run(facts: RunFacts) -> str:
    run = facts.run
    rows = [["seed", str(run["seed"])]] if "seed" in run else []
    rows += [["tokens seen", _show(run["tokens"])]] if run.get("tokens") else []
    if finite(run.get("wall_seconds")) is not None:
        rows += [["wall time (h:mm:ss)", str(timedelta(seconds=round(run["wall_seconds"])))]]
    if finite(run.get("peak_memory_bytes")):
        rows += [["peak memory", f"{run['peak_memory_bytes'] / 2**30:,.2f} GiB"]]
    rows += [["llmkd's git revision", f"`{run['git']}`"]] if run.get("git") else []
    rows += [["command", f"`{run['command']}`"]] if run.get("command") else []
    rows += [[name, str(version)] for name, version in facts.section("versions").items()]
    return f"## Run and versions\n\n{_table(['', ''], rows)}" if rows else ""


def _not_measured(facts: RunFacts) -> str:
    lines = []
    if facts.held_out:
        lines.append("Other kinds of text: the held-out text comes from the training source.")
    else:
        lines.append("Held-out loss: no score was recorded.")
    if not facts.benchmarks:
        lines.append("Downstream tasks: no benchmark was run.")
    if facts.name != "baseline" and "baseline" not in facts.others:
        lines.append("The gain over plain training: no baseline was trained beside this model.")
    if "seed" in facts.run:
        lines.append(f"The spread over seeds: this is one run, seed {facts.run['seed']}.")
    lines.append("Bias, toxicity, factual accuracy, memorised training text.")
    if not _license(facts):
        lines.append("Licences: none is recorded for the data or for this model.")
    return "## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines)


def _license(facts: RunFacts) -> str | None:
    return facts.run.get("license") or facts.recipe.get("license")


def _data_source(facts: RunFacts) -> str:
    """Run.json's line on the source, with its ids as links; weights of a mixture stay in it."""
    sources = facts.sources()
    line = str(facts.section("data").get("source") or ", ".join(sources))
    ids = "|".join(map(re.escape, sorted(sources, key=len, reverse=True)))
    return re.sub(ids, lambda found: _link(facts, found[0], "datasets/"), line) if ids else line


def _public(facts: RunFacts, source: str) -> str:
    """A Hub id as it is; of a path on somebody's machine the last part only."""
    return source if facts.hub_id(source) else Path(source).name or source


def _link(facts: RunFacts, source: object, prefix: str = "") -> str:
    name = facts.hub_id(source)
    if name:
        return f"[{name}](https://huggingface.co/{prefix}{name})"
    return f"`{_public(facts, str(source))}`"


def _thin(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most EVALUATION_ROWS of `rows`, evenly spread, the first and the last among them."""
    if len(rows) <= EVALUATION_ROWS:
        return list(rows)
    last = len(rows) - 1
    return [rows[round(i * last / (EVALUATION_ROWS - 1))] for i in range(EVALUATION_ROWS)]


def _score(value: object) -> str:
    """A table cell with a measured value: four decimals, and tokens as whole numbers."""
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else _show(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _show(value: object) -> str:
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


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars and line ends inside cells cannot break it."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
        for line in lines
    )
