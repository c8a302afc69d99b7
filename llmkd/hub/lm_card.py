"""The card of a causal language model (SALT and its comparison runs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkd.hub.benchmarks import finite
from llmkd.hub.card_parts import (
    benchmark_results,
    benchmark_table,
    card_data,
    license_of,
    link,
    linked,
    model_title,
    pairs,
    paper_section,
    place,
    public,
    run_section,
    score,
    show,
    table,
    teacher_rows,
    titled,
    whole_card,
)
from llmkd.hub.facts import RunFacts
from llmkd.hub.method import MethodInfo

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

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


def lm_card(
    facts: RunFacts, *, repo_id: str | None, method: MethodInfo, revision: str | None = None
) -> str:
    """The card of the language model in a run folder; what the folder does not hold is left out.

    `repo_id` and `revision` go into the lines that load the model; without a `repo_id` these lines
    load the folder itself.
    """
    head = card_data(
        facts,
        method=method,
        repo_id=repo_id,
        pipeline_tag="text-generation",
        sources=facts.sources(),
        results=_eval_results(facts),
    )
    teacher = teacher_rows(facts)
    data = {**facts.section("data"), "source": _data_source(facts)}
    schedule = {**facts.recipe, **facts.section("settings"), **facts.section("schedule")}
    sections = [
        _what_it_is(facts, method, repo_id),
        _how_to_load(facts, repo_id, revision),
        _scores(facts),
        _curves(facts),
        titled("Teacher", table(["", ""], teacher) if teacher else ""),
        titled("Data", pairs(DATA, data)),
        titled("Schedule", pairs(SCHEDULE, schedule)),
        run_section(facts),
        _not_measured(facts),
        paper_section(method),
    ]
    return whole_card(head, sections)


def _eval_results(facts: RunFacts) -> list[EvalResult]:
    """Held-out and benchmark scores for the `model-index`; numbers that are not finite stay out."""
    from huggingface_hub import EvalResult

    source = ", ".join(public(facts, name) for name in facts.sources()) or "held-out"
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
    return found + benchmark_results(facts)


def _what_it_is(facts: RunFacts, method: MethodInfo, repo_id: str | None) -> str:
    parameters = facts.section("student").get("parameters")
    size = f" with {show(parameters)} parameters" if parameters else ""
    kind = next(iter(facts.config.get("architectures") or []), None)
    kind = f" (`{kind}`)" if kind else ""
    noun = "PEFT adapter of a causal language model" if facts.adapter else "causal language model"
    base = facts.base_model() or (facts.adapter.get("base_model_name_or_path") or "")
    if base:
        base = f" Training started from {link(facts, base)}."
    return (
        f"# {model_title(facts, repo_id)}\n\n"
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
        f"with ω = {show(schedule.get('kd_weight'))}"
    )
    if steps >= total:
        return f"It is the comparison run RKD of {paper}: in every step the loss is {loss}."
    return (
        f"Method: {paper}. In the first {show(int(steps))} of {show(int(total))} optimizer steps "
        f"the loss is {loss}; from then on it is next-token cross-entropy alone."
    )


def _how_to_load(facts: RunFacts, repo_id: str | None, revision: str | None) -> str:
    """Lines that run as they stand, given the installed libraries."""
    where = place(facts, repo_id)
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
            [name, *(score(_whole(key, scores)) for key, *_ in columns)]
            for name, scores in models.items()
        ]
        tokens = facts.held_out.get("tokens")
        size = f" over {show(tokens)} tokens" if tokens else ""
        parts += [
            f"Held-out text{size}, temperature 1:",
            table(["model", *(title for _, title, _ in columns)], rows),
        ]
    if facts.benchmarks:
        parts += ["Benchmarks (`lm_eval`, ± standard error):", benchmark_table(facts)]
    return titled("Scores", *parts)


def _whole(key: str, scores: dict[str, Any]) -> object:
    """The score under `key`; tokens, which were interpolated, as a whole number."""
    value = finite(scores.get(key)) if key == "tokens_to_baseline" else None
    return scores.get(key) if value is None else round(value)


def _curves(facts: RunFacts) -> str:
    columns = [
        ("step", "step"),
        ("tokens", "tokens"),
        *((f"eval_{key}", title) for key, title, _ in HELD_OUT),
    ]
    columns = [(key, title) for key, title in columns if any(key in e for e in facts.evaluations)]
    rows = [[score(entry.get(key)) for key, _ in columns] for entry in _thin(facts.evaluations)]
    picture = (facts.folder / "curves.png").is_file()
    parts = ["![held-out loss during training](curves.png)"] if picture else []
    parts += [table([title for _, title in columns], rows)] if rows else []
    return titled("Loss curves", *parts)


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
    if not license_of(facts):
        lines.append("Licences: none is recorded for the data or for this model.")
    return "## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines)


def _data_source(facts: RunFacts) -> str:
    """Run.json's line on the source, with its ids as links."""
    sources = facts.sources()
    line = str(facts.section("data").get("source") or ", ".join(sources))
    return linked(facts, line, sources)


def _thin(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most EVALUATION_ROWS of `rows`, evenly spread, the first and the last among them."""
    if len(rows) <= EVALUATION_ROWS:
        return list(rows)
    last = len(rows) - 1
    return [rows[round(i * last / (EVALUATION_ROWS - 1))] for i in range(EVALUATION_ROWS)]
