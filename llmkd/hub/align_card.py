"""The card of an iREPO run: a language model aligned to annotators, or an adapter for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkd.evaluation.align_run import (
    START,
    AlignRun,
    Iterate,
    annotators_of,
    mean_of,
    read_align_run,
    show_kl,
    show_share,
    show_win,
)
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
    titled,
    whole_card,
)
from llmkd.hub.facts import RunFacts
from llmkd.hub.method import MethodInfo
from llmkd.hub.secrets import environment_tokens, redact

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PICTURES = (
    ("win_kl.png", "win rate against the start as a function of KL to the initial policy"),
    ("rewards.png", "scores of held-out responses, start and last iterate"),
    ("lengths.png", "lengths of held-out responses, start and last iterate"),
)
SETTINGS = (
    ("loss", "loss"),
    ("beta", "β"),
    ("reference", "reference of the regression"),
    ("length_normalize", "log-probabilities divided by length"),
    ("iterations", "iterations"),
    ("num_responses", "responses a prompt"),
    ("pairs", "pairs"),
    ("temperature", "sampling temperature"),
    ("top_p", "sampling top-p"),
    ("max_new_tokens", "tokens a response, at most"),
    ("combine", "annotators combined by"),
    ("flip_rate", "flip rate taken out of the annotators' answers"),
    ("logit_temperature", "temperature of the preference logits"),
    ("max_logit", "preference logits clamped to (nats)"),
    ("learning_rate", "peak learning rate"),
    ("num_train_epochs", "passes over the pairs of an iteration"),
    ("per_device_train_batch_size", "pairs a device and step"),
    ("lora_r", "LoRA rank"),
)
DATA = (
    ("source", "source"),
    ("fingerprint", "fingerprint"),
    ("prompts", "training prompts"),
    ("held_out_prompts", "held-out prompts"),
)
NUMBERS: tuple[tuple[str, Callable[[Iterate], str]], ...] = (
    ("wins against the start, 95 % interval", lambda one: show_win(one, "start")),
    ("wins against the policy before", lambda one: show_win(one, "previous")),
    ("KL to the initial policy (nats a response)", lambda one: show_kl(one, "initial")),
    ("KL to the policy before (nats a response)", lambda one: show_kl(one, "previous")),
    ("mean score", lambda one: score(one.value("held_out", "reward", "mean"))),
    ("mean length (tokens)", lambda one: score(mean_of(one.values("held_out", "lengths")))),
    ("truncated", lambda one: show_share(one.value("held_out", "truncated"))),
    ("distinct-1", lambda one: score(one.value("held_out", "distinct_1"))),
    ("distinct-2", lambda one: score(one.value("held_out", "distinct_2"))),
)


def align_card(
    facts: RunFacts, *, repo_id: str | None, method: MethodInfo, revision: str | None = None
) -> str:
    """The card of the last iterate in an iREPO run folder; what is not recorded is left out.

    `repo_id` and `revision` go into the lines that load the model; without a `repo_id` these lines
    load the folder itself.
    """
    if not facts.section("student"):  # where the shared parts look for the base model
        facts = replace(facts, run={**facts.run, "student": facts.section("policy")})
    run = read_align_run(facts.folder)
    sources = _sources(facts)
    head = card_data(
        facts,
        method=method,
        repo_id=repo_id,
        pipeline_tag="text-generation",
        tags=["alignment", "preference-optimization"],
        sources=sources,
        results=_eval_results(facts, run, sources),
    )
    data = {**facts.section("data"), "source": _data_source(facts, sources)}
    settings = {**facts.recipe, "iterations": run.planned, **facts.section("settings")}
    if not facts.adapter:
        settings.pop("lora_r", None)
    sections = [
        _what_it_is(facts, run, method, repo_id),
        _how_to_use(facts, repo_id, revision),
        _numbers(facts, run),
        _pictures(facts),
        titled("Annotators", _annotators(facts)),
        titled("Prompts", pairs(DATA, data)),
        titled("Settings", pairs(SETTINGS, settings)),
        run_section(facts),
        _not_measured(facts, run),
        paper_section(method),
    ]
    return whole_card(head, sections)


def _sources(facts: RunFacts) -> list[str]:
    """Where prompts or pairs came from: a Hub id, a path or a word each."""
    keys = ("prompt_dataset", "preference_dataset", "held_out_dataset")
    named = [facts.setting(key) for key in keys]
    if not any(named[:2]):
        named.append(facts.section("data").get("source"))
    return list(dict.fromkeys(str(source) for source in named if source))


def _data_source(facts: RunFacts, sources: list[str]) -> str:
    """Run.json's line on the source with its ids as links; paths without their folders."""
    line = str(facts.section("data").get("source") or ", ".join(sources))
    return linked(facts, line, [*sources, line] if line.startswith(("/", "~", ".")) else sources)


def _eval_results(facts: RunFacts, run: AlignRun, sources: list[str]) -> list[EvalResult]:
    """Win rate and KL of the last iterate and benchmark scores for the `model-index`."""
    from huggingface_hub import EvalResult

    source = ", ".join(public(facts, name) for name in sources) or "held-out"
    wanted = (
        ("win_rate_start", "soft", "win_rate", "win rate against the start (judged, mean)"),
        ("kl_initial", "mean", "kl", "KL to the initial policy (nats a response)"),
    )
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=f"held-out prompts of {source}",
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )
        for key, part, metric, title in wanted
        if run.last and (value := run.last.value("held_out", key, part)) is not None
    ]
    return found + benchmark_results(facts)


def _what_it_is(facts: RunFacts, run: AlignRun, method: MethodInfo, repo_id: str | None) -> str:
    kind = next(iter(facts.config.get("architectures") or []), None)
    kind = f" (`{kind}`)" if kind else ""
    noun = "PEFT adapter of a causal language model" if facts.adapter else "causal language model"
    source = facts.base_model() or facts.section("policy").get("source")
    made = f" It started from {link(facts, source)}." if source else ""
    if facts.section("policy").get("source") == START:
        made = " It started from a model pretrained in the same run."
    return (
        f"# {model_title(facts, repo_id)}\n\n"
        f"A {noun}{kind}, aligned with llmkd. {_role(facts, run, method)}{made}"
    )


def _role(facts: RunFacts, run: AlignRun, method: MethodInfo) -> str:
    """What the loop did, and whose objective it was."""
    paper, loss = f"[{method.title}]({method.url})", facts.setting("loss")
    rounds = run.last.number if run.last else run.planned
    times = f" after {rounds} iteration{'s' if rounds != 1 else ''}" if rounds else ""
    if facts.setting("preference_dataset"):
        said = f"Method: {paper}, on a file of preferences, without sampling."
    else:
        said = (
            f"Method: {paper}; this is the policy{times} of sampling responses, having them "
            "compared and regressing on the logits of the preferences."
        )
    if loss not in (None, "irepo"):
        said += f" The loss is `{loss}` instead of the paper's squared error."
    return said + " Formulas and defaults are llmkd's own: the paper's code was not available."


def _how_to_use(facts: RunFacts, repo_id: str | None, revision: str | None) -> str:
    """Lines that run as they stand, given transformers and torch (and peft for an adapter)."""
    where = place(facts, repo_id)
    which = f', revision="{revision}"' if revision else ""
    auto = "AutoPeftModelForCausalLM" if facts.adapter else "AutoModelForCausalLM"
    own = (facts.folder / "tokenizer_config.json").is_file()
    words = f"{where}{which}" if own else repr(facts.base_model()).replace("'", '"')
    has_tokenizer = own or bool(facts.adapter and facts.base_model())
    model = f"model = {auto}.from_pretrained({where}{which})"
    if facts.adapter:
        code = ["from peft import AutoPeftModelForCausalLM"]
        code += ["from transformers import AutoTokenizer"] if has_tokenizer else []
    else:
        code = [f"from transformers import {auto}" + (", AutoTokenizer" if has_tokenizer else "")]
    code += ["", model]
    if has_tokenizer:
        code += [f"tokenizer = AutoTokenizer.from_pretrained({words})", *_ask(facts)]
    notes = [] if repo_id else ["Run it in the folder that holds this one."]
    if facts.adapter and not facts.base_model():
        base = public(facts, str(facts.adapter.get("base_model_name_or_path")))
        notes.append(
            f"The base model `{base}` is not on the Hub: adapter_config.json says where it must be."
        )
    joined = "\n".join(code)
    return titled("How to use it", f"```python\n{joined}\n```", *notes)


def _ask(facts: RunFacts) -> list[str]:
    """Prompt, answer and print, with the chat template the policy was trained on if it has one."""
    config = facts.folder / "tokenizer_config.json"
    chat = (facts.folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )
    if chat:
        system = facts.setting("system_prompt")
        turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": "Why is the sky blue?"})
        asking = [
            f"messages = {turns!r}",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        asking = ['inputs = tokenizer("Put a text here", return_tensors="pt")']
    most = facts.setting("max_new_tokens")
    most = most if isinstance(most, int) else 128
    return [
        *asking,
        f"output = model.generate(**inputs, max_new_tokens={most}, do_sample=True)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _numbers(facts: RunFacts, run: AlignRun) -> str:
    """The last iterate beside the start on held-out prompts, then benchmarks."""
    parts = []
    shown = [one for one in (run.start, run.last) if one is not None]
    if run.last:
        rows = [[title, *(cell(one) for one in shown)] for title, cell in NUMBERS]
        rows = [row for row in rows if row[-1] != "-"]
        heads = ["", *("start" if one.number == 0 else "**this model**" for one in shown)]
        count = run.last.value("held_out", "responses")
        size = f" ({show(int(count))} responses)" if count else ""
        parts += [f"On held-out prompts{size}:", table(heads, rows), _how_judged(facts)]
        if run.warped:
            parts.append(
                f"Sampling departed from the policy itself ({run.warped}), so that what stands "
                "under KL is a mean log-ratio."
            )
    if facts.benchmarks:
        parts += ["Benchmarks (`lm_eval`, ± standard error):", benchmark_table(facts)]
    return titled("Numbers", *parts)


def _how_judged(facts: RunFacts) -> str:
    judged = "The win rate is the mean probability that annotators prefer this model's response; "
    if facts.setting("held_out_annotators"):
        return judged + "they are others than those it was trained on."
    return judged + "they are those it was trained to please."


def _pictures(facts: RunFacts) -> str:
    there = [f"![{text}]({name})" for name, text in PICTURES if (facts.folder / name).is_file()]
    return titled("Pictures", *there)


def _annotators(facts: RunFacts) -> str:
    """Type and models of each; a path on somebody's machine is cut to its last part."""
    rows = []
    for one in annotators_of(facts.run):
        models = one.get("models") or one.get("model") or one.get("function") or one.get("file")
        models = models if isinstance(models, list) else [models]
        shown = ", ".join(link(facts, what) for what in models if what)
        rows.append([_safe(one.get("type")), shown or "-", _safe(one.get("name"))])
    return table(["type", "made of", "name"], rows) if rows else ""


def _safe(value: object) -> str:
    return redact(str(value), *environment_tokens()) if value else "-"


def _not_measured(facts: RunFacts, run: AlignRun) -> str:
    lines = []
    if run.last is None or run.last.value("held_out", "win_rate_start", "soft") is None:
        lines.append("Win rate: responses were not compared with those of the start.")
    elif not facts.setting("held_out_annotators"):
        lines.append("What people would prefer: the judges are the annotators of the training.")
    if not facts.benchmarks:
        lines.append("What alignment cost on other tasks: no benchmark was run.")
    lines.append(
        "Whether another method does as well at the same KL: no other was trained beside it."
    )
    seed = finite(facts.run.get("seed"))
    if seed is not None:
        lines.append(f"The spread over seeds: this is one run, seed {show(seed)}.")
    lines.append("Safety, truthfulness, bias, behaviour over several turns.")
    if not license_of(facts):
        lines.append("Licences: none is recorded for the prompts, the annotators or this model.")
    return "## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines)
