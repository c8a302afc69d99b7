"""Is this store this run's, is it undamaged, and what is in it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkd.errors import DataError, LlmkdError
from llmkd.files import read_json
from llmkd.labels.dense import answer_unit
from llmkd.labels.heads import NAME as HEAD
from llmkd.labels.manifest import is_intact, read_manifest, settings_key
from llmkd.labels.shards import Shard, file_sha256
from llmkd.labels.store import Store

MANY_NAMES = 12  # of more classes only the first are shown


def check_matches(
    store: Store,
    *,
    tokenizer_digest: str,
    rows_fingerprint: str,
    rows_needed: Sequence[int] | np.ndarray,
    max_length: int,
    packing: str | None,
    teacher_temperature: float,
    vocab: int | None = None,
    teacher: Mapping[str, Any] | None = None,
    also: Sequence[str] = (),
) -> None:
    """Raise one DataError listing everything in which `store` is not made for this run.

    `vocab` is how many leading entries the student's head has; `teacher` what the run says of its
    teacher (id, revision, fingerprint, dtype, ...): what is None is not compared, and where both
    sides have a fingerprint, id and revision do not matter. `teacher_temperature` matters to `topk`
    and `sampled`, whose labels were made at one. `also` are lines of what the caller found itself.
    Call it before step one.
    """
    manifest, lines = store.manifest, list(also)

    def compare(name: str, stored: object, run: object) -> None:
        if stored != run:
            lines.append(f"{name}: the store has {stored!r}, this run {run!r}")

    compare("tokenizer", manifest["tokenizer"], tokenizer_digest)
    compare("rows (text, tokenizer and packing)", manifest["data"], rows_fingerprint)
    compare("max_length", manifest["max_length"], max_length)
    compare("packing", manifest["packing"], packing)
    if store.encoding.temperature is not None:
        compare("teacher_temperature", store.encoding.temperature, teacher_temperature)
    if vocab is not None and store.encoding.shared > vocab:
        lines.append(
            f"vocabulary: the labels speak of {store.encoding.shared:,} tokens, the student of "
            f"{vocab:,}"
        )
    for name, run in _comparable(manifest["teacher"], teacher or {}).items():
        compare(f"teacher {name}", manifest["teacher"].get(name), run)
    missing = np.setdiff1d(np.asarray(rows_needed, dtype=np.int64), store.rows)
    if len(missing):
        lines.append(
            f"rows: the store has {len(store):,}, {len(missing):,} that this run needs are not "
            f"among them (the first is row {missing[0]})"
        )
    if lines:
        raise DataError.of(
            "label_store",
            str(store.folder),
            "was not made for this run:\n    " + "\n    ".join(lines),
            "train with the settings the labels were made with (left)",
            "or label anew with this recipe: `llmkd label RECIPE --label_store ANOTHER_FOLDER`",
            "or leave label_store out: the teacher then answers live",
        )


def _comparable(stored: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What of the run's teacher says something about the stored one."""
    facts = {name: value for name, value in run.items() if value is not None}
    if facts.get("fingerprint") and stored.get("fingerprint"):
        facts = {k: v for k, v in facts.items() if k not in ("id", "revision")}
        if facts["fingerprint"] != stored["fingerprint"]:  # the names help to see why
            facts |= {k: run[k] for k in ("id", "revision") if run.get(k) is not None}
    return facts


def verify_checksums(store: Store | str | Path) -> list[str]:
    """Everything that is wrong with a store's files, a line each naming the file; [] if nothing.

    Reads every byte: manifest against its own digest and key, each shard's size, SHA-256, JSON,
    rows, tokens, order and row checksums, and the head. Raises only where there is no store.
    """
    folder = store.folder if isinstance(store, Store) else Path(store)
    try:
        manifest = read_manifest(folder)
    except LlmkdError as error:
        return [str(error)]
    if manifest is None or manifest["status"] != "done":
        Store.open(folder)  # raises the error that says which
    assert manifest is not None
    problems: list[str] = []
    if not is_intact(manifest) or manifest["key"] != settings_key(manifest_settings(manifest)):
        problems.append(f"{folder / 'manifest.json'}: its key does not fit its settings")
    for facts in manifest["shards"]:
        problems += _shard_problems(folder, facts, manifest["columns"])
    head = manifest["head"]
    if head is not None:
        problems += _file_problems(folder / head["file"], head)
    return problems


def manifest_settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that its key is made of."""
    names = (
        "encoding temperature tail shared vocab teacher tokenizer data packing max_length rows "
        "seed rows_per_shard"
    ).split()
    return {name: manifest[name] for name in names}


def _file_problems(path: Path, facts: Mapping[str, Any]) -> list[str]:
    """Size, hash and the JSON beside it."""
    if not path.is_file():
        return [f"{path}: missing"]
    problems = []
    if path.stat().st_size != facts["bytes"]:
        problems.append(f"{path}: {path.stat().st_size:,} bytes, not {facts['bytes']:,}")
    elif file_sha256(path) != facts["sha256"]:
        problems.append(f"{path}: its SHA-256 is not the one in the manifest")
    beside = path.with_suffix(".json")
    try:
        if read_json(beside) != facts:
            problems.append(f"{beside}: missing, or does not say what the manifest says")
    except ValueError:
        problems.append(f"{beside}: cannot be read")
    return problems


def _shard_problems(
    folder: Path, facts: Mapping[str, Any], columns: Mapping[str, str]
) -> list[str]:
    path = folder / facts["file"]
    problems = _file_problems(path, facts)
    if any(problem.startswith(f"{path}:") for problem in problems):
        return problems  # what is inside is not worth reading
    try:
        shard = Shard(path, columns)
        if (len(shard.rows), int(shard.lengths.sum())) != (facts["rows"], facts["tokens"]):
            problems.append(f"{path}: other numbers of rows or tokens than the manifest says")
        for place in range(len(shard.rows)):
            shard.columns(place)
    except LlmkdError as error:
        problems.append(str(error))
    return problems


def _short(value: Any) -> str:
    """A fact in one line: of many class names the first."""
    if isinstance(value, list) and len(value) > MANY_NAMES:
        return f"{', '.join(map(str, value[:MANY_NAMES]))}, ... ({len(value)})"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe(store: Store) -> list[tuple[str, str]]:
    """What `llmkd label info` prints: (what, value) lines."""
    manifest, tokens = store.manifest, max(store.manifest["tokens"], 1)
    rows, temperature = manifest["rows"], store.encoding.temperature
    unit = answer_unit(manifest["encoding"])
    lines = [
        ("folder", str(store.folder)),
        ("encoding", ", ".join(f"{k} {v}" for k, v in manifest["encoding"].items())),
        ("temperature", "any" if temperature is None else f"{temperature:g}"),
        ("tail", manifest["tail"] or "-"),
        *(
            (f"teacher {name}", _short(value))
            for name, value in manifest["teacher"].items()
            if value is not None
        ),
        ("vocabulary", f"{manifest['shared']:,} shared of {manifest['vocab']:,}"),
        ("tokenizer", manifest["tokenizer"]),
        ("data", manifest["data"]),
        ("packing", f"{manifest['packing'] or 'none'}, max_length {manifest['max_length']:,}"),
        ("rows", f"{rows['count']:,} of {rows['of']:,} ({rows['which']})"),
        (f"{unit}s", f"{manifest['tokens']:,}"),
        ("shards", f"{len(manifest['shards']):,}"),
        ("bytes", f"{manifest['bytes']:,}"),
        (f"bytes a {unit}", f"{manifest['bytes'] / tokens:.2f}"),
    ]
    sizes: dict[str, int] = {}
    for shard in store.shards:
        for name, size in shard.column_bytes().items():
            sizes[name] = sizes.get(name, 0) + size
    lines += [(f"  {name}", f"{size / tokens:.2f}") for name, size in sizes.items()]
    if manifest["head"] is not None:
        lines.append((HEAD, f"{manifest['head']['bytes']:,} bytes, once"))
    lines += [("seed", str(manifest["seed"])), ("key", manifest["key"])]
    versions = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items() if v)
    return [*lines, ("made with", versions)]
