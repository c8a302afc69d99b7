"""A tiny image-text model on photos with known distortions and SIMULATED raters.

    pip install scikit-image            # not a dependency of llmkd
    PYTHONPATH=. python scripts/bench/deqa_images.py make iqa --seed 0
    llmkd deqa recipes/deqa/iqa_tiny.yaml --score_dataset iqa/train.jsonl \
        --score_eval_dataset iqa/test.jsonl --model_name_or_path iqa/model --output_dir runs/iqa-0
    PYTHONPATH=. python scripts/bench/deqa_images.py table runs/iqa-0 runs/iqa-1 runs/iqa-2

`make`: crops of 64 x 64 pixels of twelve photos that lie inside the wheel of scikit-image, each
pristine and under blur, JPEG and noise of five grades. Nobody looked at them: a quality is set for
each kind and grade, and 8 to 15 simulated raters are drawn around it. Photos 4S to 4S + 3 (mod 12)
are held out, so that seeds 0, 1 and 2 hold out each photo once. The model has random weights.

`table`: agreement with the simulated raters, and order against the known one, beside what needs no
network: the training rows' mean distribution, a ridge and boosted trees on pixel statistics.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import laplace
from scipy.special import ndtr
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llmkd.data import train_bpe
from llmkd.data.levels import QUALITY
from llmkd.evaluation.score_metrics import SCORE_METRICS, Scored, pearson, spearman
from llmkd.files import read_json
from llmkd.methods.deqa_finish import predictions_of

PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("motorcycle_left.png", "rocket.jpg"),
)
ORDER = (0, 7, 9, 2, 4, 1, 8, 3, 5, 6, 10, 11)  # every four in a row hold unlike photos
SIDE, SHORT, PATCH = 64, 288, 8
BLUR = (0.5, 0.8, 1.2, 1.8, 2.6)  # radius, pixels
JPEG = (60, 35, 20, 11, 6)  # quality
NOISE = (5, 10, 18, 30, 48)  # std, of 255
PRISTINE = 4.8
QUALITIES = {  # of grades 1 to 5; what the simulated raters agree on
    "blur": (4.3, 3.6, 2.8, 2.0, 1.3),
    "jpeg": (4.4, 3.8, 3.1, 2.3, 1.6),
    "noise": (4.2, 3.5, 2.7, 1.9, 1.2),
}
SPREADS = {"pristine": 0.4, "blur": 0.4, "jpeg": 0.7, "noise": 1.0}  # how far raters differ
VALUES = (5.0, 4.0, 3.0, 2.0, 1.0)  # of the level words, in the recipe's order
WIDTH = 64
FILTERS = "model.vision_tower.embeddings.patch_embedding.weight"
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def photo(name: str) -> Image.Image:
    """A photo of scikit-image, its shorter side of 288 pixels."""
    import skimage.data  # pyright: ignore[reportMissingImports]

    path = Path(skimage.data.__file__).parent / name
    with Image.open(path) as found:
        whole = found.convert("RGB")
    scale = SHORT / min(whole.size)
    return whole.resize(
        (round(whole.width * scale), round(whole.height * scale)), Image.Resampling.LANCZOS
    )


def crops(whole: Image.Image, count: int, draw: np.random.Generator) -> list[Image.Image]:
    """Crops that do not overlap, of those with something in them (a third of the flattest left
    out).
    """
    boxes = [
        (left, top, left + SIDE, top + SIDE)
        for top in range(0, whole.height - SIDE + 1, SIDE)
        for left in range(0, whole.width - SIDE + 1, SIDE)
    ]
    found = sorted((whole.crop(box) for box in boxes), key=lambda one: float(np.asarray(one).std()))
    found = found[len(found) // 3 :]
    return [found[place] for place in draw.permutation(len(found))[:count]]


def distorted(crop: Image.Image, kind: str, grade: int, draw: np.random.Generator) -> Image.Image:
    """A crop under one distortion; grade 0 is the crop."""
    if grade == 0:
        return crop
    if kind == "blur":
        return crop.filter(ImageFilter.GaussianBlur(BLUR[grade - 1]))
    if kind == "jpeg":
        handle = io.BytesIO()
        crop.save(handle, "JPEG", quality=JPEG[grade - 1])
        return Image.open(handle).convert("RGB")
    pixels = np.asarray(crop, dtype=float)
    noisy = pixels + draw.normal(0, NOISE[grade - 1], pixels.shape)
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))


def ratings(kind: str, quality: float, draw: np.random.Generator) -> list[int]:
    """What 8 to 15 simulated raters say, 1 to 5. They differ by kind, and a bit by image."""
    spread = SPREADS[kind] * float(np.exp(draw.normal(0, 0.2)))
    said = draw.normal(quality, spread, int(draw.integers(8, 16)))
    return np.clip(np.round(said), 1, 5).astype(int).tolist()


def places(whole: Image.Image, draw: np.random.Generator) -> Iterator[Image.Image]:
    """Crops at random places, half of them mirrored."""
    while True:
        left, top = (int(draw.integers(size - SIDE + 1)) for size in whole.size)
        crop = whole.crop((left, top, left + SIDE, top + SIDE))
        yield ImageOps.mirror(crop) if draw.integers(2) else crop


def rows_of(name: str, count: int, folder: Path, seed: int, held: bool) -> list[dict[str, Any]]:
    """Rows of a photo; their images are written below `folder`. Of a held-out one each of `count`
    crops is shown in all 16 states, of one to train on each state has `count` crops of its own: on
    the same few crops in all states the model learnt these by heart.
    """
    draw, rows, whole = np.random.default_rng([seed, PHOTOS.index(name)]), [], photo(name)
    states = [("pristine", 0), *((kind, grade) for kind in QUALITIES for grade in range(1, 6))]
    fixed = crops(whole, count, draw) if held else None
    anywhere = places(whole, draw)
    for number in range(count if fixed is None else len(fixed)):
        for kind, grade in states:
            crop = next(anywhere) if fixed is None else fixed[number]
            path = Path("images") / f"{Path(name).stem}-{number}-{kind}-{grade}.png"
            distorted(crop, kind, grade, draw).save(folder / path)
            quality = PRISTINE if grade == 0 else QUALITIES[kind][grade - 1]
            row = {"image": str(path), "ratings": ratings(kind, quality, draw), "simulated": True}
            known = {"photo": name, "crop": number, "kind": kind, "grade": grade}
            rows.append({**row, **known, "quality": quality})
    return rows


def save_model(folder: Path, seed: int) -> int:
    """A LLaVA with random weights, its tokenizer and processor; how many parameters it has.

    Two things differ from the library's random weights, with which it learnt nothing in 300 steps:
    their spread suits the width, and patch filters begin without a mean, since they tell brightness
    before anything else.
    """
    said = [f"user: How good is this image?\nassistant: The quality of the image is {word}."
            for word in QUALITY]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        tokenizer = train_bpe(said * 20, 360, Path(place))
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>")]})
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
    }
    pad_id: Any = tokenizer.pad_token_id
    mark: Any = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH)
    text = LlamaConfig(
        **sizes,
        num_hidden_layers=2,
        initializer_range=WIDTH**-0.5,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        pad_token_id=pad_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=mark,
        vision_feature_layer=-1,  # of two layers none is to spare
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        filters = model.get_parameter(FILTERS)
        filters.sub_(filters.mean((2, 3), keepdim=True)).mul_(4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


def make(args: argparse.Namespace) -> None:
    """Images, `train.jsonl`, `test.jsonl`, `model/`."""
    (args.out / "images").mkdir(parents=True)
    names = [PHOTOS[place] for place in ORDER]
    start = 4 * (args.seed % 3)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for place, name in enumerate(names):
        held = start <= place < start + 4
        count = args.test_crops if held else args.train_crops
        parts["test" if held else "train"] += rows_of(name, count, args.out, args.seed, held)
    for part, rows in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{part}.jsonl").write_text(lines)
    size = save_model(args.out / "model", args.seed)
    print(f"train {len(parts['train'])}, test {len(parts['test'])} rows, {size:,} parameters")
    print("held out:", ", ".join(names[start : start + 4]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that `make` wrote, with the images' whole paths."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "image": path.parent / row["image"]} for row in rows]


def statistics(path: Path) -> list[float]:
    """What of an image's pixels tells blur, noise and blocks, as a user might write it down."""
    with Image.open(path) as found:
        grey = np.asarray(found.convert("L"), dtype=float)
    across = np.abs(np.diff(grey, axis=1)).mean(0)
    down = np.abs(np.diff(grey, axis=0)).mean(1)
    at = np.arange(1, SIDE) % 8 == 0
    blocks = np.mean([one[at].mean() / (one[~at].mean() + 1e-3) for one in (across, down)])
    edges = laplace(grey)
    diagonal = grey[::2, ::2] - grey[1::2, ::2] - grey[::2, 1::2] + grey[1::2, 1::2]
    measures = (edges.var(), np.median(np.abs(diagonal)), across.mean() + down.mean(), grey.std())
    return [*(float(np.log(one + 0.1)) for one in measures), float(blocks)]


def fitted(model: Any, train: list[Any], test: list[Any], columns: slice) -> np.ndarray:
    """Means that a model fitted on statistics of training rows says of test rows, [N]."""
    train_NF, test_NF = (
        np.array([statistics(row["image"])[columns] for row in rows]) for rows in (train, test)
    )
    goal_N = np.array([np.mean(row["ratings"]) for row in train])
    return np.clip(model.fit(train_NF, goal_N).predict(test_NF), 1, 5)


def controls(train: list[Any], test: list[Any]) -> dict[str, Scored]:
    """What needs no network: the mean distribution; fits, whose spread is the pooled one."""
    said = [np.array(row["ratings"]) for row in train]
    shares_L = np.mean([[np.mean(one == value) for value in VALUES] for one in said], axis=0)
    found = {"mean of the training rows": Scored.from_probs([shares_L] * len(test), VALUES)}
    pooled = np.sqrt(np.mean([np.var(one, ddof=1) for one in said]))
    line = make_pipeline(StandardScaler(), Ridge(1.0))
    trees = HistGradientBoostingRegressor(random_state=0)
    for name, model, columns in (
        ("ridge, Laplacian variance", line, slice(1)),
        ("ridge, 5 pixel statistics", line, slice(5)),
        ("boosted trees, 5 pixel statistics", trees, slice(5)),
    ):
        mean_N = fitted(model, train, test, columns)
        edges = np.array([-np.inf, 1.5, 2.5, 3.5, 4.5, np.inf])
        mass_NL = np.diff(ndtr((edges - mean_N[:, None]) / pooled), axis=1)[:, ::-1]
        found[name] = Scored(mean_N, np.full(len(test), pooled), mass_NL)
    return found


def orders(mean_N: np.ndarray, rows: list[Any]) -> dict[str, float]:
    """SRCC with the known qualities, a mean over photos; and with the six grades of one crop and
    kind, a mean over all of these.
    """
    quality_N = np.array([row["quality"] for row in rows])
    photos = np.array([row["photo"] for row in rows])
    whole = [spearman(mean_N[photos == p], quality_N[photos == p]) for p in np.unique(photos)]
    steps: dict[str, list[float]] = {kind: [] for kind in QUALITIES}
    place = {(r["photo"], r["crop"], r["kind"], r["grade"]): n for n, r in enumerate(rows)}
    for name, crop, kind, grade in place:
        if grade != 1:
            continue
        six = [place[name, crop, "pristine", 0]]
        six += [place[name, crop, kind, one] for one in range(1, 6)]
        steps[kind].append(spearman(mean_N[six], quality_N[six]))
    by_kind = {kind: float(np.mean(some)) for kind, some in steps.items()}
    every = float(np.mean(list(by_kind.values())))
    return {"photo": float(np.mean(whole)), "grades": every, **by_kind}


def measured(said: Scored, human: Scored, rows: list[Any]) -> dict[str, float]:
    """A row of the table; NaN where constant predictions define no correlation."""
    found: dict[str, float] = {"kl": SCORE_METRICS["kl"].value(said, human, np.array(VALUES))}
    if np.ptp(said.mean_N):
        found["plcc"] = pearson(said.mean_N, human.mean_N)
        found["srcc"] = spearman(said.mean_N, human.mean_N)
        found.update(orders(said.mean_N, rows))
    if said.std_N is not None and np.ptp(said.std_N) and human.std_N is not None:
        found["std"] = pearson(said.std_N, human.std_N)
    return found


def results(run: Path) -> dict[str, dict[str, float]]:
    """Rows of the table of one run: its arms, the controls, and the known quality itself."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    test = read_rows(Path(recipe["score_eval_dataset"]))
    train = read_rows(Path(recipe["score_dataset"]))
    found, human = {}, None
    for arm in read_json(run / "run.json")["arms"]:
        said, human = predictions_of(run / arm)
        found[arm] = measured(said, human, test)
    assert human is not None
    for name, said in controls(train, test).items():
        found[name] = measured(said, human, test)
    quality_N = np.array([row["quality"] for row in test])
    known = {"plcc": pearson(quality_N, human.mean_N), "srcc": spearman(quality_N, human.mean_N)}
    return {**found, "the known quality": known}


def table(args: argparse.Namespace) -> None:
    """Markdown: the mean over runs, and each run's PLCC."""
    runs = [results(run) for run in args.runs]
    head = ("plcc", "srcc", "photo", "grades", *QUALITIES, "std", "kl")
    names = ("PLCC", "SRCC", "order, photo", "order, grades", *QUALITIES, "std PLCC", "KL")
    print("| | " + " | ".join(names) + " | PLCC by seed |")
    print("|---" * (len(head) + 2) + "|")
    for arm in runs[0]:
        cells = []
        for key in head:
            some = [run[arm].get(key, np.nan) for run in runs]
            cells.append("-" if np.isnan(some).any() else f"{np.mean(some):.3f}")
        each = [run[arm].get("plcc") for run in runs]
        told = ", ".join("-" if one is None else f"{one:.3f}" for one in each)
        print(f"| {arm} | " + " | ".join(cells) + f" | {told} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    making = verbs.add_parser("make", help="write images, rows and a model")
    making.add_argument("out", type=Path)
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--train_crops", type=int, default=32)
    making.add_argument("--test_crops", type=int, default=5)
    making.set_defaults(run=make)
    telling = verbs.add_parser("table", help="print the table of finished runs")
    telling.add_argument("runs", type=Path, nargs="+")
    telling.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
