"""The card of a DeQA-Score run: a model that rates texts or images by naming a level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkd.data.score_config import HOLE
from llmkd.hub.benchmarks import finite, mapping
from llmkd.hub.card_parts import (
    benchmark_results,
    benchmark_table,
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
    ("rmse", "root mean square error (in levels)"),
    ("std_plcc", "Pearson correlation of predicted and human spread"),
    ("kl", "KL of the level distribution from people's (nats)"),
    ("wasserstein", "Wasserstein distance to people's distribution (in levels)"),
)
INDEXED = ("plcc", "srcc", "mae")
BESIDE = (
    ("plcc", "PLCC"),
    ("srcc", "SRCC"),
    ("mae", "MAE"),
    ("std_plcc", "std PLCC"),
    ("kl", "KL"),
)
PICTURES = (
    ("mean.png", "predicted against human means, a point a held-out row"),
    ("std.png", "predicted against human spreads, a point a held-out row"),
    ("reliability.png", "human mean in bins of the predicted mean"),
)
SETTINGS = (
    ("label", "level targets"),
    ("fidelity_weight", "weight of the loss on pairs"),
    ("level_weight", "weight of KL and CE"),
    ("in_level_weight", "weight of the in-level loss"),
    ("pair_loss", "loss on pairs"),
    ("std_mode", "spread under the predicted gap of a pair"),
    ("kl_over", "softmax of the KL"),
    ("learning_rate", "peak learning rate"),
    ("batch_rows", "rows a step"),
    ("steps", "steps"),
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
    sources = [str(name) for name in (facts.setting("score_dataset"),) if name]
    sees = bool(facts.section("student").get("images"))
    head = card_data(
        facts,
        method=method,
        repo_id=repo_id,
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=["scoring", "soft-labels"],
        sources=sources,
        results=[*_eval_results(facts, sources), *benchmark_results(facts)],
    )
    settings = {**facts.section("settings"), **facts.section("schedule")}
    settings["label"] = facts.run.get("label")  # with its options
    settings["steps"] = facts.run.get("steps")
    if (finite(settings.get("max_steps")) or -1) > 0:  # which then decides
        settings.pop("num_train_epochs", None)
    if not settings.get("fidelity_weight"):
        settings = {k: v for k, v in settings.items() if k not in ("pair_loss", "std_mode")}
    if not facts.section("schedule").get("use_peft"):
        settings.pop("lora_r", None)
    data = {**facts.section("data")}
    data["source"] = ", ".join(link(facts, name, "datasets/") for name in sources)
    sections = [
        _what_it_is(facts, method, repo_id),
        _how_to_use(facts, repo_id, revision),
        _agreement(facts),
        titled("Benchmarks", benchmark_table(facts) if facts.benchmarks else ""),
        titled("Levels and prompt", table(["", ""], _levels(facts))),
        titled("Rated rows", pairs(DATA, data), _scales(facts), _counts(facts)),
        titled("Training", pairs(SETTINGS, settings)),
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


def _inputs(facts: RunFacts) -> str:
    """What one row held: `images`, `messages` or `text`."""
    if facts.setting("image_column"):
        return "images"
    return "messages" if facts.setting("messages_column") else "text"


def _what_it_is(facts: RunFacts, method: MethodInfo, repo_id: str | None) -> str:
    kind = next(iter(facts.config.get("architectures") or []), None)
    kind = f" (`{kind}`)" if kind else ""
    noun = "PEFT adapter of a scorer" if facts.adapter else "scorer"
    what = {"images": "images", "messages": "chats", "text": "texts"}[_inputs(facts)]
    source = facts.base_model() or facts.section("student").get("source")
    made = f" It started from {link(facts, source)}." if source else ""
    return (
        f"# {model_title(facts, repo_id)}\n\n"
        f"A {noun} of {what}{kind}, trained with llmkd on distributions of people's ratings. "
        f"Method: [{method.title}]({method.url}). It answers with a level, and the probabilities "
        f"of the levels give a score and its spread.{made}"
    )


def _asked(facts: RunFacts) -> str:
    """An input as the rows of the training had it, as a Python literal."""
    kind, template = _inputs(facts), facts.setting("text_template")
    holes = set(HOLE.findall(template or ""))
    pair = facts.setting("text_pair_column") and (not template or "text_pair" in holes)
    if kind == "images":
        if facts.setting("text_column") or template:
            return '{"images": ["picture.jpg"], "text": "Put its text here"}'
        return 'Path("picture.jpg")'
    if kind == "messages":
        turns = (("user", "Put a question here"), ("assistant", "and its answer here"))
        said = (f'{{"role": "{role}", "content": "{words}"}}' for role, words in turns)
        return f"[{', '.join(said)}]"
    if holes - {"text", "text_pair"}:  # other columns, which only a row can bring
        return '{"text": "Put a text here, as the template makes it"}'
    if pair or "text_pair" in holes:
        return '("Put a text here", "and its pair here")'
    return '"Put a text here"'


def _how_to_use(facts: RunFacts, repo_id: str | None, revision: str | None) -> str:
    """Lines that run as they stand, given llmkd."""
    which = f', revision="{revision}"' if revision else ""
    asked, template = _asked(facts), facts.setting("text_template")
    code = ["from pathlib import Path", ""] if asked.startswith("Path(") else []
    code += [
        "from llmkd.models.scorer import Scorer",
        "",
        f"scorer = Scorer({place(facts, repo_id)}{which})",
        f"print(scorer({asked}))",
        '# {"score": ..., "std": ..., "level": ..., "probs": {level: ...}}',
    ]
    named = f"{repo_id or facts.folder.name} rows.jsonl" + (
        f" --revision {revision}" if revision else ""
    )
    notes = [] if repo_id else ["Run it in the folder that holds this one."]
    notes.append(f"`score` and `std` are {_span(facts)}. Or `llmkd score {named}` for a table.")
    if template:
        notes.append(f"Texts are read through the template `{show(template)}`.")
    joined = "\n".join(code)
    return titled("How to use it", f"```python\n{joined}\n```", *notes)


def _span(facts: RunFacts) -> str:
    """The unit of a score."""
    values = [one for one in facts.section("levels").get("values") or [] if finite(one) is not None]
    return f"in levels, {min(values):g} to {max(values):g}" if values else "in levels"


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
    found = table(heads, rows)
    pictures = (
        f"![{words}]({name})" for name, words in PICTURES if (facts.folder / name).is_file()
    )
    parts = (f"On held-out rows{size}:", found, _beside(facts), *pictures)
    return titled("Agreement with people", *parts)


def _beside(facts: RunFacts) -> str:
    """The other arms of the recipe on the same rows, where there are any."""
    if not facts.others:
        return ""
    models = {f"**{facts.name}** (this model)": _measures(facts), **facts.others}
    rows = []
    for name, measures in models.items():
        values = (finite(mapping(measures.get(key)).get("value")) for key, _ in BESIDE)
        rows.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    words = "Beside the other arms of its recipe, one seed each, on the same rows:"
    return f"{words}\n\n{table(['', *(title for _, title in BESIDE)], rows)}"


def _levels(facts: RunFacts) -> list[list[str]]:
    levels = facts.section("levels")
    words, values = levels.get("words") or [], levels.get("values") or []
    said = ", ".join(f"{word} ({value:g})" for word, value in zip(words, values, strict=False))
    rows = [["levels", said], ["the answer begins", f"`{levels.get('prefix', '')}`"]]
    system, questions = facts.setting("system_prompt"), facts.setting("questions") or []
    if system:
        rows.append(["system prompt", str(system)])
    if questions:
        drawn = f" ({len(questions)} wordings in training, this one for scoring)"
        rows.append(["asked", f"{questions[0]}{drawn if len(questions) > 1 else ''}"])
    return rows


def _scales(facts: RunFacts) -> str:
    """The raters' scales, which the lowest and the highest level stand for."""
    scales = mapping(facts.section("data").get("scales"))
    spans = {name: f"{show(ends[0])} to {show(ends[1])}" for name, ends in scales.items()}
    one = len(set(spans.values())) == 1
    said = [
        span if one or name == "None" else f"{span} ({name})"
        for name, span in ([*spans.items()][:1] if one else spans.items())
    ]
    return f"Raters' scale: {', '.join(said)}." if said else ""


def _counts(facts: RunFacts) -> str:
    """What was peculiar about the rows, by the reader's own names."""
    found = mapping(facts.section("data").get("counts"))
    said = [f"{name} {show(count)}" for name, count in found.items() if count]
    return f"Counted: {', '.join(said)}." if said else ""


def _not_measured(facts: RunFacts) -> str:
    lines = ["Inputs unlike the held-out rows: other sources, languages, lengths."]
    lines.append("Another wording of the question, or other level words than those above.")
    if _value(facts, "std_plcc") is None:
        lines.append("Whether the predicted spread is people's: their spread is not known.")
    seed = finite(facts.run.get("seed"))
    if seed is not None:
        lines.append(f"The spread over seeds: this is one run, seed {show(seed)}.")
    lines.append("Whether groups of people would rate otherwise; bias against groups of authors.")
    if not license_of(facts):
        lines.append("Licences: none is recorded for the rated rows or this model.")
    return "## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines)
