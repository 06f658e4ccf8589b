"""Folders that `save_to_disk` of Hugging Face datasets wrote: Arrow files in the order that `state.json` gives."""

from __future__ import annotations

from pathlib import Path

from actcache.jobs.json_file import json_object
from actcache.schemas.errors import InvalidInput

STATE, SPLITS = "state.json", "dataset_dict.json"
DEFAULT_SPLIT = "train"


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder holds a saved `Dataset` or `DatasetDict`."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def saved_files(folder: Path, split: str | None) -> list[tuple[Path, str]]:
    """The Arrow files of a saved dataset, or of one split of it, with their names in the folder.

    Raises:
        InvalidInput: there is no such split, or the folder is damaged.
    """
    chosen = folder
    if (folder / SPLITS).is_file():
        splits = [str(name) for name in json_object(folder / SPLITS).get("splits", [])]
        wanted = split or DEFAULT_SPLIT
        if wanted not in splits:
            raise InvalidInput(f"{folder}: no split {wanted!r} (there is: {', '.join(splits)}); choose with --split")
        chosen = folder / wanted
    elif split is not None:
        own = json_object(folder / STATE).get("_split")
        if own != split:
            raise InvalidInput(f"{folder}: one dataset without splits, of {own!r}; leave --split {split} out")
    state = json_object(chosen / STATE)
    if state.get("_indices_data_files"):
        raise InvalidInput(f"{chosen}: rows chosen by an index file; save it anew with this version of datasets")
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else []
    names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    if not names or not all(Path(name).name == name for name in names):
        raise InvalidInput(f"{chosen / STATE}: names no data files; is it what save_to_disk wrote?")
    missing = [name for name in names if not (chosen / name).is_file()]
    if missing:
        raise InvalidInput(f"{chosen / missing[0]}: no such file, though {STATE} names it")
    return [(chosen / name, (chosen / name).relative_to(folder).as_posix()) for name in names]
