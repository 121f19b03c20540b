"""Values over seeds as a table: mean ± sample standard deviation, for a terminal or for markdown.

A table is a list of rows, a row being a name and a list of values (one per seed) for each column. Columns stand in the
order in which the rows first name them; a row may leave some out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simclr.evaluation.metrics import mean_and_spread


@dataclass(frozen=True)
class Row:
    """One row of a table: what was measured, and its values."""

    name: str
    values: Mapping[str, Sequence[float]]
    """Column -> one value per seed; empty: not measured."""
    baseline: bool = False
    """Whether the row is a baseline; its name then says so."""


def with_spread(values: Sequence[float], *, percent: bool = True, digits: int = 1) -> str:
    """Mean and spread as text: "71.2 ± 0.4", or "71.2" of a single value, or "-" of none.

    Args:
        percent: Values are shares in [0, 1], printed in percent without the sign.
        digits: After the point.
    """
    if not len(values):
        return "-"
    scale = 100 if percent else 1
    mean, spread = mean_and_spread(values)
    return f"{scale * mean:.{digits}f}" + ("" if spread is None else f" ± {scale * spread:.{digits}f}")


def text_table(rows: Sequence[Row], *, corner: str = "", percent: bool = True, digits: int = 1) -> str:
    """Aligned lines for a terminal.

    Args:
        corner: Text above the names.
        percent, digits: As in `with_spread`.
    """
    columns = _columns(rows)
    lines = [[corner, *columns]]
    for row in rows:
        name = f"{row.name} (baseline)" if row.baseline else row.name
        lines.append([name, *(with_spread(row.values.get(c, ()), percent=percent, digits=digits) for c in columns)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def markdown_table(rows: Sequence[Row], *, corner: str = "", percent: bool = True, digits: int = 1) -> str:
    """The same as a markdown table, where the best mean of each column, as printed, is bold: the highest one.

    Baselines can be the best too. A column with a single row has no best.
    """
    columns = _columns(rows)
    best = {column: _best(rows, column, percent, digits) for column in columns}
    lines = [[corner, *columns], ["---", *("---:" for _ in columns)]]
    for row in rows:
        cells = [f"{row.name} (baseline)" if row.baseline else row.name]
        for column in columns:
            values = row.values.get(column, ())
            cell = with_spread(values, percent=percent, digits=digits)
            cells.append(f"**{cell}**" if len(values) and _printed(values, percent, digits) == best[column] else cell)
        lines.append(cells)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def seeds_note(rows: Sequence[Row]) -> str:
    """What the cells show: "mean ± sample standard deviation over 3 seeds"."""
    numbers = sorted({len(values) for row in rows for values in row.values.values() if len(values)})
    if not numbers or numbers == [1]:
        return "one seed, so no spread"
    counts = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"mean ± sample standard deviation over {counts} seeds"


def error_note(num_test: int, what: str = "an accuracy") -> str:
    """Standard error of an accuracy on this number of test images, in words: the binomial one at 50 %, its maximum."""
    return f"the standard error of {what} is at most {50 / num_test**0.5:.1f} points"


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.values))


def _best(rows: Sequence[Row], column: str, percent: bool, digits: int) -> float | None:
    means = [_printed(row.values[column], percent, digits) for row in rows if len(row.values.get(column, ()))]
    means = [mean for mean in means if not math.isnan(mean)]
    return max(means) if len(means) > 1 else None


def _printed(values: Sequence[float], percent: bool, digits: int) -> float:
    return float(f"{(100 if percent else 1) * mean_and_spread(values)[0]:.{digits}f}")
