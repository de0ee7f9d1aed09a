"""Whether a file holds the data that a checkpoint was trained on: by content, for names are often alike."""

from pathlib import Path

from data_provider.data_loader import Series, data_mark
from data_provider.table import Table, read_table


def trained_on(record: dict, file: Path, data: Series | Table | None = None, fill: str | None = None) -> bool:
    """Whether the first rows of `file` are the training rows of a checkpoint; it may have grown since.

    Args:
        record: the checkpoint's. One of older code has no mark of the content: there the name decides.
        data: what was read from the file already; what is not enough is read again, filled as by `fill`.
    """
    held = record.get("data", {})
    mark, names = held.get("mark"), record.get("columns")
    if not isinstance(mark, dict) or type(mark.get("rows")) is not int or not isinstance(names, list):
        return held.get("file") == file.name
    if isinstance(data, Series) and data.columns == names and data.splits.train == mark["rows"]:
        return data.mark == mark.get("sha256")
    table = data if isinstance(data, Table) else read_table(file, fill)
    if not 0 < mark["rows"] <= len(table.dates) or any(name not in table.columns for name in names):
        return False
    values = table.values[: mark["rows"], [table.columns.index(name) for name in names]]
    return data_mark(values) == mark.get("sha256")
