"""Long jobs in parts: whole or absent, kept through a kill, never mixed with another job's."""

import json
import threading

import pytest

import llmkd.data.parts as module
from llmkd.data.parts import Parts, read_parts, run_parts
from llmkd.errors import DataError, RunFolderError


def rows_of(part):
    return [{"row": 2 * part, "text": f"a{part}"}, {"row": 2 * part + 1, "text": "b\n\u2028ü"}]


def claimed(folder, count=3, key="k"):
    parts = Parts(folder, count, key)
    parts.claim()
    return parts


def test_rows_come_back_in_the_order_of_the_parts(tmp_path):
    parts = claimed(tmp_path / "job")
    for part in (2, 0, 1):
        assert part in parts.missing() and not parts.done
        parts.write(part, rows_of(part))
    assert parts.done and parts.missing() == []
    wanted = [row for part in range(3) for row in rows_of(part)]
    assert list(parts.rows()) == wanted == list(read_parts(tmp_path / "job"))
    assert (tmp_path / "job" / "part-00002.jsonl").read_text().splitlines()[0] == (
        '{"row": 4, "text": "a2"}'
    )


@pytest.mark.parametrize(
    "text", ["\u2028 \u2029 \x85 \r\n \x0b", "\ud800 half", "grün 日本 \U0001f600"]
)
def test_any_text_survives_and_stays_on_one_line(tmp_path, text):
    parts = claimed(tmp_path, 1)
    parts.write(0, [{"text": text}])
    assert list(parts.rows()) == [{"text": text}]
    assert len((tmp_path / "part-00000.jsonl").read_text().splitlines()) == 1


def test_ordinary_text_is_readable_in_the_file(tmp_path):
    parts = claimed(tmp_path, 1)
    parts.write(0, [{"text": "grün"}])
    assert "grün" in (tmp_path / "part-00000.jsonl").read_text(encoding="utf-8")


def test_a_kill_in_the_middle_costs_one_part(tmp_path):
    made = []

    def make(part, dies_at=2):
        if part == dies_at:
            raise KeyboardInterrupt
        made.append(part)
        return rows_of(part)

    with pytest.raises(KeyboardInterrupt):
        run_parts(claimed(tmp_path, 4), make, quiet=True)
    assert made == [0, 1] and not list(tmp_path.glob(".*"))
    said = []
    parts = claimed(tmp_path, 4)
    with pytest.raises(DataError, match=r"2 of 4 parts are missing \(the first: 2\)"):
        list(parts.rows())
    run_parts(parts, lambda part: make(part, None), label="job", say=said.append, quiet=True)
    assert made == [0, 1, 2, 3]
    assert said == ["job: 2 of 4 parts are there already"]
    assert [row["row"] for row in parts.rows()] == list(range(8))
    run_parts(parts, make, label="job", say=said.append, quiet=True)  # nothing left, nothing said
    assert made == [0, 1, 2, 3] and len(said) == 1


def test_what_json_cannot_hold_leaves_no_file(tmp_path):
    parts = claimed(tmp_path, 1)
    with pytest.raises(TypeError):
        parts.write(0, [{"row": 0}, {"row": object()}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json"]


def test_two_ranks_share_one_list_even_when_one_is_early(tmp_path, monkeypatch):
    claimed(tmp_path, 7).write(3, [])  # the list has a hole: shares go by place, not by number
    barrier = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(module, "_wait", barrier.wait)
    made = {0: [], 1: []}

    def work(rank):
        def make(part):
            made[rank].append(part)
            return [{"row": part}]

        run_parts(claimed(tmp_path, 7), make, rank=rank, world=2, quiet=True)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    threads[0].start()
    threads[0].join(0.5)  # long enough to do its whole share, if it did not wait
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert made == {0: [0, 2, 5], 1: [1, 4, 6]}
    assert [row["row"] for row in claimed(tmp_path, 7).rows()] == [0, 1, 2, 4, 5, 6]


def test_the_bar_stands_on_the_main_rank_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_wait", lambda: None)
    for rank, shown in ((1, False), (0, True)):
        run_parts(claimed(tmp_path / str(rank), 2), rows_of, rank=rank, world=2, label="sampling")
        assert ("sampling" in capsys.readouterr().err) is shown


def test_nothing_to_do_is_done(tmp_path):
    parts = claimed(tmp_path, 0)
    run_parts(parts, rows_of)
    assert parts.done and list(parts.rows()) == [] == list(read_parts(tmp_path))


@pytest.mark.parametrize("key, count", [("other", 3), ("k", 4)])
def test_another_job_is_refused_and_nothing_changes(tmp_path, key, count):
    claimed(tmp_path).write(0, rows_of(0))
    with pytest.raises(RunFolderError, match=r"another job's parts \(key k in 3") as caught:
        claimed(tmp_path, count, key)
    assert "delete it" in str(caught.value)
    assert list(Parts(tmp_path, 3, "k").missing()) == [1, 2]


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(RunFolderError, match=r"mine\.jsonl but no meta\.json"):
        claimed(tmp_path)
    (tmp_path / "meta.json").write_text('{"a": 1}')
    with pytest.raises(RunFolderError, match="not written by llmkd"):
        claimed(tmp_path)
    (tmp_path / "meta.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"meta\.json.*damaged"):
        claimed(tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        claimed(tmp_path / "mine.jsonl")
    with pytest.raises(DataError, match=r"no meta\.json"):
        list(read_parts(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'{"row": 0}\n{"row"', "cut off"),
        (b'{"row": 0}\n{"row"\n', "line 2 is not JSON"),
        (b"[1]\n", "line 1 is no row"),
        (b"\xff\xfe\n", "not UTF-8"),
        (b"{}\n\n", "line 2 is not JSON"),
    ],
)
def test_a_damaged_part_is_named(tmp_path, content, problem):
    parts = claimed(tmp_path, 1)
    (tmp_path / "part-00000.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        list(parts.rows())
    assert "part-00000.jsonl" in str(caught.value) and "delete it" in str(caught.value)


def test_parts_outside_the_job_are_a_mistake_of_the_caller(tmp_path):
    parts = claimed(tmp_path, 2)
    for part in (-1, 2):
        with pytest.raises(ValueError):
            parts.write(part, [])


def test_numbers_come_back_as_they_were(tmp_path):
    parts = claimed(tmp_path, 1)
    values = [0.1 + 0.2, 1e-300, -0.0, float("nan")]
    parts.write(0, [{"logits": values}])
    found = next(parts.rows())["logits"]
    assert json.dumps(found) == json.dumps(values)
