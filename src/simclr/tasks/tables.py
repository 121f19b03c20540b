"""Write a table batch by batch to a .csv or .parquet file, which is published atomically at the end."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simclr.errors import UserError
from simclr.files import replacing, writing

ROW_GROUP = 16_384
"""Minimum number of rows in a row group of a .parquet file; rows are buffered until then."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""Text that begins with one of these gets a ' in front in .csv: a spreadsheet would run it as a formula. The ' itself
is among them, so that taking one leading ' away always gives the text back."""

Columns = Mapping[str, type[str] | type[float]]
"""Name -> kind, in order; numbers are float32."""
Write = Callable[[Sequence[Sequence[Any]]], None]
"""Appends rows, given as the values of each column."""


def require_table(path: Path) -> None:
    """Reject a file name without a supported extension, or a missing pyarrow.

    Raises:
        UserError: Another ending than .csv and .parquet, or the latter without pyarrow.
    """
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"--out was {path}; its name must end in .csv or .parquet.")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401, an extra
        except ImportError:
            raise UserError(
                f"{path} needs pyarrow, which is not installed: `pip install 'simclr-torch[parquet]'`, or write a .csv "
                "file."
            ) from None


@contextmanager
def open_table(path: Path, columns: Columns) -> Iterator[Write]:
    """Context that gives a function to append rows; `path` is written at its end, and not after an exception.

    In .csv text is quoted and numbers are not, lines end in a line feed, and the encoding is UTF-8; a number has as
    many digits as tell it from its neighbours. Text that a spreadsheet would take for a formula (it begins with = + -
    @, tab or carriage return) or that begins with ' has a ' in front. In .parquet text is as it is.

    Raises:
        UserError: The file cannot be written.
    """
    kind = _parquet if path.suffix.lower() == ".parquet" else _csv
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, kind(temporary, columns) as add:
            yield add


@contextmanager
def _csv(path: Path, columns: Columns) -> Iterator[Write]:
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        lines.writerow(map(_no_formula, columns))
        kinds = list(columns.values())

        def add(values: Sequence[Sequence[Any]]) -> None:
            shown = (
                map(_no_formula, column) if kind is str else column for column, kind in zip(values, kinds, strict=True)
            )
            lines.writerows(zip(*shown, strict=True))

        yield add


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


@contextmanager
def _parquet(path: Path, columns: Columns) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema([(name, pa.string() if kind is str else pa.float32()) for name, kind in columns.items()])
    waiting: list[pa.RecordBatch] = []

    with ParquetWriter(path, schema) as file:

        def write() -> None:
            if waiting:
                file.write_table(pa.Table.from_batches(waiting))
                waiting.clear()

        def add(values: Sequence[Sequence[Any]]) -> None:
            arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            waiting.append(pa.record_batch(arrays, schema=schema))
            if sum(map(len, waiting)) >= ROW_GROUP:
                write()

        yield add
        write()
