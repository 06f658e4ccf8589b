"""Datasets of the Hugging Face hub, pinned to a commit and streamed; without a network, from the local hub cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.jobs.corpora.document import Bad, BadRow, Document
from actcache.jobs.corpora.field import Field
from actcache.schemas.errors import ActcacheError, InvalidInput, StoreError
from actcache.schemas.plan import Source

SCHEME = "hf://"
DEFAULT_SPLIT = "train"
_URL = re.compile(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)(?:@([^@\s]+))?/?")


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset at one commit. Its rows are counted through all of its files."""

    name: str
    commit: str
    config: str | None
    split: str
    cached: Path | None
    field: Field

    @property
    def source(self) -> Source:
        """What the plan records."""
        config = f", configuration {self.config}" if self.config else ""
        return Source(
            name=f"{SCHEME}datasets/{self.name}@{self.commit}{config}, split {self.split}",
            bytes=None,
            validator=f"commit:{self.commit}",
        )

    @property
    def where(self) -> str:
        """The split as an error names it."""
        return f"{SCHEME}datasets/{self.name}@{self.commit[:12]} ({self.split})"

    def documents(self, source: int) -> Iterator[Document | BadRow]:
        """Every row.

        Raises:
            InvalidInput: there is no such configuration or split.
            StoreError: the hub fails.
        """
        for row, values in enumerate(self._stream()):
            try:
                yield Document(source, row, self.field.of(values))
            except Bad as bad:
                yield bad.at(source, row, f"{self.where}, row {row}")

    def check_unchanged(self) -> None:
        """Nothing to check: a commit does not change."""

    def n_rows(self) -> int | None:
        """How many rows the split has, as the dataset says of itself; None where it does not.

        Raises:
            InvalidInput: there is no such configuration.
            StoreError: the hub fails.
        """
        with self._errors():
            splits = self._builder().info.splits
        found = splits.get(self.split) if splits else None
        return int(found.num_examples) if found is not None and found.num_examples else None

    def _stream(self) -> Iterator[Any]:
        with self._errors():
            rows = self._builder().as_streaming_dataset(split=self.split)
            if rows.column_names and self.field.name in rows.column_names:
                rows = rows.select_columns([self.field.name])
            yield from rows

    def _builder(self) -> Any:
        import datasets

        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        place: dict[str, Any] = {"revision": self.commit} if self.cached is None else {}
        builder = datasets.load_dataset_builder(str(self.cached or self.name), self.config, **place)
        if type(builder).__module__.startswith("datasets.packaged_modules.cache"):
            # What datasets falls back to when the hub fails: some earlier state, of whatever commit.
            raise StoreError(f"{self.where}: the hub cannot be reached; run the same command again")
        return builder

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ActcacheError:
            raise
        except (OSError, ConnectionError) as error:
            raise StoreError(f"{self.where}: cannot be read: {_first(error)}; run the same command again") from None
        except (ValueError, KeyError, RuntimeError) as error:
            raise InvalidInput(f"{self.where}: {_first(error)}; choose with --dataset-config and --split") from None


def hub_dataset(url: str, config: str | None, split: str | None, field: Field) -> HubDataset:
    """The dataset of a `hf://datasets/org/name[@revision]`, its revision resolved to a commit.

    Raises:
        InvalidInput: the URL is of another form, or there is no such dataset or revision.
        StoreError: the hub cannot be reached, and the dataset is not wholly in the local cache.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise InvalidInput(
            f"{url}: not of the form hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION; "
            "configuration and split are chosen with --dataset-config and --split"
        )
    name, revision = match.groups()
    commit, cached = _pinned(name, revision, url)
    return HubDataset(name, commit, config, split or DEFAULT_SPLIT, cached, field)


def _pinned(name: str, revision: str | None, url: str) -> tuple[str, Path | None]:
    """The commit of a revision, and the folder of its files where they are in the local cache and the hub is not reached."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=30).sha
        if commit:
            return str(commit), None
        raise StoreError(f"{url}: the hub does not say which commit this is")
    except RevisionNotFoundError:
        raise InvalidInput(f"{url}: the dataset has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InvalidInput(f"{url}: no such dataset on the hub (a private one needs HF_TOKEN)") from None
    except HfHubHTTPError as error:
        failed = _first(error)
    except ActcacheError:
        raise
    except Exception as error:  # no network, in the words of whatever library the hub's client is built on
        failed = _first(error)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except Exception as error:
        raise StoreError(
            f"{url}: the hub cannot be reached ({failed}), and the local cache has not all of it ({_first(error)})"
        ) from None
    _check_shards(folder, url)
    return folder.name, folder


def _check_shards(folder: Path, url: str) -> None:
    """Refuse a snapshot of which parts were never downloaded, as far as its files' names tell."""
    shards = re.compile(r"(.*?)-?(\d+)-of-(\d+)(.*)")
    found: dict[tuple[str, str, str], set[str]] = {}
    for path in folder.rglob("*"):
        if match := shards.fullmatch(path.relative_to(folder).as_posix()):
            found.setdefault((match[1], match[3], Path(match[4]).suffix), set()).add(match[2])
    for (stem, total, end), numbers in found.items():
        if len(numbers) < int(total):
            raise StoreError(
                f"{url}: the local cache has {len(numbers)} of the {int(total)} parts of {stem}{end}; "
                "run again where the hub can be reached"
            )


def _first(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:300]
