"""`llmkd score MODEL DATA`: a table of scores and plots; of rated rows, agreement with people."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, disable_progress_bars

from llmkd.data.score_config import ScoreDataConfig, ScoreInputConfig
from llmkd.data.score_rows import load_rows_to_score
from llmkd.errors import RecipeError, RunFolderError
from llmkd.evaluation.deqa_report import measures_table, show
from llmkd.evaluation.page import facts_table, figure, page, text, write_picture
from llmkd.evaluation.score_metrics import Scored
from llmkd.evaluation.score_plots import draw_histogram, draw_reliability, draw_scatter
from llmkd.files import write_json, write_text
from llmkd.methods.deqa_finish import agreement, json_lines, prediction_rows, shared_table
from llmkd.methods.run_folder import check_writable
from llmkd.models.build import DTYPES
from llmkd.models.scorer import SavedLevels, Scorer, ScoreTable
from llmkd.models.scorer_files import LEVELS_FILE, load_levels

ABOUT = (
    "Rate every row of a file or Hub dataset with a trained scorer (a folder of `llmkd deqa`). "
    "Writes scores.parquet, scores.jsonl and report.html; with a column of ratings also eval.json."
)
# Keys of rated rows that `llmkd score` takes, under the names recipes have for them.
DATA_KEYS = (
    "text_column text_pair_column text_template messages_column image_column image_root "
    "ratings_column mean_column std_column n_column probs_column logits_column group_column "
    "score_low score_high score_scales score_dataset_config score_dataset_revision"
).split()
MADE = ("eval.json", "mean.png", "std.png", "reliability.png")
SHOWN = ("plcc", "srcc", "mae", "rmse", "std_plcc", "kl")


def main(words: Sequence[str]) -> Path:
    """Score; returns the folder with table and report. Ranks of a launcher share the rows, and the
    main one writes.
    """
    args = parser().parse_args(list(words))
    state = _ranks(args.device)
    if not state.is_main_process:
        disable_progress_bars()
    folder = Path(args.output_dir).expanduser()
    check_writable("output_dir", folder)
    if (folder / "run.json").exists():
        problem = "is a run's folder, whose eval.json and report would be replaced"
        raise RunFolderError.of("output_dir", str(folder), problem, "choose another --output_dir")
    saved = load_levels(args.model, args.revision)
    if saved is None:
        ways = ("a folder that `llmkd deqa` wrote",)
        raise RecipeError.of("MODEL", args.model, f"has no {LEVELS_FILE}: it is no scorer", *ways)
    config = config_of(args, saved)
    say = print if state.is_main_process else _nothing
    with state.main_process_first():
        rows, counts = load_rows_to_score(config, say, values=saved.levels.values_L)
    scorer = Scorer(
        args.model,
        max_length=args.max_length,
        device=state.device if state.num_processes > 1 else args.device,
        dtype=args.dtype,
        revision=args.revision,
        batch_size=args.batch_size,
        key="MODEL",
    )
    table = shared_table(scorer, rows, state.process_index, state.num_processes)
    try:
        if state.is_main_process:
            write(folder, args, config, rows, table, saved, counts)
    finally:
        state.wait_for_everyone()
    return folder


def _ranks(device: str | None) -> PartialState:
    """The processes of a launcher, each with its own device; or this one alone."""
    # Left to itself PartialState takes ranks without a GPU for so many processes alone.
    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu or not torch.accelerator.is_available())


def _nothing(text: str) -> None:
    """What other ranks say."""


def parser() -> argparse.ArgumentParser:
    """The command line; columns and scale have the names and words of recipes."""
    found = argparse.ArgumentParser("llmkd score", description=ABOUT, allow_abbrev=False)
    found.add_argument("model", metavar="MODEL", help="folder or Hub id of a scorer")
    found.add_argument("data", metavar="DATA", help="jsonl, json, csv, parquet, folder or Hub id")
    found.add_argument("--output_dir", default="scores", help="where table and report go (scores)")
    found.add_argument("--split", default="train", help="split of a Hub dataset (train)")
    found.add_argument("--batch_size", type=int, default=16, help="rows at once (16)")
    found.add_argument("--max_length", type=int, help="tokens of a prompt; longer texts are cut")
    found.add_argument("--dtype", default="auto", choices=DTYPES, help="weights (as saved)")
    found.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")
    found.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    found.add_argument("--draws", type=int, default=1000, help="resamples of an interval (1000)")
    found.add_argument(
        "--k", type=float, default=0.0, help="add a column reward = mean - k std for k > 0"
    )
    known = {one.name: one for one in fields(ScoreDataConfig)}
    for key in DATA_KEYS:
        number = float if key in ("score_low", "score_high") else str
        found.add_argument(f"--{key}", type=number, help=str(known[key].metadata["help"]))
    return found


def config_of(args: argparse.Namespace, saved: SavedLevels) -> ScoreInputConfig:
    """What to read: inputs as the scorer was trained on them unless the flags say otherwise, and
    the scale of its training rows.
    """
    given = {key: value for key in DATA_KEYS if (value := getattr(args, key)) is not None}
    inputs = ("text_column", "text_pair_column", "text_template", "messages_column", "image_column")
    named = {key for key in inputs if key in given}
    if saved.inputs == "messages" and not named:
        given["messages_column"] = "messages"
    elif saved.inputs == "images" and "image_column" not in named:
        given["image_column"] = "image"
    if saved.template is not None and not named & {"text_template", "messages_column"}:
        given["text_template"] = saved.template
        if "text_column" not in given and "{text}" in saved.template:
            given["text_column"] = "text"
    rated = {"ratings_column", "mean_column"} & {*given}
    scaled = {"score_low", "score_high", "score_scales"} & {*given}
    if rated and not scaled:
        if saved.scale is None:
            problem = f"{args.model} was trained on several scales, or on none"
            way = "--score_low -4 --score_high 4: the scale that the raters saw"
            raise RecipeError.of("score_low, score_high", None, problem, way)
        given["score_low"], given["score_high"] = saved.scale
    return ScoreInputConfig(score_dataset=args.data, score_train_split=args.split, **given)


def write(
    folder: Path,
    args: argparse.Namespace,
    config: ScoreInputConfig,
    rows: list[dict[str, Any]],
    table: ScoreTable,
    saved: SavedLevels,
    counts: dict[str, int],
) -> Path:
    """Table, report and, of rated rows, `eval.json`; says on the terminal what was found."""
    for name in MADE:  # of an earlier call, perhaps with ratings
        (folder / name).unlink(missing_ok=True)
    report, human = None, None
    if config.labelled:
        grouped = config.group_column is not None
        report, human = agreement(rows, table, args.draws, group=grouped)
    lines = prediction_rows(rows, table, human, None)
    if saved.scale is not None:
        for line, score in zip(lines, table.on_scale(*saved.scale)[0].tolist(), strict=True):
            line["score"] = score
    if args.k:
        for line, reward in zip(lines, table.reward_N(args.k).tolist(), strict=True):
            line["reward"] = reward
    write_text(folder / "scores.jsonl", json_lines(lines))
    aside = folder / f".scores.parquet.{os.getpid()}.part"
    Dataset.from_list(lines).to_parquet(str(aside))
    os.replace(aside, folder / "scores.parquet")
    found = None if report is None else report.as_dict()
    if found is not None:
        write_json(folder / "eval.json", {"model": args.model, "data": config.source, **found})
    facts = [
        ("model", args.model),
        ("rows", f"{config.source}: {len(rows)}"),
        ("levels", ", ".join(f"{w} = {v:g}" for w, v in _words(table))),
        ("scale of `score`", saved.scale and f"{saved.scale[0]:g} to {saved.scale[1]:g}"),
        ("cut in the middle", table.cut),
        ("counted", ", ".join(f"{k} {v}" for k, v in counts.items()) or "-"),
    ]
    shown = _pictures(folder, table, human, found)
    body = f"<h1>Scores of {text(config.source)}</h1>{facts_table(facts)}"
    if found is not None:
        groups = {name: one["measures"] for name, one in found["groups"].items()}
        body += f"<h2>Against people</h2>{measures_table({'all': found['measures'], **groups})}"
    write_text(folder / "report.html", page("llmkd score", f"{body}<h2>Pictures</h2>{shown}"))
    mean, std = float(table.mean_N.mean()), float(table.std_N.mean())
    print(f"{len(rows)} rows scored: mean {mean:.3f}, mean std {std:.3f}; {table.cut} texts cut")
    if found is not None:
        print(", ".join(f"{name} {show(found['measures'].get(name))}" for name in SHOWN))
    print(folder / "scores.parquet")
    return folder


def _words(table: ScoreTable) -> list[tuple[str, float]]:
    return list(zip(table.levels.words, table.levels.values_L, strict=True))


def _pictures(
    folder: Path, table: ScoreTable, human: Scored | None, found: dict[str, Any] | None
) -> str:
    drawn: dict[str, tuple[bytes, str]] = {}
    if human is None or found is None:
        drawn["mean"] = draw_histogram(table.mean_N.tolist(), "mean"), "Predicted means."
        drawn["std"] = draw_histogram(table.std_N.tolist(), "std"), "Predicted spreads."
    else:
        bins = found["reliability"]
        curve = {"": (bins["said"], bins["found"])}
        words = "Reliability: people's mean in bins of the predicted mean."
        drawn["reliability"] = draw_reliability(curve, table.levels.values_L), words
        means = table.mean_N.tolist(), human.mean_N.tolist()
        drawn["mean"] = draw_scatter(*means, "mean"), "Means, a point a row."
        if human.std_N is not None:
            stds = table.std_N.tolist(), human.std_N.tolist()
            drawn["std"] = draw_scatter(*stds, "std"), "Spreads, a point a row."
    for name, (picture, _) in drawn.items():
        write_picture(folder / f"{name}.png", picture)
    return f'<div class="grid">{"".join(figure(*one) for one in drawn.values())}</div>'
