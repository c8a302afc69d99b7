"""Image rows are checked before the first step: once a machine, and one of rows that are alike."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image
from score_kit import PROMPT, image_scorer, score_levels, score_row

from llmkd.data import score_images
from llmkd.data.score_images import check_images, image_problem, image_size, open_image
from llmkd.data.score_tokens import ScoreEncoder, tokenize_scores
from llmkd.errors import DataError


def data(size, kind="PNG", orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    handle = io.BytesIO()
    Image.new("RGB", size, (90, 30, 10)).save(handle, kind, exif=exif)
    return handle.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation, turned", [(None, False), (3, False), (6, True), (8, True)])
def test_the_size_is_that_of_the_opened_image(kind, orientation, turned):
    image = data((6, 4), kind, orientation)
    assert image_size(image) == open_image(image).size == ((4, 6) if turned else (6, 4))
    with Image.open(io.BytesIO(image)) as found:
        assert image_size(found) == open_image(found).size


def test_the_size_of_a_png_needs_no_pixels():
    assert image_size(data((60, 40))[:-40]) == (60, 40)
    assert image_problem(data((60, 40))[:-40]) is not None


def test_what_opening_will_do_later_is_tried_before(monkeypatch):
    image = data((6, 4), "JPEG", 6)
    assert image_problem(image) is None

    def broken(image):
        raise SyntaxError("not a TIFF file")  # as of damaged EXIF

    monkeypatch.setattr(score_images.ImageOps, "exif_transpose", broken)
    with pytest.raises(DataError, match="cannot be read"):
        open_image(image)
    assert image_problem(image) == "SyntaxError: not a TIFF file"


def test_one_rank_of_a_machine_reads_the_images(monkeypatch):
    said = []

    def refuse(value, problem, *ways):
        return DataError.of("image", value, problem, *ways)

    class Rank:
        local_process_index = 0

    monkeypatch.setattr(score_images, "PartialState", Rank)
    with pytest.raises(DataError, match="is no whole image"):
        check_images([([b"none"], refuse)], 1, said.append)
    Rank.local_process_index = 1
    check_images([([b"none"], refuse)], 1, said.append)
    assert said == []


class Counted:
    """An encoder that remembers which rows it was asked to encode."""

    def __init__(self, max_length=None):
        _, processor = image_scorer()
        self.encoder = ScoreEncoder(
            processor, score_levels(processor.tokenizer), PROMPT, max_length
        )
        self.asked = []
        self.plain = self.encoder.prompted
        self.encoder.prompted = self.prompted

    def prompted(self, row, question=None):
        self.asked.append(row["row"])
        return self.plain(row, question)

    def rows(self, rows):
        made = tokenize_scores(
            rows, self.encoder, lambda r: np.full((len(r), 5), 0.2), training=False
        )
        self.asked.clear()
        return made.rows


def test_of_rows_that_are_alike_one_is_encoded():
    counted = Counted(max_length=110)
    small, large, long = data((20, 20)), data((30, 20)), "a mat " * 60
    rows = [score_row(n, images=[data((20, 20))]) for n in range(4)]  # no matter which pixels
    rows += [score_row(4, images=[large]), score_row(5, images=[small], text="a mat")]
    rows += [score_row(n, images=[small], text=long) for n in (6, 7)]
    rows += [score_row(8, images=[small], messages=[{"role": "user", "content": "a mat"}])]
    rows += [score_row(9, images=[small, small])]
    lazy = counted.rows(rows)
    assert lazy.check() == 2 and counted.asked == [0, 4, 5, 6, 8, 9]
    counted.asked.clear()
    assert lazy.check(0, 2) + lazy.check(1, 2) == 2  # ranks share the rows
    assert counted.asked == [0, 4, 6, 8, 1, 5, 7, 9]


def test_a_row_without_room_and_one_the_processor_refuses_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counted = Counted(max_length=64)
    rows = [score_row(n, images=[data((20, 20))] * (1 + 8 * (n == 3))) for n in range(5)]
    lazy = counted.rows(rows)
    with pytest.raises(DataError, match="max_length: 64: row 3: no room"):
        lazy.check(1, 2)
    assert lazy.check(0, 2) == 0

    def refuses(*_, **__):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    rows = [score_row(0, images=[data((20, 20))]), score_row(1, images=["flat.png"])]
    Image.new("RGB", (500, 2)).save("flat.png")
    lazy = counted.rows(rows)
    plain = counted.plain
    counted.plain = lambda row, question: refuses() if row["row"] else plain(row, question)
    with pytest.raises(DataError, match=r"image_column: 'flat.png': row 1: .*aspect ratio"):
        lazy.check()
