"""The file formats of the text. A new format is one entry in FORMATS."""

from pathlib import Path
from typing import Any

# The builder of `datasets` for each suffix, or (builder, options). With "text" a file is one document, else a row is.
FORMATS: dict[str, str | tuple[str, dict[str, Any]]] = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FILES_HELP = f"paths or globs of files: {' '.join(FORMATS)}, also with .gz"


def find_format(path: str) -> tuple[str, dict[str, Any]] | None:
    """Return the (builder, options) for the suffix of ``path``, a local path or a URL; None if it is unknown."""
    path = path.partition("?")[0] if "://" in path else path
    entry = FORMATS.get(Path(path.removesuffix(".gz")).suffix.lower())
    return (entry, {}) if isinstance(entry, str) else entry
