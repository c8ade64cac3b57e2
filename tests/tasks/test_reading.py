import pickle
from pathlib import Path
from typing import Any

import pytest

from moadapt.task import Defect
from moadapt_tasks.reading import read_json, read_list, read_table
from moadapt_tasks.records import Record

FILE = Path("some.json")


def record(**values: Any) -> Record:
    return Record(FILE, "id 1", values)


def test_read_json_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json does not exist"):
        read_json(tmp_path / "gone.json")


def test_read_json_refuses_a_folder_and_what_no_parser_can_nest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; give the path of a JSON file"):
        read_json(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_read_json_says_where_it_breaks(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(ValueError, match=r"broken\.json is no JSON: .* in line 2, column 6"):
        read_json(file)


def test_read_json_names_the_file_of_a_number_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text("1" * 10_000)
    with pytest.raises(ValueError, match=r"long\.json cannot be read: .*digits"):
        read_json(tmp_path / "long.json")


def test_read_json_tells_a_pickle_from_json(tmp_path: Path) -> None:
    file = tmp_path / "refs(unc).p"
    file.write_bytes(pickle.dumps([{"ref_id": 1}]))
    with pytest.raises(ValueError, match="binary; a pickle must be rewritten as JSON"):
        read_json(file)


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([], "the document is no object"),
        ({"images": []}, "the document has images"),
        ({"questions": {}}, "is a dict"),
        ({"questions": []}, "is an empty list"),
    ],
)
def test_read_list_refuses_a_document_without_entries(document: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"some\.json.*questions.*{complaint}"):
        read_list(FILE, document, "questions")


def test_read_table_keeps_the_first_of_two_with_one_identifier() -> None:
    table = read_table(FILE, [{"id": 7, "x": 1}, {"id": 7, "x": 2}, {"id": "7", "x": 3}], "id")
    assert {name: row.values["x"] for name, row in table.rows.items()} == {7: 1, "7": 3}
    assert [str(bad) for bad in table.bad] == [
        "some.json: entry id 7: its id 7 is that of an earlier entry; each needs its own"
    ]


@pytest.mark.parametrize("name", [None, True, 1.5, "", [1], {}])
def test_read_table_refuses_an_identifier_of_another_type(name: Any) -> None:
    table = read_table(FILE, {"things": [{"thing_id": name}, {"thing_id": 0}]}, "thing_id", "things")
    assert list(table.rows) == [0]
    assert table.bad[0].reason == f"its thing_id is {name!r}; give an integer or a text"


def test_read_table_names_an_entry_without_identifier_by_its_place() -> None:
    table = read_table(FILE, {"things": [{"thing_id": 0}, {"x": 1}, "thing"]}, "thing_id", "things")
    assert sorted((bad.entry, bad.reason) for bad in table.bad) == [
        ("things[1]", "it has no 'thing_id'; it has: x"),
        ("things[2]", "it is 'thing'; give a JSON object"),
    ]


def test_table_find_says_that_the_other_file_writes_another_type() -> None:
    table = read_table(FILE, [{"id": 17}, {"id": "18"}], "id")
    with pytest.raises(Defect, match=r"its image_id '017' is unknown to some.json, which writes it 17; use one type"):
        table.find("image_id", record(image_id="017"))
    with pytest.raises(Defect, match=r"its image_id 18 is unknown to some.json, which writes it '18'; use one type"):
        table.find("image_id", record(image_id=18))
    with pytest.raises(Defect, match=r"its image_id 'cat' is unknown to some.json$"):
        table.find("image_id", record(image_id="cat"))
