"""Readers of one data file: rows one at a time, each with the place a message can name.

Text formats are parsed line by line here, because a library that reads a whole file at once cannot say which
line is broken; parquet and arrow are read by pyarrow. A row that cannot be read is handed on as a `BadRow`,
so that the caller decides whether it ends the run.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
JSON_TYPES = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    place: str
    """File and line or row number, both counted from 1."""
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    place: str
    problem: str


Record = Row | BadRow


def read_file(path: Path) -> Iterator[Record]:
    """The rows of a file whose suffix is one of READERS."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown format {path.suffix or '(no suffix)'!r}; known are {', '.join(READERS)}"
        )
    try:
        yield from reader(path)
    except OSError as cause:
        raise DataError(f"{path}: cannot be read ({cause.strerror or cause})") from cause


def read_jsonl(path: Path) -> Iterator[Record]:
    for place, line in text_lines(path):
        yield parsed(line, place) if isinstance(line, str) else line


def read_json(path: Path) -> Iterator[Record]:
    """An array of rows, or one row on each line."""
    content = path.read_bytes().removeprefix(UTF8_MARK)
    if not content.lstrip().startswith(b"["):
        hint = "a .json file holds an array of rows, or one row on each line"
        for record in read_jsonl(path):
            yield record if isinstance(record, Row) else replace(record, problem=f"{record.problem}; {hint}")
        return
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise DataError(f"{path}:{line}: {undecodable(cause)}") from cause
    except (ValueError, RecursionError) as cause:
        line = cause.lineno if isinstance(cause, json.JSONDecodeError) else 1
        raise DataError(f"{path}:{line}: not valid JSON ({json_fault(cause)})") from cause
    for number, value in enumerate(values, 1):
        yield as_row(value, f"{path}, row {number}")


def read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated with a header. Bytes that are not UTF-8 become lone surrogates and mark their row."""
    refuse_utf16(path)
    # The default of 128 KiB is less than a long question. The limit is the whole process's.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as cause:
            raise DataError(f"{path}:1: not valid CSV ({cause})") from cause
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: the header names a column twice: {', '.join(header)}")
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as cause:
                yield BadRow(place=place, problem=f"not valid CSV ({cause})")
                continue
            if fields:
                yield csv_row(header, fields, place)


def csv_row(header: list[str], fields: list[str], place: str) -> Record:
    if len(fields) != len(header):
        return BadRow(place=place, problem=f"{len(fields)} fields where the header has {len(header)}")
    for name, value in zip(header, fields, strict=True):
        if not is_unicode(value):
            return BadRow(place=place, problem=f"column {name!r} is not UTF-8 text")
    return Row(place=place, values=dict(zip(header, fields, strict=True)))


def read_text(path: Path) -> Iterator[Record]:
    """One question per line, in a column named `question`."""
    for place, line in text_lines(path):
        yield Row(place=place, values={"question": line}) if isinstance(line, str) else line


def read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    def batches() -> Iterator["RecordBatch"]:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches()

    yield from table_rows(path, batches())


def read_arrow(path: Path) -> Iterator[Record]:
    """Arrow's IPC format, as a file or (what `datasets` writes) as a stream."""
    import pyarrow

    def batches() -> Iterator["RecordBatch"]:
        with pyarrow.OSFile(str(path)) as file:
            try:
                opened = pyarrow.ipc.open_file(file)
            except pyarrow.ArrowInvalid:
                file.seek(0)
                yield from pyarrow.ipc.open_stream(file)
                return
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))

    yield from table_rows(path, batches())


def table_rows(path: Path, batches: Iterator["RecordBatch"]) -> Iterator[Record]:
    """A damaged table ends the reading whatever data.on_bad_row says: there is no next row to go on with."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield Row(place=f"{path}, row {number}", values=values)
    except (pyarrow.ArrowException, ValueError) as cause:
        fault = str(cause).splitlines()[0]
        raise DataError(
            f"{path}: cannot be read after row {number} ({fault}); write the file anew"
        ) from cause


def text_lines(path: Path) -> Iterator[tuple[str, str | BadRow]]:
    """Place and text of every line that is not blank. Only a line feed ends one: JSON may hold U+2028."""
    refuse_utf16(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            content = raw.removeprefix(UTF8_MARK) if number == 1 else raw
            try:
                line = content.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as cause:
                yield place, BadRow(place=place, problem=undecodable(cause))
                continue
            if line.strip():
                yield place, line


def parsed(line: str, place: str) -> Record:
    try:
        return as_row(json.loads(line), place)
    except (ValueError, RecursionError) as cause:
        return BadRow(place=place, problem=f"not valid JSON ({json_fault(cause)})")


def as_row(value: Any, place: str) -> Record:
    if isinstance(value, dict):
        return Row(place=place, values=value)
    return BadRow(
        place=place, problem=f"{JSON_TYPES.get(type(value), 'null')}, not an object with named columns"
    )


def json_fault(cause: Exception) -> str:
    if isinstance(cause, json.JSONDecodeError):
        return f"{cause.msg} at column {cause.colno}"
    return str(cause)


def undecodable(cause: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{cause.object[cause.start]:02x}: {cause.reason})"


def is_unicode(text: str) -> bool:
    """False where a text holds half a surrogate pair, which no encoding can write and no tokenizer read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in UTF16_MARKS:
            raise DataError(f"{path}: is UTF-16 text; save it as UTF-8")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}
