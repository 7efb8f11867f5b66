"""A table of rows as text, printed or in a file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def show(rows: Sequence[Row]) -> None:
    """Prints a table; what a row doesn't have stays empty."""
    columns = columns_of(rows)
    texts = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        print("  ".join(cell.rjust(width) for cell, width in zip(text, widths, strict=True)).rstrip())


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Returns all columns of the rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes a table; what a row doesn't have stays empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
