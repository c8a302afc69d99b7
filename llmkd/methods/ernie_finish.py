"""An arm's end: the student exported and measured beside its teacher; then the report."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from llmkd.evaluation.distill_report import print_arm_table, write_distill_report
from llmkd.evaluation.latency import compare_latency, model_size
from llmkd.files import digest, move_into, read_json, write_json
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_stage import PROJECTIONS, DistillStage
from llmkd.methods.recipe import Recipe
from llmkd.methods.run_folder import RunFolder, result_settings
from llmkd.methods.train_folder import push_folder
from llmkd.teachers.loading import load_config, load_model, whole_weights

NOT_EXPORTED = (PROJECTIONS, "run.json", "recipe.yaml", "metrics.jsonl", "eval.json")
LATENCY_LENGTH = 128  # tokens


def export(plan: Plan, name: str, recipe: Recipe, stages: list[DistillStage]) -> None:
    """The arm's folder: model and tokenizer as anybody opens them, scores, size and latency.

    The projections stay behind. A decoder that learned no task is exported as a causal LM whose
    output embeddings are its input embeddings.
    """
    folder = plan.folder / name if name else plan.folder
    run, last = RunFolder(folder, main=plan.main), stages[-1]
    key = digest([[stage.key for stage in stages], str(folder)])
    label, done = name or "export", run.finished(key)
    PartialState().wait_for_everyone()  # all have looked before anybody writes
    if done:
        plan.say(f"{label}: reused, {folder} holds this very run (key {key})")
        return
    if plan.main:
        facts = _facts(plan, name, stages, result_settings(recipe.settings))
        whole = {**recipe.public(), "output_dir": str(folder)}
        run.begin(
            key, facts, {k: v for k, v in whole.items() if k not in ("overwrite_run", "arms")}
        )
        aside = folder / ".model.part"
        shutil.rmtree(aside, ignore_errors=True)
        _bring(last, aside)
        move_into(aside, folder)
        student, teacher, latency = _measure(plan, last, folder, facts["student"])
        scores = read_json(last.folder / "eval.json") or {}
        write_json(folder / "eval.json", {**scores, "latency": latency})
        sizes = {"student": {**facts["student"], **student}}
        sizes["teacher"] = {**(facts["teacher"] or {}), **teacher}
        run.end(**sizes, **_spent(stages))
    PartialState().wait_for_everyone()


def _bring(last: DistillStage, aside: Path) -> None:
    """The last stage's files as an exported model's, in a folder beside."""
    if last.head == "none" and _is_decoder(last):
        config = load_config(str(last.folder), None, "stages")
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = True
        with whole_weights():
            kind: Any = AutoModelForCausalLM
            kind.from_pretrained(last.folder, config=config, dtype="float32").save_pretrained(aside)
    aside.mkdir(parents=True, exist_ok=True)
    for path in last.folder.iterdir():
        copied = path.is_file() and not path.name.startswith(".") and path.name not in NOT_EXPORTED
        if copied and not (aside / path.name).exists():
            shutil.copyfile(path, aside / path.name)


def _is_decoder(last: DistillStage) -> bool:
    kind = type(last.plan.teacher_config())
    masked: Any = AutoModelForMaskedLM._model_mapping
    causal: Any = AutoModelForCausalLM._model_mapping
    return kind in causal and kind not in masked


def _measure(
    plan: Plan, last: DistillStage, folder: Path, shape: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Size of the student, size of its teacher, and latency of both as the task uses them.

    Arms of one shape are measured once.
    """
    role = plan.teachers.get("finetuned") if last.spec.predicts else None
    role = role or plan.teachers.get("pretrained")
    key = digest([shape, role and role["source"]])
    if key not in plan.measured:
        plan.say(f"size and latency, {LATENCY_LENGTH} tokens, one thread")
        with whole_weights():
            student = load_model(str(folder), head=_exported_head(last))
            teacher: Any = role and load_model(
                role["source"], revision=role["revision"], head=role["head"]
            )
        vocab = plan.teacher_config().get_text_config().vocab_size
        latency = compare_latency(student, teacher, vocab, length=LATENCY_LENGTH) if teacher else {}
        plan.measured[key] = model_size(student), model_size(teacher) if teacher else {}, latency
    return plan.measured[key]


def _exported_head(last: DistillStage) -> str:
    return "causal" if last.head == "none" and _is_decoder(last) else last.head


def _facts(
    plan: Plan, name: str, stages: list[DistillStage], settings: dict[str, Any]
) -> dict[str, Any]:
    role = plan.teachers.get("finetuned") or plan.teachers.get("pretrained") or {}
    return {
        "kind": "ernie-tiny",
        "name": name or "ernie-tiny",
        **plan.facts(),
        "student": _shape(stages),
        "teacher": {k: v for k, v in role.items() if k != "scores"} or None,
        "stages": [stage.facts() for stage in stages],
        "settings": settings,
    }


def _shape(stages: list[DistillStage]) -> dict[str, Any]:
    config: Any = load_config(str(stages[-1].folder), None, "stages").get_text_config()
    wide = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")
    return {
        "source": stages[0].recipe.settings["student_name_or_path"] or f"new {config.model_type}",
        "head": stages[-1].head,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "intermediate_size": next((getattr(config, n) for n in wide if hasattr(config, n)), None),
    }


def _spent(stages: list[DistillStage]) -> dict[str, Any]:
    """What an arm cost over all its stages, shared ones counted in full."""
    facts = [stage.facts() for stage in stages]
    return {
        "tokens": sum(f["tokens"] or 0 for f in facts),
        "wall_seconds": round(sum(f["wall_seconds"] or 0.0 for f in facts), 1),
        "peak_memory_bytes": max(f["peak_memory_bytes"] or 0 for f in facts),
    }


def finish(plan: Plan) -> None:
    """Scores of all arms, report, table and, where asked for, the push of the last arm."""
    try:
        if plan.main:
            _report(plan)
            if plan.training.push_to_hub:
                name = list(plan.arms)[-1]
                folder = plan.folder / name if name else plan.folder
                push_folder(folder, plan.training, folder.name, plan.say)
    finally:
        PartialState().wait_for_everyone()  # the others must not wait for a push that was refused


def _report(plan: Plan) -> None:
    folders = {name: plan.folder / name for name in plan.arms if name}
    if folders:
        scores = {n: (read_json(p / "eval.json") or {}).get("task") for n, p in folders.items()}
        teacher = plan.teachers.get("finetuned", {}).get("scores")
        old = read_json(plan.folder / "eval.json") or {}
        write_json(plan.folder / "eval.json", {**old, "arms": scores, "teacher": teacher})
        facts = [read_json(p / "run.json") for p in folders.values()]
        plan.run.end(tokens=sum(f["tokens"] for f in facts))
    page = write_distill_report(plan.folder)
    print_arm_table(plan.folder)
    plan.say(f"report: {os.path.relpath(page)}")
