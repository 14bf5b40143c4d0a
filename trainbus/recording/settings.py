"""What is the same for every run of a bus."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from trainbus.capture.recorder import CaptureSpec
from trainbus.delivery.receipt import Receipt
from trainbus.delivery.spec import Isolation, SinkSpec
from trainbus.errors import JournalError, comes_from_handler
from trainbus.events import ArtifactLogged, CheckpointSaved, RunStarted
from trainbus.journal.directory import RunFolder, existing_spare_folder, spare_folder
from trainbus.journal.writer import JournalSpec, JournalWriter, NullJournal
from trainbus.paths import resolved

if TYPE_CHECKING:
    from trainbus.bus import Bus

logger = logging.getLogger("trainbus")


class RunDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values that the user sets for every run; they replace those that the adapter finds."""

    name: Annotated[str | None, Meta(description="Run name")] = None
    project: Annotated[str | None, Meta(description="Project that the runs belong to")] = None
    group: Annotated[str | None, Meta(description="Runs that are compared as one")] = None
    job_type: Annotated[str | None, Meta(description="Part in a group, such as `train`")] = None
    tags: Annotated[list[str] | None, Meta(description="Tags")] = None
    notes: Annotated[str | None, Meta(description="Notes")] = None

    def updated(self, call: RunDefaults) -> RunDefaults:
        """Return the defaults with those of a call: its name instead, its tags in addition."""
        tags = [*(self.tags or []), *(call.tags or [])]
        return msgspec.structs.replace(
            self, name=call.name or self.name, tags=list(dict.fromkeys(tags)) or self.tags
        )

    def apply(self, started: RunStarted) -> RunStarted:
        """Return the start with these values in place of the adapter's."""
        given = {k: v for k, v in msgspec.structs.asdict(self).items() if v is not None}
        return msgspec.structs.replace(started, **given) if given else started


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How the runs of a bus are recorded and delivered; it does not change while the bus lives.

    Args:
        sinks: the sinks of every run.
        defaults: values that replace those that adapters find.
        journal: where journals are written, and what they may hold.
        isolation: where sinks run that don't say so themselves.
        flush_secs: how long the end of a run waits for the sinks, in seconds.
        base: folder that relative paths are relative to; None for the working directory.
        config: file that the bus was made from, for the command that sends the rest.
        rebuild: makes an equal bus in another process; None where that can't be done.
        on_receipt: called with the receipt of every run that ends.
        capture: what is recorded besides the events of a training.
    """

    sinks: tuple[SinkSpec, ...]
    defaults: RunDefaults
    journal: JournalSpec
    isolation: Isolation
    flush_secs: float
    base: Path | None
    config: str | None
    rebuild: Callable[[], Bus] | None
    on_receipt: Callable[[Receipt], None]
    capture: CaptureSpec

    @property
    def services(self) -> frozenset[str]:
        """Import names of the trackers that the sinks feed."""
        return frozenset(spec.service for spec in self.sinks if spec.service)

    def every(self, phase: str) -> int | None:
        """Return the smallest interval, in steps, at which a sink asks for values of a phase."""
        asked = [s.transforms.every[phase] for s in self.sinks if phase in s.transforms.every]
        return min(asked, default=None)

    def journal_folders(self) -> list[Path]:
        """Return the folders in which journals of this bus may be."""
        spare = existing_spare_folder()
        return [self._journals, *([] if spare is None else [spare])]

    def open_journal(self, run: str, attempt: int) -> JournalWriter | NullJournal:
        """Create the journal of an attempt; a `NullJournal` where none can be written."""
        try:
            folder = self._create_folder(run)
            return JournalWriter(
                folder,
                attempt,
                max_bytes=self.journal.max_bytes,
                wants_files=self._files_filter(),
            )
        except Exception as error:
            if comes_from_handler(error):
                raise
            logger.warning("training continues, but this run is not logged: %s", error)
            return NullJournal(run, attempt)

    @property
    def _journals(self) -> Path:
        return Path(resolved(str(self.journal.dir), self.base))

    def _create_folder(self, run: str) -> RunFolder:
        """Create the directory of a run, in the temporary folder if it can't be created elsewhere.

        Raises:
            JournalError: it can't be created anywhere.
        """
        try:
            return RunFolder.create([self._journals], run)
        except JournalError as first:
            try:
                spare = spare_folder()
            except OSError as error:
                reason = error.strerror or error
                raise JournalError(f"{first}, nor a temporary folder: {reason}") from first
            folder = RunFolder.create([self.journal.dir, spare], run)
            logger.warning(
                "%s can't be written, the journal is in %s", self.journal.dir, folder.path
            )
            return folder

    def _files_filter(self) -> Callable[[CheckpointSaved | ArtifactLogged], bool]:
        """Return a function that says whether a sink sends the files of an event."""
        samples = [spec.sample() for spec in self.sinks]

        def wants_files(event: CheckpointSaved | ArtifactLogged) -> bool:
            try:
                return any(sample is None or sample.wants_files(event) for sample in samples)
            except Exception:
                return True

        return wants_files
