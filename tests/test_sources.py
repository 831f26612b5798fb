"""Sources of every format: the rows, their lines, and where a file is malformed."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sentiment import sources
from sentiment.errors import DataError


@pytest.fixture
def rows_of(tmp_path):
    """The rows of a file with this name and content, as (line, row)."""

    def read(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(sources.rows(path, sources.file_format(name)))

    return read


@pytest.fixture
def parquet(tmp_path):
    """A Parquet file of 3,000 distinct texts."""
    path = tmp_path / "avaliacoes.parquet"
    pq.write_table(pa.table({"texto": [f"O pedido {i} chegou bem" for i in range(3000)], "nota": [5] * 3000}), path)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_a_csv_is_read_whatever_separates_its_fields(rows_of, delimiter):
    content = "\n".join(delimiter.join(fields) for fields in (("texto", "nota"), ("Adorei a panela", "5"), ("Veio riscada", "2")))
    assert rows_of("a.csv", content) == [
        (2, {"texto": "Adorei a panela", "nota": "5"}),
        (3, {"texto": "Veio riscada", "nota": "2"}),
    ]


def test_excels_line_before_the_header_names_the_separator(rows_of):
    content = "sep=|\n" + "a;texto|nota\nBom; mesmo|5\n"
    assert list(rows_of("a.csv", content)) == [(3, {"a;texto": "Bom; mesmo", "nota": "5"})]


def test_commas_in_the_text_do_not_hide_the_semicolons_of_the_header(rows_of):
    assert rows_of("a.csv", "texto;nota\nbonita, leve, barata;5\n") == [(2, {"texto": "bonita, leve, barata", "nota": "5"})]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_field_runs_over_several_lines_and_the_lines_are_still_counted(rows_of, end):
    content = end.join(["texto,nota", '"Primeira linha', "", 'disse ""ótimo"", e só",5', "", "Curto,1", ""])
    assert rows_of("a.csv", content) == [
        (2, {"texto": f'Primeira linha{end}{end}disse "ótimo", e só', "nota": "5"}),
        (6, {"texto": "Curto", "nota": "1"}),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "texto,nota\nAção,5\n"), ("a.jsonl", '{"texto": "Ação", "nota": "5"}\n')],
)
def test_a_byte_order_mark_is_no_part_of_the_first_column(rows_of, name, content):
    assert [row for _, row in rows_of(name, content.encode("utf-8-sig"))] == [{"texto": "Ação", "nota": "5"}]


@pytest.mark.parametrize("name", ["a.csv.gz", "A.CSV.GZ"])
def test_a_gzipped_file_reads_like_the_plain_one(rows_of, name):
    assert rows_of(name, gzip.compress("texto,nota\nAção,5\n".encode())) == [(2, {"texto": "Ação", "nota": "5"})]


def test_json_lines_pass_over_empty_lines(rows_of):
    assert rows_of("a.jsonl", '{"texto": "Bom", "nota": 5}\n\n{"texto": "Ruim", "nota": null}\n') == [
        (1, {"texto": "Bom", "nota": 5}),
        (3, {"texto": "Ruim", "nota": None}),
    ]


def test_a_text_file_holds_one_review_a_line(rows_of):
    assert rows_of("a.txt", "Bom, mas caro\r\nRuim") == [(1, {"text": "Bom, mas caro"}), (2, {"text": "Ruim"})]


def test_parquet_keeps_its_types_and_numbers_its_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texto": ["Bom", None], "nota": [5, 1], "source_line": [90, 91]}), path)
    (table,) = sources.tables(path, "parquet")
    assert table.to_pydict() == {"texto": ["Bom", None], "nota": [5, 1], "source_line": [1, 2]}
    assert table.schema.field("nota").type == pa.int64()


def test_a_table_of_text_has_strings_and_nulls_and_the_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"texto": "", "nota": 5, "sim": True}, {"texto": "Só ok", "marcas": ["é"]}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (table,) = sources.tables(path, "jsonl")
    assert table.to_pydict() == {
        "texto": [None, "Só ok"],
        "nota": ["5", None],
        "sim": ["true", None],
        "marcas": [None, '["é"]'],
        "source_line": [1, 2],
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_long_file_comes_in_several_tables_and_loses_no_row(tmp_path, kind):
    path, count = tmp_path / f"a.{kind}", sources.CHUNK_ROWS + 5
    if kind == "csv":
        path.write_text("nota\n" + "".join(f"{i}\n" for i in range(count)), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(f'{{"nota": {i}}}\n' for i in range(count)), encoding="utf-8")
    else:
        pq.write_table(pa.table({"nota": range(count)}), path)
    tables = list(sources.tables(path, kind))
    assert len(tables) > 1
    assert [int(value) for table in tables for value in table["nota"].to_pylist()] == list(range(count))
    first = 2 if kind == "csv" else 1
    assert [line for table in tables for line in table["source_line"].to_pylist()] == list(range(first, first + count))


def test_a_column_that_turns_up_late_is_refused_and_not_lost(tmp_path):
    path, count = tmp_path / "a.jsonl", sources.CHUNK_ROWS
    path.write_text('{"nota": 1}\n' * count + '{"nota": 1, "marca": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=f"line {count + 1}: column marca"):
        list(sources.tables(path, "jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "texto,nota\nBom,5\nRuim\n", "line 3: 1 fields where the header has 2"),
        ("a.csv", 'texto,nota\n"duas\nlinhas",5\nRuim,1,2\n', "line 4: 3 fields where the header has 2"),
        ("a.csv", 'texto,nota\nBom,5\n"sem fim,1\nmais,2\n', "line 3: .*quotes"),
        ("a.csv", 'texto,nota\n"Bom"mesmo,5\n', "line 2: .*quotes"),
        ("a.csv", "texto,nota\nBom,5\nAção,1\n".encode("latin-1"), "line 3: not UTF-8.*iconv -f cp1252 "),
        ("a.csv", "texto,nota\nBom,5\n".encode("utf-16"), "line 1: not UTF-8.*iconv -f utf-16 "),
        ("a.csv", "sep=;\ntexto;nota\nBom;5\nRuim\n", "line 4: 1 fields where the header has 2"),
        ("a.csv", "texto,texto\nBom,5\n", "line 1: the header"),
        ("a.csv", "texto,nota\rBom,5\rRuim,1\r", "line 1"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", '{"texto": "Bom"}\n{"texto": Ruim}\n', "line 2: not JSON"),
        ("a.jsonl", '{"texto": "Bom"}\n\n["Ruim"]\n', "line 3: list where an object"),
        ("a.jsonl", b'{"texto": "\xe7"}\n', "line 1: not UTF-8"),
        ("a.txt", b"Bom\nA\xe7\xe3o\n", "line 2: not UTF-8"),
        ("a.csv.gz", b"texto,nota\n", "Not a gzipped file"),
    ],
)
def test_a_malformed_line_stops_with_its_number(rows_of, name, content, words):
    with pytest.raises(DataError, match=words) as error:
        rows_of(name, content)
    assert name in str(error.value)


def test_a_gzipped_file_that_is_cut_off_says_after_which_line(rows_of):
    whole = gzip.compress(b"nota\n" + b"".join(b"%d\n" % (i * 7919 % 10007) for i in range(10_000)))
    with pytest.raises(DataError, match=r"after line [1-9]\d*: .*fetch the file again"):
        rows_of("a.csv.gz", whole[: len(whole) // 2])


def test_a_parquet_file_that_is_cut_off_is_no_whole_file(parquet):
    parquet.write_bytes(parquet.read_bytes()[:-100])
    with pytest.raises(DataError, match="no whole Parquet file"):
        list(sources.tables(parquet, "parquet"))


def test_a_damaged_page_of_a_parquet_file_is_no_whole_file(parquet):
    content = bytearray(parquet.read_bytes())
    content[200:240] = bytes(byte ^ 0xFF for byte in content[200:240])
    parquet.write_bytes(content)
    with pytest.raises(DataError, match="no whole Parquet file"):
        list(sources.tables(parquet, "parquet"))


@pytest.mark.parametrize("content", [b"", b"texto,nota\n"])
def test_an_empty_parquet_file_is_no_whole_file(parquet, content):
    parquet.write_bytes(content)
    with pytest.raises(DataError, match="no whole Parquet file"):
        list(sources.tables(parquet, "parquet"))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("dados/a.CSV", "csv"),
        ("a.tsv", "csv"),
        ("a.json.gz", "jsonl"),
        ("https://exemplo.org/x/a.csv.gz?baixar=1#topo", "csv"),
        ("hf://datasets/loja/avaliacoes@0123abc/b.parquet", "parquet"),
        ("s3://balde/a.ndjson", "jsonl"),
    ],
)
def test_the_format_is_the_suffix_of_a_path_or_an_address(source, kind):
    assert sources.file_format(source) == kind


@pytest.mark.parametrize("source", ["a.xlsx", "a", "a.gz", "https://exemplo.org/a.csv/baixar"])
def test_an_unknown_suffix_is_refused_with_those_that_are_known(source):
    with pytest.raises(DataError, match=r"no known format.*\.csv.*\.parquet") as error:
        sources.file_format(source)
    assert source in str(error.value)


@pytest.mark.parametrize("name", ["falta.csv", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="is no file"):
        sources.fetch(str(tmp_path / name), tmp_path)
