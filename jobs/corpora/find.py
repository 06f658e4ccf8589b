"""From the patterns of `--corpus` to files."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from actcache.jobs.corpora.files import CorpusFile, local_files
from actcache.jobs.corpora.remote import Access, remote_files
from actcache.jobs.corpora.saved import is_saved_dataset, saved_files
from actcache.schemas.errors import InvalidInput


def find(patterns: tuple[str, ...], access: Access, split: str | None) -> tuple[list[CorpusFile], bool]:
    """The files of a corpus in the order of the patterns, each once, and whether they are of saved datasets.

    Raises:
        InvalidInput: a pattern matches nothing, a plain folder, or a scheme that is not read.
        StoreError: a server refuses or fails.
    """
    local: dict[Path, str] = {}
    order: list[Path | CorpusFile] = []
    saved = 0
    for pattern in patterns:
        scheme = pattern.split("://", 1)[0] if "://" in pattern else "file"
        if scheme in ("s3", "http", "https"):
            order += remote_files(pattern, access)
            continue
        if scheme != "file":
            raise InvalidInput(f"{pattern}: a corpus is read from local files, s3://, http(s):// or hf://datasets/…")
        found = _matches(pattern.removeprefix("file://"), split)
        saved += is_saved_dataset(Path(pattern.removeprefix("file://")).expanduser())
        for path, name in found:
            if path not in local:
                local[path] = name
                order.append(path)
    if saved not in (0, len(patterns)):
        raise InvalidInput("the corpus mixes saved datasets with files; build them as two datasets")
    opened = {file.path: file for file in local_files(local)}
    files: dict[str, CorpusFile] = {}
    for item in order:
        file: CorpusFile = opened[item] if isinstance(item, Path) else item
        files.setdefault(file.url if hasattr(file, "url") else file.where, file)
    return list(files.values()), saved > 0


def _matches(pattern: str, split: str | None) -> list[tuple[Path, str]]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        folder = Path(expanded).absolute()
        if is_saved_dataset(folder):
            return saved_files(folder, split)
        raise InvalidInput(
            f"{pattern}: a folder, and no dataset that save_to_disk wrote; "
            f"give a glob such as '{pattern.rstrip('/')}/**/*.txt'"
        )
    if os.path.isfile(expanded):
        return [(Path(expanded).absolute(), os.path.basename(expanded))]
    files = sorted(Path(name).absolute() for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
    if not files:
        raise InvalidInput(f"{pattern}: no such file, and no file matches it as a glob")
    base = _fixed_part(expanded)
    return [(path, path.relative_to(base).as_posix()) for path in files]


def _fixed_part(pattern: str) -> Path:
    """The folder before the first wildcard of a glob."""
    parts = Path(pattern).absolute().parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])
