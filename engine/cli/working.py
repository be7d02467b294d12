"""Results of renders: a store, or a picture that is written through a working store beside it.

What is here serves one render (``engine render``, ``engine upscale`` of a picture) and many (``engine upscale`` of a folder).
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engine.causes import naming
from engine.cli.progress import warn
from engine.errors import ResumeError, UsageError, option
from engine.exporters import ExportResult, check_pixels, check_target, export, names_export, names_picture
from engine.exporters.about import REQUEST, read_description
from engine.io.files import remove_leftovers, sha256
from engine.io.objects import Place, check_local
from engine.io.picture_file import open_picture
from engine.io.provenance import COMMAND, PICTURE, stored_provenance
from engine.io.store_lock import lock_store
from engine.io.store_name import check_absent, remove_store
from engine.io.zarr_store import ZarrSink
from engine.job import Job
from engine.model.bundle import Model
from engine.plan.request import Request
from engine.result import Progress, RenderResult

_SHOWN = 2000
"""Longer side of the picture that is suggested for looking at a store, in pixels."""

_NO_PIXELS = ("init", "device", "memory", "vram")
"""Fields of a request that decide no pixel, or whose contents count in place of their name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOptions:
    """Options of the picture that a render ends in; None leaves one to the format."""

    dpi: float | None = None
    """Resolution for print, in dots per inch."""
    quality: int | None = None
    """Quality of JPEG, WebP and TIFF with JPEG compression, 1 to 100."""
    compression: str | None = None
    """Compression of TIFF: deflate, jpeg or none."""

    @property
    def given(self) -> dict[str, Any]:
        """Options that are not left to the format."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Output:
    """Place of a render's result."""

    path: Place
    """Store, or picture, that the user named."""

    def __post_init__(self) -> None:
        if self.is_picture:
            check_local("out", self.path)

    @property
    def is_picture(self) -> bool:
        """Whether the name is a picture's."""
        return names_picture(self.path)

    @property
    def picture(self) -> Path:
        """The path, where ``is_picture``."""
        return check_local("out", self.path)

    @property
    def store(self) -> Place:
        """Store that the render writes: a working store beside a picture, under a name that nobody chooses."""
        return self.path.with_name(self.path.name + ".work.zarr") if self.is_picture else self.path

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse an output that exists, before any work.

        Raises:
            UsageError: the name is that of an export that no render ends in.
            ResumeError: the store exists, or the working store belongs to something else.
            InputError: the picture exists or cannot be made.
        """
        if not self.is_picture:
            if names_export(self.path):
                store = f"{self.path.stem}.zarr"
                raise UsageError(
                    f"{self.path}: a render ends in a store or a picture; render {store}, then engine export {store} "
                    f"{self.path.name}"
                )
            if not (resume or overwrite):
                check_absent(self.path)
            return
        note: dict[str, Any] = (stored_provenance(self.store) or {}).get(PICTURE) or {}
        is_ours = note.get("name") == self.path.name
        may_replace = overwrite or (resume and is_ours and bool(note.get("overwrite")))
        check_target(self.picture, overwrite=may_replace)
        if not self.store.exists():
            return
        if not is_ours:
            raise ResumeError(f"{self.store}: in the way, and not from a render of {self.path.name}; move it")
        if not (resume or overwrite):
            raise ResumeError(
                f"{self.path}: an unfinished render is in {self.store.name}; give {option('resume', True)} to finish it, "
                f"or {option('overwrite', True)} to begin again"
            )

    def is_result_of(self, request: str) -> bool:
        """Whether the output is there, whole, and made by the request of this digest (``request_digest``)."""
        if self.is_picture:
            image = open_picture(self.picture)
            return image is not None and read_description(image).get(REQUEST) == request
        provenance = stored_provenance(self.path) or {}
        return provenance.get("complete") is True and provenance.get(REQUEST) == request

    def notes(self, command: Sequence[str], request: str | None, *, overwrite: bool) -> dict[str, Any]:
        """What the store records: the command that continues it, the request's digest, and the picture that it becomes."""
        notes: dict[str, Any] = {COMMAND: list(command)} | ({} if request is None else {REQUEST: request})
        if self.is_picture:
            notes[PICTURE] = {"name": self.path.name, "overwrite": overwrite}
        return notes

    def put_away(self, sink: ZarrSink, *, keep: bool = False) -> None:
        """Remove the working store of a picture that is written: a failure takes nothing from the picture.

        Args:
            sink: the working store.
            keep: keep it in place of that; to replace the picture then needs consent again.
        """
        if keep:
            sink.note({PICTURE: {"name": self.path.name, "overwrite": False}})
            return
        try:
            remove_store(check_local("out", self.store))
        except OSError as error:
            left = self.store if self.store.exists() else error.filename  # moved away to be removed
            warn(f"{left}: the picture is written, but this store cannot be removed ({error.strerror}); remove it")

    def forget_working_store(self) -> None:
        """Remove the working store of this picture, if there is one that no other process writes, and what a kill left of it."""
        if self.is_picture:
            remove_leftovers(check_local("out", self.store))
        note: dict[str, Any] = (stored_provenance(self.store) or {}).get(PICTURE) or {}
        if self.is_picture and note.get("name") == self.path.name:
            with suppress(ResumeError, OSError):
                lock_store(self.store).release()
                remove_store(check_local("out", self.store))


def request_digest(model: Model, request: Request, options: PictureOptions, picture: str | None) -> str:
    """Digest of everything that decides an output.

    Args:
        model: model of the render.
        request: options of the render.
        options: options of the picture.
        picture: sha256 of the picture to enlarge, if there is one.
    """
    values = {
        field.name: str(getattr(request, field.name)) for field in fields(Request) if field.name not in _NO_PIXELS
    }
    if isinstance(request.profile, Path) and request.profile.is_file():
        values["profile"] = sha256(request.profile)
    for name in ("depth", "profile", "wrap", "noise_gain"):  # absent from the digests of earlier versions
        if getattr(request, name) is None:
            del values[name]
    text = json.dumps([model.digest, picture, values, options.given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def render_store(
    job: Job, sink: ZarrSink, on_progress: Callable[[Progress], None], cancelled: Callable[[], bool]
) -> RenderResult:
    """Compute what a store misses. Arguments and errors as of ``Job.render``; errors of the system name the store."""
    with naming(job.out):
        return job.render(sink, on_progress=on_progress, cancelled=cancelled)


def write_picture(
    sink: ZarrSink, output: Output, options: PictureOptions, on_progress: Callable[[int, int], None]
) -> ExportResult:
    """Write the picture of a finished working store, which from then on may replace it: a resume writes it again."""
    sink.note({PICTURE: {"name": output.path.name, "overwrite": True}})
    picture = export(str(output.store), output.picture, overwrite=True, on_progress=on_progress, **options.given)
    said = check_pixels(output.picture, options.given, sink.pixels)
    for note in picture.notes:
        if note not in said:  # before the render
            warn(note)
    return picture


def look_command(store: Place, width: int, height: int) -> str:
    """Command that makes a small picture of a store."""
    local = store if isinstance(store, Path) else Path(store.name)
    words: Sequence[str] = ["engine", "export", str(store), str(local.with_suffix(".jpg"))]
    limit = ["--max-size", str(_SHOWN)] if max(width, height) > _SHOWN else []
    return shlex.join([*words, *limit])
