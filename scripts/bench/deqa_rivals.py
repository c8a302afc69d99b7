"""What a user would pick instead of levels: a regression head on the same LoRA model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 16


class Regressor(nn.Module):
    """One linear unit on the last token's hidden state: `num_labels=1` of the library."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(inner.config.hidden_size, 1)

    def forward(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        hidden_BTH = self.inner(input_ids=ids_BT, use_cache=False).last_hidden_state
        return self.head(hidden_BTH[torch.arange(len(last_B)), last_B]).squeeze(-1).float()


def batches(world: Any, rows: list[Any], order: Any, size: int) -> Any:
    """Padded ids, places of the last token, numbers of the rows."""
    pad = world.tokenizer.pad_token_id
    made = [world.encoder.prompted(row).ids for row in rows]
    for start in range(0, len(order), size):
        some = order[start : start + size]
        width = max(len(made[n]) for n in some)
        ids = torch.tensor([[*made[n], *[pad] * (width - len(made[n]))] for n in some])
        yield ids, torch.tensor([len(made[n]) - 1 for n in some]), some


def regression(world: Any, job: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """Mean squared error on standardised means; same LoRA, rows, batches, schedule and rates."""
    torch.manual_seed(job.seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LORA)
    model = Regressor(get_peft_model(world.half.fresh().model, config))
    means_N = np.array([row["mean"] for row in rows["train"]])
    goal_N = torch.tensor((means_N - means_N.mean()) / means_N.std()).float()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=job.rate, weight_decay=0.0)
    epochs = int(world.args.epochs)
    steps = epochs * -(-len(means_N) // BATCH)
    plan = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    model.train()
    for epoch in range(epochs):
        order = np.random.default_rng([job.seed, epoch]).permutation(len(means_N))
        for ids_BT, last_B, some in batches(world, rows["train"], order, BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=not world.args.float32):
                said_B = model(ids_BT, last_B)
            nn.functional.mse_loss(said_B, goal_N[some]).backward()
            nn.utils.clip_grad_norm_(wanted, 1.0)
            optimizer.step()
            plan.step()
            optimizer.zero_grad()
    model.eval()
    asked = rows[job.split]
    said_N = np.zeros(len(asked))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not world.args.float32):
        for ids_BT, last_B, some in batches(world, asked, np.arange(len(said_N)), 32):
            said_N[some] = model(ids_BT, last_B).numpy()
    return {job.split: {"mean": (said_N * means_N.std() + means_N.mean()).tolist()}}


def embedder(folder: str) -> Any:
    """Texts to normalised mean-pooled embeddings of a frozen encoder, remembered."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    known: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        new = sorted({text for text in texts if text not in known}, key=len)
        for start in range(0, len(new), 64):
            some = new[start : start + 64]
            made = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            hidden_BTH, mask_BT = model(**made).last_hidden_state, made["attention_mask"]
            pooled_BH = (hidden_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
            unit_BH = nn.functional.normalize(pooled_BH, dim=-1).numpy()
            known.update(zip(some, unit_BH, strict=True))
        return np.stack([known[text] for text in texts])

    return embed


def ridge(embed: Any, job: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """Ridge on frozen embeddings, alpha by leave-one-out on the training rows. Of a translation
    and its source: both embeddings and their product.
    """
    from sklearn.linear_model import RidgeCV

    def features(some: list[Any]) -> np.ndarray:
        lines = [row["text"].split("\n") for row in some]
        if job.data == "tweets":
            return embed([" ".join(parts[:-1]) for parts in lines])
        pair = [
            embed([f"query: {parts[place].split(': ', 1)[1]}" for parts in lines])
            for place in (0, 1)
        ]
        return np.concatenate([*pair, pair[0] * pair[1]], axis=1)

    model = RidgeCV(np.logspace(-3, 3, 25))
    model.fit(features(rows["train"]), [row["mean"] for row in rows["train"]])
    return {job.split: {"mean": model.predict(features(rows[job.split])).tolist()}}
