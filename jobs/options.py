"""How a build is to be run: what of it, and where. Nothing here changes what is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from actcache.schemas.errors import InvalidInput
from actcache.schemas.part import Part

STAGES = ("tokenise", "all")
RETRIES = 3


@dataclass(frozen=True)
class ClusterOptions:
    """Which Dask cluster runs the blocks: processes of this machine, or a scheduler that is there already."""

    workers: int | None = None
    scheduler: str | None = None
    scheduler_file: str | Path | None = None
    gpus_per_worker: int | None = None
    retries: int = RETRIES

    def __post_init__(self) -> None:
        if sum(place is not None for place in (self.workers, self.scheduler, self.scheduler_file)) > 1:
            raise InvalidInput("--workers, --scheduler and --scheduler-file are three ways to say where; give one")
        for name, value, least in (
            ("--workers", self.workers, 1),
            ("--gpus-per-worker", self.gpus_per_worker, 0),
            ("--retries", self.retries, 0),
        ):
            if value is not None and value < least:
                raise InvalidInput(f"{name} {value}: give at least {least}")
        if self.gpus_per_worker is not None and not self.wanted:
            raise InvalidInput(
                "--gpus-per-worker is for workers of a cluster; give --workers, --scheduler or --scheduler-file too"
            )

    @property
    def wanted(self) -> bool:
        """Whether blocks run on a cluster, not in this process."""
        return self.workers is not None or self.scheduler is not None or self.scheduler_file is not None


@dataclass(frozen=True)
class RunOptions:
    """What of a build a run does: everything, or up to the tokens, or one part of the blocks; and on which cluster."""

    stop_after: str = "all"
    part: Part | None = None
    cluster: ClusterOptions = field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        if self.stop_after not in STAGES:
            raise InvalidInput(f"stage {self.stop_after!r} is not one of {', '.join(STAGES)}")
        if self.part is not None and self.stop_after != "all":
            raise InvalidInput(f"--stage {self.stop_after} ends before any part begins; leave --part or --stage out")
