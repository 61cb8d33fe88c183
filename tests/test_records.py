from pathlib import Path

import pytest

from mmkit.errors import DataError
from mmkit.records import Records, merge, read_jsonl

ITEMS = [{"question_id": number, "question": f"q{number}"} for number in range(5)]


def test_answers_go_on_by_id(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    with Records(path) as records:
        for item in list(records.todo(ITEMS))[1:3]:
            records.append({"question_id": item["question_id"], "answer": "ä"})
    with Records(path) as records:
        assert [item["question_id"] for item in records.todo(ITEMS)] == [0, 3, 4]
        assert records.done[1]["answer"] == "ä"
        assert len(records) == 2


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    with Records(tmp_path / "a.jsonl") as records:
        records.append({"question_id": 1})
        assert read_jsonl(tmp_path / "a.jsonl") == [{"question_id": 1}]


def test_a_half_written_last_line_is_removed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_id": 0}\n{"question_id": 1, "ans')
    with Records(path) as records:
        assert list(records.done) == [0]
        records.append({"question_id": 1})
    assert "half written (23 bytes)" in capsys.readouterr().err
    assert [row["question_id"] for row in read_jsonl(path)] == [0, 1]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_id": 0}\n{"question_id": 1}')
    with Records(path) as records:
        records.append({"question_id": 2})
    assert [row["question_id"] for row in read_jsonl(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id": 0}\nnot json\n{"question_id": 1}\n', "line 2, is no JSON"),
        ('{"question_id": 0}\n{"question_id": 0}\n', "line 2: question_id 0 is in the file already"),
        ('{"id": 0}\n', "line 1 has no 'question_id'; it has id"),
        ("[1]\n", "line 1, holds a list"),
        ('{"question_id": null}\n', "question_id is None"),
    ],
)
def test_a_bad_file_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message), Records(tmp_path / "a.jsonl"):
        pass


def test_one_id_has_one_row(tmp_path: Path) -> None:
    with Records(tmp_path / "a.jsonl") as records:
        records.append({"question_id": 1})
        with pytest.raises(DataError, match="is in the file already"):
            records.append({"question_id": 1})
        with pytest.raises(DataError, match="two items have question_id 2"):
            list(records.todo([{"question_id": 2}, {"question_id": 2}]))
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 1


def test_files_of_several_processes_merge(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question_id": 0, "a": 1}\n{"question_id": 2, "a": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"question_id": 1, "a": 1}\n{"question_id": 2, "a": 1}\n')
    assert merge([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "all.jsonl") == 3
    assert [row["question_id"] for row in read_jsonl(tmp_path / "all.jsonl")] == [0, 2, 1]
    (tmp_path / "b.jsonl").write_text('{"question_id": 2, "a": 9}\n')
    with pytest.raises(DataError, match="with other content"):
        merge([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "all.jsonl")
