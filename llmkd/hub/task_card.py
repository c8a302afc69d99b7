"""The card of an ERNIE-Tiny run: a small encoder for one task, or compressed for none yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkd.hub import task_tables
from llmkd.hub.benchmarks import finite
from llmkd.hub.card_parts import (
    benchmark_results,
    card_data,
    license_of,
    link,
    model_title,
    paper_section,
    place,
    public,
    run_section,
    score,
    show,
    titled,
    whole_card,
)
from llmkd.hub.facts import RunFacts
from llmkd.hub.method import MethodInfo
from llmkd.hub.task_facts import METRICS, PAPER_STAGES, TaskFacts, title_of
from llmkd.hub.task_tables import score_columns

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PICTURES = (("curves.png", "training curves"), ("arms.png", "scores of the recipe's arms"))


def task_card(
    facts: RunFacts, *, repo_id: str | None, method: MethodInfo, revision: str | None = None
) -> str:
    """The card of the student in an ERNIE-Tiny run folder; what is not recorded is left out.

    `repo_id` and `revision` go into the lines that load the model; without a `repo_id` these lines
    load the folder itself.
    """
    run = TaskFacts(facts)
    sources = [source.name for part in (run.task, run.general) for source in run.sources(part)]
    head = card_data(
        facts,
        method=method,
        repo_id=repo_id,
        pipeline_tag=run.head.pipeline,
        tags=["distillation"],
        sources=dict.fromkeys(sources),
        results=_eval_results(run),
    )
    sections = [
        _what_it_is(run, method, repo_id),
        _how_to_load(run, repo_id, revision),
        titled("Scores", *task_tables.scores(run)),
        titled("Size and latency", *task_tables.sizes(run)),
        _pictures(facts),
        titled("Teacher", *task_tables.teacher(run)),
        titled("Stages", *task_tables.stages(run)),
        titled("Data", *task_tables.data(run)),
        run_section(facts),
        _not_measured(run),
        paper_section(method),
    ]
    return whole_card(head, sections)


def _eval_results(run: TaskFacts) -> list[EvalResult]:
    """Dev and benchmark scores for the `model-index`; numbers that are not finite stay out."""
    from huggingface_hub import EvalResult

    sources = run.sources(run.task)
    names = [public(run.facts, source.name) for source in sources]
    full = [name + source.tail for name, source in zip(names, sources, strict=True)]
    found = [
        EvalResult(
            task_type=run.head.pipeline,
            dataset_type=", ".join(names) or "dev",
            dataset_name=f"dev part of {', '.join(full)}" if full else "dev",
            dataset_config=sources[0].subset if len(sources) == 1 else None,
            metric_type=METRICS[key][1] if key in METRICS else key,
            metric_name=title_of(key),
            metric_value=run.own[key],
        )
        for key in score_columns(run, [run.own])
        if finite(run.own.get(key)) is not None
    ]
    return found + benchmark_results(run.facts)


def _what_it_is(run: TaskFacts, method: MethodInfo, repo_id: str | None) -> str:
    parameters = run.student.get("parameters")
    size = f" with {show(parameters)} parameters" if parameters else ""
    shape = [
        form.format(show(run.student[key]))
        for key, form in (
            ("layers", "{} layers"),
            ("hidden_size", "width {}"),
            ("heads", "{} attention heads"),
            ("intermediate_size", "feed-forward width {}"),
        )
        if run.student.get(key)
    ]
    kind = [f"`{run.architecture}`"] if run.architecture else []
    inside = ", ".join(kind + shape)
    about = [
        f"A {run.head.noun}{size}{f' ({inside})' if inside else ''}, trained with llmkd.",
        _role(run, method),
        _compressed(run),
        _retained(run),
    ]
    base = run.facts.base_model()
    about += [f"Training started from {link(run.facts, base)}."] if base else []
    return f"# {model_title(run.facts, repo_id)}\n\n" + " ".join(filter(None, about))


def _role(run: TaskFacts, method: MethodInfo) -> str:
    """What the method did in this run, told from the stages."""
    paper = f"[{method.title}]({method.url})"
    names = [str(stage.get("name")) for stage in run.stages]
    if run.is_teacher:
        return f"It is the large model that serves as teacher in a run of {paper}."
    if not names:
        return f"Method: {paper}."
    if not run.teachers:
        return f"It is a comparison run of {paper}: no stage had a teacher."
    if tuple(names) == PAPER_STAGES:
        return f"Method: {paper}, all four stages."
    return (
        f"It comes from a run of {paper} with the stages {', '.join(names)}; the published method "
        f"has {', '.join(PAPER_STAGES)}."
    )


def _compressed(run: TaskFacts) -> str:
    """From which teacher, and how much smaller it is."""
    source = run.teacher.get("source")
    if run.is_teacher or not source or (run.stages and not run.teachers):
        return ""
    larger = run.times_larger
    more = f", which has {larger:.1f} times as many parameters" if larger else ""
    return f"It is compressed from {link(run.facts, source)}{more}."


def _retained(run: TaskFacts) -> str:
    """How much of the teacher's score is left."""
    kept, metric = run.retention(run.own), run.metric
    if kept is None or metric is None:
        return ""
    return (
        f"On the dev examples its {title_of(metric)} is {score(run.own[metric])}, {kept:.1%} of "
        f"the teacher's {score(run.teacher_scores[metric])}."
    )


def _how_to_load(run: TaskFacts, repo_id: str | None, revision: str | None) -> str:
    """Lines that run as they stand, given transformers and torch."""
    head, where = run.head, place(run.facts, repo_id)
    which = f', revision="{revision}"' if revision else ""
    note = "" if repo_id else "Run it in the folder that holds this one."
    model = f"model = {head.auto}.from_pretrained({where}{which})"
    if not (run.facts.folder / "tokenizer_config.json").is_file():
        code = f"from transformers import {head.auto}\n\n{model}"
        return titled("How to load it", f"```python\n{code}\n```", note)
    longest, cut = run.task.get("max_length"), ""
    if head.pipeline == "text-classification" and isinstance(longest, int):
        cut = f", truncation=True, max_length={longest}"
    loading = (
        f"from transformers import {head.auto}, AutoTokenizer\n\n{model}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where}{which})"
    )
    asking = (
        "from transformers import pipeline\n\n"
        f'run = pipeline("{head.pipeline}", model={where}{which}{head.options}{cut})\n'
        'print(run("Put a text here."))'
    )
    short = "Or, from text to answer:"
    codes = [f"```python\n{code}\n```" for code in (loading, asking)]
    return titled("How to load it", codes[0], short, codes[1], note)


def _pictures(facts: RunFacts) -> str:
    there = [f"![{text}]({name})" for name, text in PICTURES if (facts.folder / name).is_file()]
    return titled("Pictures", *there)


def _not_measured(run: TaskFacts) -> str:
    scored = bool(score_columns(run, [run.own]))
    lines = []
    if scored:
        lines.append("Other data: the scores are those of one dev set.")
    elif run.task:
        lines.append("The task: no score on a dev set was recorded.")
    elif not run.facts.benchmarks:
        lines.append("Any task: this model was trained for none and no benchmark was run.")
    if scored and not run.is_teacher and run.retention(run.own) is None:
        lines.append("What share of the teacher's score is left: there is none to divide by.")
    lines.append(
        "Latency on other machines and with other text lengths."
        if run.latency
        else "Latency: no forward pass was timed."
    )
    if not run.others and not run.is_teacher:
        lines.append("What each stage adds: no other arm was trained beside this model.")
    if "seed" in run.facts.run:
        lines.append(f"The spread over seeds: this is one run, seed {run.facts.run['seed']}.")
    lines.append("Bias, calibration, robustness against odd or hostile text.")
    if not license_of(run.facts):
        lines.append("Licences: none is recorded for the data or for this model.")
    return "## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines)
