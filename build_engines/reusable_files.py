"""Files that are already built and whose names say all that they are made from."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from stg_trt.engines import manifest as manifests
from stg_trt.engines.key import EngineKey
from stg_trt.engines.manifest import FileRecord, Manifest, SegmentRecord
from stg_trt.engines.store import check_file
from stg_trt.errors import EngineRejected

_log = logging.getLogger(__name__)


class ReusableFiles:
    """One build's own files, and those of the builds beside it; a changed one counts as not there.

    `key` is that of the engine which is being built.
    """

    def __init__(self, folder: Path, manifest: Manifest, key: EngineKey | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.key = key

    def take(self, name: str, work: Path) -> Path | None:
        """The file in this build's folder, or a copy in `work` of another build's; None if none has it."""
        for folder in (self.folder, *self._others()):
            try:
                record = self._record(folder, name)
                if record is None:
                    continue
                path = folder / name
                if folder != self.folder:
                    path = Path(shutil.copyfile(path, work / name))
                check_file(path, record)
            except (EngineRejected, FileNotFoundError):
                continue
            _log.info("%s: found in %s", name, folder.name)
            return path
        _log.info("%s: in no build yet", name)
        return None

    def take_segment(self, key: EngineKey, verified: int) -> SegmentRecord | None:
        """The record of the same engine, verified at so many timesteps, from a build beside this one.

        Its files are then in this build's folder too. None if no build has it whole.
        """
        for folder in self._others():
            try:
                record = manifests.load(folder).record(key.segment.name)
                if record is None or not _is_of(record, key) or len(record.verification) < verified:
                    continue
                for file in record.files:
                    check_file(folder / file.name, file)
                    _link(folder / file.name, self.folder / file.name)
            except (EngineRejected, FileNotFoundError):
                continue
            # They name graphs that were kept in the other folder.
            return record.model_copy(update={"commands": ()})
        return None

    def take_engine(self, structure_sha256: str) -> Path | None:
        """The engine with the same key but other weights, and a graph of this structure; None without one."""
        assert self.key is not None
        for folder in self._others():
            try:
                record = manifests.load(folder).record(self.key.segment.name)
                if record is None or record.structure_sha256 != structure_sha256:
                    continue
                if not _is_of(record, self.key, "weights"):
                    continue
                path = folder / record.files[0].name
                check_file(path, record.files[0])
            except (EngineRejected, FileNotFoundError):
                continue
            _log.info("%s: has the engine of other weights in %s", self.key.segment.name, folder.name)
            return path
        return None

    def share(self) -> None:
        """Files that builds beside this one have with the same bytes become theirs, once on the disk."""
        own = {file for record in self.manifest.segments for file in record.files}
        for folder in self._others():
            try:
                theirs = manifests.load(folder)
            except EngineRejected:
                continue
            files = {(file.bytes, file.sha256): file for one in theirs.segments for file in one.files}
            for file in own:
                other = files.get((file.bytes, file.sha256))
                if other is not None and _is_whole(folder / other.name, other):
                    _link(folder / other.name, self.folder / file.name)

    def _others(self) -> list[Path]:
        folders = {path.parent for path in self.folder.parent.glob(f"*/{manifests.FILE_NAME}")}
        return sorted(folders - {self.folder})

    def _record(self, folder: Path, name: str) -> FileRecord | None:
        manifest = self.manifest if folder == self.folder else manifests.load(folder)
        files = (file for record in manifest.segments for file in record.files)
        return next((file for file in files if file.name == name), None)


def _is_whole(path: Path, file: FileRecord) -> bool:
    try:
        check_file(path, file)
    except EngineRejected:
        return False
    return True


def _is_of(record: SegmentRecord, key: EngineKey, *others: str) -> bool:
    """Whether a segment was made from exactly the facts of a key, apart from those named in `others`."""
    left_out = {"graph_sha256", *others}
    made_from, wanted = (
        {name: fact for name, fact in facts.items() if name not in left_out}
        for facts in (record.facts, key.facts())
    )
    return made_from == wanted


def _link(source: Path, path: Path) -> None:
    """One copy on disk under both names, or a second one where the file system has no links."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
