"""Files that are already built and whose names say all that they are made from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import FileRecord, Manifest
from stg_trt.engines.store import check_file
from stg_trt.errors import EngineRejected

_log = logging.getLogger(__name__)


class ReusableFiles:
    """One build's own files, and those of the builds beside it; a changed one counts as not there."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

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

    def _others(self) -> list[Path]:
        folders = {path.parent for path in self.folder.parent.glob(f"*/{manifests.FILE_NAME}")}
        return sorted(folders - {self.folder})

    def _record(self, folder: Path, name: str) -> FileRecord | None:
        manifest = self.manifest if folder == self.folder else manifests.load(folder)
        files = (file for record in manifest.segments for file in record.files)
        return next((file for file in files if file.name == name), None)
