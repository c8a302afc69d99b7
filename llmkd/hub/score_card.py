"""The card of a DeQA-Score run: a model that rates texts or images by naming a level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkd.hub.benchmarks import finite, mapping
from llmkd.hub.card_parts import (
    card_data,
    license_of,
    link,
    model_title,
    pairs,
    paper_section,
    place,
    public,
    run_section,
    show,
    table,
    titled,
    whole_card,
)
from llmkd.hub.facts import RunFacts
from llmkd.hub.method import MethodInfo

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MEASURES = (
    ("plcc", "Pearson correlation (PLCC) with the mean rating"),
    ("srcc", "Spearman correlation (SRCC) with the mean rating"),
    ("mae", "mean absolute error (in levels)"),
    ("std_plcc", "Pearson correlation of predicted and human spread"),
    ("kl", "KL of the level distribution from people's (nats)"),
    ("wasserstein", "Wasserstein distance to people's distribution (in levels)"),
)
INDEXED = ("plcc", "srcc", "mae")
SETTINGS = (
    ("label", "level targets"),
    ("fidelity_weight", "weight of the loss on pairs"),
    ("level_weight", "weight of KL and CE"),
    ("std_mode", "spread under the predicted gap of a pair"),
    ("kl_over", "softmax of the KL"),
    ("learning_rate", "peak learning rate"),
    ("batch_rows", "rows a step"),
    ("num_train_epochs", "passes over the rows"),
    ("raters_kept", "ratings kept of a training row"),
    ("lora_r", "LoRA rank"),
)
DATA = (
    ("source", "source"),
    ("fingerprint", "fingerprint"),
    ("train_rows", "rows trained on"),
    ("validation_rows", "validation rows"),
    ("eval_rows", "held-out rows"),
)


def score_card(
    facts: RunFacts, *, repo_id: str | None, method: MethodInfo, revision: str | None = None
) -> str:
    """The card of a scorer; what the folder does not record is left out.

    `repo_id` and `revision` go into the lines that load the model; without a `repo_id` these lines
    load the folder itself.
    """
    images = bool(facts.section("student").get("images"))
    sources = [str(name) for name in (facts.setting("score_dataset"),) if name]
    head = card_data(
        facts,
        method=method,
        repo_id=repo_id,
        pipeline_tag="image-text-to-text" if images else "text-generation",
        tags=["scoring", "soft-labels"],
        sources=sources,
        results=_eval_results(facts, sources),
    )
    settings = {**facts.section("settings"), **facts.section("schedule")}
    if not facts.section("schedule").get("use_peft"):
        settings.pop("lora_r", None)
    data = {**facts.section("data")}
    data["source"] = ", ".join(link(facts, name, "datasets/") for name in sources)
    sections = [
        _what_it_is(facts, method, repo_id, images),
        _how_to_use(facts, repo_id, revision, images),
        _agreement(facts),
        titled("Levels and prompt", table(["", ""], _levels(facts))),
        titled("Rated rows", pairs(DATA, data), _scales(facts)),
        titled(
            "Training", pairs((("label", "level targets"),), facts.run), pairs(SETTINGS, settings)
        ),
        run_section(facts),
        _not_measured(facts),
        paper_section(method),
    ]
    return whole_card(head, sections)


def _measures(facts: RunFacts) -> dict[str, Any]:
    """The measures of held-out rows, each {value, low, high, words}."""
    return mapping(mapping(facts.scores.get("held_out")).get("measures"))


def _value(facts: RunFacts, name: str) -> float | None:
    return finite(mapping(_measures(facts).get(name)).get("value"))


def _eval_results(facts: RunFacts, sources: list[str]) -> list[EvalResult]:
    """Agreement with people for the `model-index`."""
    from huggingface_hub import EvalResult

    source = ", ".join(public(facts, name) for name in sources) or "held-out"
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=source,
            dataset_name=f"held-out rows of {source}",
            metric_type=name,
            metric_name=title,
            metric_value=value,
        )
        for name, title in MEASURES
        if name in INDEXED and (value := _value(facts, name)) is not None
    ]


def _what_it_is(facts: RunFacts, method: MethodInfo, repo_id: str | None, images: bool) -> str:
    kind = next(iter(facts.config.get("architectures") or []), None)
    kind = f" (`{kind}`)" if kind else ""
    noun = "PEFT adapter of a scorer" if facts.adapter else "scorer"
    what = "images" if images else "texts"
    source = facts.base_model() or facts.section("student").get("source")
    made = f" It started from {link(facts, source)}." if source else ""
    return (
        f"# {model_title(facts, repo_id)}\n\n"
        f"A {noun} of {what}{kind}, trained with llmkd on distributions of people's ratings. "
        f"Method: [{method.title}]({method.url}). It answers with a level, and the probabilities "
        f"of the levels give a score and its spread.{made}"
    )


def _how_to_use(facts: RunFacts, repo_id: str | None, revision: str | None, images: bool) -> str:
    """Lines that run as they stand, given llmkd."""
    which = f', revision="{revision}"' if revision else ""
    asked = 'Path("picture.jpg")' if images else '"Put a text here"'
    code = ["from pathlib import Path", ""] if images else []
    code += [
        "from llmkd.models.scorer import Scorer",
        "",
        f"scorer = Scorer({place(facts, repo_id)}{which})",
        f'print(scorer({asked}))  # {{"score": ..., "std": ..., "level": ..., "probs": ...}}',
    ]
    template = facts.setting("text_template")
    notes = [] if repo_id else ["Run it in the folder that holds this one."]
    notes.append(f"Or `llmkd score {repo_id or facts.folder.name} rows.jsonl` for a table.")
    if template:
        notes.append(f"Texts are read through the template `{show(template)}`.")
    joined = "\n".join(code)
    return titled("How to use it", f"```python\n{joined}\n```", *notes)


def _agreement(facts: RunFacts) -> str:
    """Agreement with people on held-out rows, with bootstrap intervals."""
    rows = []
    for name, title in MEASURES:
        if (value := _value(facts, name)) is None:
            continue
        found = mapping(_measures(facts).get(name))
        low, high = finite(found.get("low")), finite(found.get("high"))
        between = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        rows.append([title, f"{value:.3f}", between])
    if not rows:
        return ""
    count = mapping(facts.scores.get("held_out")).get("rows")
    size = f" ({show(count)} rows)" if count else ""
    heads = ["", "value", "95 % interval over rows"]
    return titled("Agreement with people", f"On held-out rows{size}:", table(heads, rows))


def _levels(facts: RunFacts) -> list[list[str]]:
    levels = facts.section("levels")
    words, values = levels.get("words") or [], levels.get("values") or []
    said = ", ".join(f"{word} ({value:g})" for word, value in zip(words, values, strict=False))
    questions = facts.setting("questions") or []
    rows = [["levels", said], ["the answer begins", f"`{levels.get('prefix', '')}`"]]
    return [*rows, ["asked", str(questions[0])]] if questions else rows


def _scales(facts: RunFacts) -> str:
    """The raters' scales, which the lowest and the highest level stand for."""
    scales = mapping(facts.section("data").get("scales"))
    said = [
        f"{show(ends[0])} to {show(ends[1])}" + ("" if name == "None" else f" ({name})")
        for name, ends in scales.items()
    ]
    return f"Raters' scale: {', '.join(said)}." if said else ""


def _not_measured(facts: RunFacts) -> str:
    lines = ["Inputs unlike the held-out rows: other sources, languages, lengths."]
    if _value(facts, "std_plcc") is None:
        lines.append("Whether the predicted spread is people's: their spread is not known.")
    seed = finite(facts.run.get("seed"))
    if seed is not None:
        lines.append(f"The spread over seeds: this is one run, seed {show(seed)}.")
    lines.append("Whether groups of people would rate otherwise; bias against groups of authors.")
    if not license_of(facts):
        lines.append("Licences: none is recorded for the rated rows or this model.")
    return "## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines)
