"""The dataset card of a store, made from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from llmkd.labels.dense import answer_unit

READ = {
    "topk": "ids of the k likeliest tokens, their log-probabilities and the mass of all others",
    "sampled": "ids drawn from the teacher's distribution and how often (RS-KD, arXiv 2503.16870)",
    "hidden": "the teacher's final hidden states; head.safetensors makes logits of them",
    "lowrank": "coefficients of the teacher's hidden states; head.safetensors makes logits of them",
    "dense": "the teacher's logits, all of them",
}
NEXT_TOKEN = "Position t of a row is the teacher's distribution of the token after t."


def card(manifest: Mapping[str, Any]) -> str:
    """README.md: YAML front matter for the Hub, then what the labels are and how to read them."""
    teacher, encoding = manifest["teacher"], manifest["encoding"]
    kind = f"soft-labels-{encoding['name']}"
    front = {
        "pretty_name": f"Soft labels of {teacher.get('id') or 'a teacher'}",
        "tags": ["llmkd", "knowledge-distillation", "soft-labels", kind],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.arrow"}]}
        ],
    }
    what = "classes" if teacher.get("label_names") else "vocabulary"
    tokens, rows, unit = manifest["tokens"], manifest["rows"], answer_unit(encoding)
    facts = {
        "teacher": ", ".join(f"{k} {v}" for k, v in teacher.items() if v is not None),
        "encoding": ", ".join(f"{k} {v}" for k, v in encoding.items()),
        "temperature": manifest["temperature"] or "any (applied when read)",
        "rows": f"{rows['count']:,} of {rows['of']:,}",
        f"{unit}s": f"{tokens:,}",
        "size": f"{manifest['bytes']:,} bytes, {manifest['bytes'] / max(tokens, 1):.1f} a {unit}",
        what: f"{manifest['shared']:,} of the teacher's {manifest['vocab']:,} entries",
        "tokenizer digest": manifest["tokenizer"],
        "data fingerprint": manifest["data"],
        "packing": f"{manifest['packing'] or 'none'}, at most {manifest['max_length']:,} tokens",
        "seed": manifest["seed"],
    }
    width = 1 if unit == "answer" else manifest["max_length"]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {front["pretty_name"]}

Written by `llmkd label`. Each row holds {READ[encoding["name"]]}.
{_meaning(manifest)} `tokens` is a digest of the exact token ids the row
belongs to: train on the same text, tokenizer and packing, or llmkd refuses.

| | |
|---|---|
{table}

Every file's SHA-256 is in `manifest.json`; `llmkd label verify` checks them.

```python
from llmkd.labels import Store

store = Store.open("path/to/this/folder")
target = store.target([0, 1], width={width})  # a typed soft label, padded
rows = store.as_dataset()  # the raw columns, a datasets.Dataset
```
"""


def _meaning(manifest: Mapping[str, Any]) -> str:
    """What a position of a row is an answer to."""
    names = manifest["teacher"].get("label_names")
    if not names:
        return NEXT_TOKEN
    what = "The row" if answer_unit(manifest["encoding"]) == "answer" else "Each token of a row"
    return f"{what} has one logit a class, in the order of `label_names`: {', '.join(names)}."
