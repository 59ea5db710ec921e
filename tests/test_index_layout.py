"""Index files: rows become samples, and what is wrong is named by file and line."""

import json

import pytest

from uad_plugins.data.layouts import scan
from uad_plugins.data.samples import relative_to
from uad_plugins.errors import UadxError


def rows(table):
    """The table as readable rows: (path, category, label, split, mask, defect)."""
    return [
        (table.relative(i), s.category, s.label, s.split, relative_to(s.mask, table.root), s.defect)
        for i, s in enumerate(table)
    ]


INDEX = [
    {"path": "img/a b.png", "category": "schräg", "split": "training", "label": "good"},
    {"path": "img/c.png", "category": "schräg", "split": "Valid", "label": "0"},
    {"path": "img/d.png", "category": "bolt", "split": "test", "label": "NG", "mask": "gt/d.png", "defect": "crack"},
    {"path": "img/e.png", "category": "bolt", "split": "TEST", "label": "defective"},
]
INDEXED = [
    ("img/d.png", "bolt", 1, "test", "gt/d.png", "crack"),
    ("img/e.png", "bolt", 1, "test", "", "anomalous"),
    ("img/a b.png", "schräg", 0, "train", "", "good"),
    ("img/c.png", "schräg", 0, "val", "", "good"),
]


def write_index(file, entries):
    if file.suffix == ".csv":
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
        lines = [",".join(columns), *(",".join(str(entry.get(key, "")) for key in columns) for entry in entries)]
    else:
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    file.write_text("\n\n".join(lines) if file.suffix != ".csv" else "\n".join(lines), encoding="utf-8-sig")
    return file


@pytest.mark.parametrize("name", ["index.csv", "index.jsonl", "index.ndjson", "other.csv"])
def test_an_index_file_names_the_samples(tmp_path, name):
    file = write_index(tmp_path / name, INDEX)
    assert rows(scan(file)) == INDEXED
    if name.startswith("index"):
        assert rows(scan(tmp_path)) == INDEXED


def test_json_truth_values_are_labels(tmp_path):
    entries = [dict(INDEX[0], path=f"{value}.png", label=value) for value in (False, True, 0, 1)]
    assert [(s.label) for s in scan(write_index(tmp_path / "index.jsonl", entries))] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "problem", "hint"),
    [
        ({"label": "maybe"}, "label 'maybe' is not understood", "use normal or anomalous (0 or 1)"),
        ({"split": "holdout"}, "split 'holdout' is not understood", "use one of train, val, test"),
        ({"category": " "}, "no value for 'category'", "columns: path, category, split, label, mask, defect"),
    ],
)
@pytest.mark.parametrize("name", ["index.csv", "index.jsonl"])
def test_a_bad_index_row_is_named_by_file_and_line(tmp_path, name, change, problem, hint):
    file = write_index(tmp_path / name, [*INDEX[:2], {**INDEX[2], **change}])
    line = 4 if name == "index.csv" else 5
    with pytest.raises(UadxError) as error:
        scan(tmp_path)
    assert (error.value.message, error.value.hint) == (f"{file}:{line}: {problem}", hint)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"split": "test"}, "in split 'train'"),
        ({"split": "test", "path": "img/x/../a b.png"}, "in split 'train'"),
        ({"category": "nut"}, "with another category"),
        ({"defect": "fine"}, "with another defect"),
    ],
)
def test_an_image_that_is_named_twice_is_refused_by_file_and_line(tmp_path, uadx, change, difference):
    row = INDEX[0]
    again = {**row, **change}
    file = write_index(tmp_path / "index.csv", [row, INDEX[-1], again])
    with pytest.raises(UadxError) as error:
        scan(tmp_path)
    assert error.value.message == f"{file}:4: '{again['path']}' is in line 2 already, {difference}"
    status, _, err = uadx("data", "check", tmp_path)
    assert status == 1
    assert f"error: {error.value.message}\nhint: name each image once" in err


def test_a_row_that_is_repeated_counts_once(tmp_path):
    file = write_index(tmp_path / "index.jsonl", [*INDEX, {**INDEX[0], "path": f"./{INDEX[0]['path']}"}, INDEX[1]])
    assert rows(scan(file)) == INDEXED


@pytest.mark.parametrize("blank", ["\n", " \n\r\n", ",,,\n"])
def test_blank_lines_above_the_heading_of_an_index_are_skipped(tmp_path, blank):
    file = write_index(tmp_path / "index.csv", INDEX)
    text = file.read_text(encoding="utf-8-sig")
    file.write_text(blank + text)
    assert rows(scan(file)) == INDEXED
    file.write_text("\n\n" + text + "\na.png,bolt,train,maybe\n")
    with pytest.raises(UadxError, match=r"index.csv:8: label 'maybe'"):
        scan(file)
    file.write_text(blank)
    with pytest.raises(UadxError, match="no image found"):
        scan(file)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_an_index_of_a_spreadsheet_may_have_other_separators(tmp_path, separator):
    file = write_index(tmp_path / "index.csv", INDEX)
    expected = list(scan(file))
    file.write_text(file.read_text().replace(",", separator))
    assert list(scan(file)) == expected


def test_a_misspelt_index_column_is_found(tmp_path):
    file = tmp_path / "index.csv"
    file.write_text("path,kategory,split,label\na.png,bolt,train,0\n")
    with pytest.raises(UadxError) as error:
        scan(file)
    hint = "columns: path, category, split, label, mask, defect; not understood: 'kategory'"
    assert (error.value.message, error.value.hint) == (f"{file}:2: no value for 'category'", hint)


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"path": "a.png"', "not JSON: Expecting ',' delimiter"), ('["a.png"]', "not a JSON object")],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path, text, problem):
    file = write_index(tmp_path / "index.jsonl", INDEX[:1])
    file.write_text(file.read_text(encoding="utf-8") + "\n" + text, encoding="utf-8")
    with pytest.raises(UadxError) as error:
        scan(file)
    assert error.value.message == f"{file}:2: {problem}"


@pytest.mark.parametrize("name", ["index.csv", "index.jsonl"])
def test_an_index_that_is_not_utf8_is_named(tmp_path, name):
    file = tmp_path / name
    file.write_bytes("path,category,split,label\ngerät.png,bolt,train,0\n".encode("latin-1"))
    with pytest.raises(UadxError) as error:
        scan(file)
    assert error.value.message.startswith(f"{file}: cannot be read: 'utf-8' codec can't decode byte 0xe4")
    assert error.value.hint == "save it as UTF-8 text"
