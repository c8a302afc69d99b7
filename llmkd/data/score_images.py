"""Images of rated rows: what stands in a column, found, opened and checked."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import ExifTags, Image, ImageOps
from tqdm.auto import tqdm

from llmkd.errors import DataError, LlmkdError, MissingFileError

THREADS = min(8, os.cpu_count() or 1)
LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height
Refuse = Callable[..., LlmkdError]


def as_images(value: Any, roots: Sequence[Path], refuse: Refuse) -> list[Any]:
    """A column's value as a list of paths (str), bytes and PIL images; relative paths are looked
    for under `roots`. `refuse(value, problem)` makes the error for none, and for anything else.
    """
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed:
        raise refuse(value, "has no image")
    return [_one(part, roots, refuse) for part in listed]


def _one(value: Any, roots: Sequence[Path], refuse: Refuse) -> Any:
    if isinstance(value, dict):  # an Image feature that was not decoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Image.Image):
        return value
    if value is None or value == "":
        raise refuse(value, "has no image")
    if not isinstance(value, str | Path):
        raise refuse(type(value).__name__, "is no image: a path, bytes, or an Image feature")
    path = Path(value).expanduser()
    places = [path] if path.is_absolute() else [root / path for root in roots]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(os.path.abspath(place) for place in places))
        raise refuse(str(value), f"no such image (looked at {looked})", "image_root: FOLDER")
    return str(found.absolute())


def open_image(image: Any) -> Image.Image:
    """A path, bytes or PIL image in RGB, upright as its EXIF says.

    MissingFileError for a path that leads nowhere, DataError for what is no whole image.
    """
    try:
        with _opened(image) as found:
            upright = ImageOps.exif_transpose(found) or found
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise MissingFileError.of("image", str(image), "no such image") from error
    except Exception as error:  # Pillow's plug-ins raise what they like
        raise DataError.of("image", shown(image), f"cannot be read: {_why(error)}") from error


def check_images(rows: Iterable[tuple[Sequence[Any], Refuse]], count: int, say: Any) -> None:
    """Read all `count` images of the rows to their last byte, once on each machine (the ranks of
    one see the same files); the row's `refuse` makes the error for the first that is damaged, cut
    off, or no image.
    """
    if PartialState().local_process_index:
        return
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=count, desc="checking images", delay=2) as bar,
    ):
        for (image, refuse), problem in _problems(pool, _flat(rows)):
            bar.update(1)
            if problem is not None:
                raise refuse(shown(image), f"is no whole image: {problem}", "mend or drop the row")
    say(f"images: {count} read")


def _flat(rows: Iterable[tuple[Sequence[Any], Refuse]]) -> Iterator[tuple[Any, Refuse]]:
    return ((image, refuse) for images, refuse in rows for image in images)


def _problems(pool: ThreadPoolExecutor, images: Iterator[tuple[Any, Refuse]]) -> Iterator[Any]:
    """Each image with what is wrong with it or None, a few at a time, so that an early error is
    one.
    """
    while block := [pair for _, pair in zip(range(64), images, strict=False)]:
        yield from zip(block, pool.map(lambda pair: image_problem(pair[0]), block), strict=True)


def image_problem(image: Any) -> str | None:
    """What is wrong with an image, None where nothing is."""
    if isinstance(image, Image.Image):
        return None
    try:
        with _opened(image) as found:
            found.verify()
        with _opened(image) as found:  # `verify` does not read the pixels of a JPEG
            found.draft("RGB", (max(found.width // 8, 1), max(found.height // 8, 1)))
            found.load()
            (ImageOps.exif_transpose(found) or found).convert("RGB")  # as `open_image` will
    except Exception as error:  # Pillow's plug-ins raise what they like
        return _why(error)
    return None


def image_size(image: Any) -> tuple[int, int]:
    """Width and height of what `open_image` gives, mostly from the header alone."""
    if isinstance(image, Image.Image):
        return _upright_size(image)
    with _opened(image) as found:
        return _upright_size(found)


def _upright_size(found: Image.Image) -> tuple[int, int]:
    # Asked for EXIF it does not have, a PNG reads all its pixels.
    tagged = "exif" in found.info or "xmp" in found.info
    turned = tagged and found.getexif().get(ExifTags.Base.Orientation) in LYING
    return (found.height, found.width) if turned else found.size


def shown(image: Any) -> str:
    """What a message calls an image."""
    return f"{len(image)} bytes" if isinstance(image, bytes) else str(image)


def image_key(image: Any) -> str:
    """Hash that tells an image from others without decoding it: of its bytes, of a file its size
    and first 64 KiB.
    """
    if isinstance(image, str):
        with open(image, "rb") as handle:
            data = f"{os.fstat(handle.fileno()).st_size} ".encode() + handle.read(1 << 16)
    else:
        data = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _opened(image: Any) -> Any:
    if isinstance(image, Image.Image):
        return image.copy()
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)


def _why(error: Exception) -> str:
    text = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
