"""Names of stores, pictures and models in an object store: ``s3://``, ``gs://`` and ``az://``, through obstore.

``ObjectPath`` has those methods of a ``Path`` that readers use, so that a store is read in one way wherever it lies. An
object appears whole or not at all, and is written under a condition: that there is none, or that it is still the one that
was read. Credentials come from the environment, from files or from the role of the machine; they are no part of a URL, and
no message quotes what a server or a library says.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from engine.errors import AccessError, InputError, StorageError, UsageError, option
from engine.io.files import cache_folder

SCHEMES = ("s3", "gs", "az")
"""Kinds of object stores: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage."""

_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+(.*)", re.DOTALL)
"""A URL, also as ``Path`` spells it, which makes one slash of two."""

_RETRIES = 4
"""Repetitions of a request that the server did not answer, or answered with 429 or 5xx."""

_RETRY_SECONDS = 60
"""Time after which no request is repeated."""

_TIMEOUT, _CONNECT_TIMEOUT = "30s", "5s"
"""Longest time of a request that reads, and of any connection."""

_PUT_TIMEOUT, _PUT_RETRY_SECONDS = "300s", 600
"""Longest time of a request that writes a whole object, and time after which it is not repeated."""

_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
"""Variables that allow addresses without encryption."""

_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_", "AZURITE_")
"""First letters of the variables of the environment that hold addresses and credentials."""

_PAUSE, _BACKOFF = 0.2, 0.1
"""Seconds before the first repetition by the engine, of an answer that was cut off, and by obstore, of all others; doubled
each time."""

_PIECE = 16 << 20
"""Bytes of a download's request."""

_BATCH = 1000
"""Objects that one request deletes."""

_READ, _WRITE = "repeat this command", f"go on with {option('resume', True)}"
"""Advice after a request that failed."""

_BOTO_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
"""Files with credentials of S3, which boto3 reads: variable that names one, and its place by default."""

_T = TypeVar("_T")


class ObjectPath:
    """A name in an object store: of an object, or of all objects below it.

    Args:
        url: ``s3://bucket/key``, or the same as ``Path`` spells it.

    Raises:
        UsageError: the URL names no object, or holds a password or a query.
    """

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        assert match is not None, "no URL of an object store"
        self._scheme, rest = match[1], match[2]
        # Refused before anything repeats it: what stands there may be secret.
        if set("@:") & set(rest.partition("/")[0]) or "?" in rest or "#" in rest:
            raise UsageError(
                f"{self._scheme}://...: holds a user, a query or a fragment; give {self._scheme}://BUCKET/NAME, and credentials "
                "in the environment or in files"
            )
        self._bucket, *names = [name for name in rest.split("/") if name]
        if not names or ".." in names:
            raise UsageError(f"{self._scheme}://{rest}: names no object; give {self._scheme}://BUCKET/NAME")
        self.key = "/".join(names)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._bucket}/{self.key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        """Last part of the name."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """Suffix of the last part, with its dot."""
        return PurePosixPath(self.key).suffix

    @property
    def stem(self) -> str:
        """Last part of the name without its suffix."""
        return PurePosixPath(self.key).stem

    def resolve(self) -> ObjectPath:
        """The name itself, which is absolute."""
        return self

    def with_name(self, name: str) -> ObjectPath:
        """A name beside this one."""
        return ObjectPath(f"{self._scheme}://{self._bucket}/{PurePosixPath(self.key).with_name(name)}")

    @property
    def anchor(self) -> Path:
        """A file of this machine's cache that stands for the name: for locks, and beside it for spilled tiles."""
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:16]
        return cache_folder() / "stores" / f"{digest}-{self.name}"

    def exists(self) -> bool:
        """Whether there is an object of this name, or any below it."""
        return self.is_dir() or self.is_file()

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self.head() is not None

    def is_dir(self) -> bool:
        """Whether there is an object below this name."""
        return next(self._listed(chunk=1), None) is not None

    def head(self) -> dict[str, Any] | None:
        """Size, time, version and attributes of the object (``size``, ``last_modified``, ``e_tag``, ``version``,
        ``attributes``); None if there is none.
        """

        def ask() -> dict[str, Any] | None:
            try:
                answer = _obstore().get(self._store(), self.key, options={"head": True})
            except FileNotFoundError:
                return None
            return {**answer.meta, "attributes": dict(answer.attributes)}

        return _asked(self, ask)

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""
        return _asked(self, lambda: bytes(_obstore().get(self._store(), self.key).bytes()))

    def read_range(self, start: int, end: int, tag: str | None = None) -> bytes:
        """Bytes of the object; ``tag``: of this version alone. Raises FileNotFoundError if there is none."""
        options = {"range": (start, end), **({"if_match": tag} if tag else {})}
        return _asked(self, lambda: bytes(_obstore().get(self._store(), self.key, options=options).bytes()))

    def write_new(self, data: bytes | memoryview, attributes: dict[str, str] | None = None) -> bool:
        """Write the object unless there is one; returns whether it has these bytes now.

        An earlier try may have arrived although its answer was lost, so an object that is there is compared.

        Args:
            data: the whole object.
            attributes: values to keep with it, by letters alone.

        Raises:
            StorageError: as for reading.
        """
        obstore = _obstore()

        def ask() -> bool:
            try:
                obstore.put(self._store(True), self.key, data, mode="create", attributes=attributes)
            except obstore.exceptions.AlreadyExistsError:
                return False
            except FileNotFoundError:
                raise AccessError(f"{self}: no such bucket; check the URL") from None
            return True

        return _asked(self, ask, _WRITE) or self.read_bytes() == data

    def write_over(
        self, data: bytes | memoryview, version: dict[str, Any] | None = None, attributes: dict[str, str] | None = None
    ) -> bool:
        """Write the object in place of another; returns whether it has these bytes now.

        Args:
            data: the whole object.
            version: what ``head`` said of the one to be replaced, which must still be there; None: whatever is there.
            attributes: as for ``write_new``.

        Raises:
            StorageError: as for reading.
        """
        obstore = _obstore()
        mode = (
            "overwrite"
            if version is None
            else {name: version[name] for name in ("e_tag", "version") if version.get(name)}
        )

        def ask() -> bool:
            try:
                obstore.put(self._store(True), self.key, data, mode=mode, attributes=attributes, use_multipart=False)
            except (obstore.exceptions.PreconditionError, FileNotFoundError):
                return False
            return True

        if _asked(self, ask, _WRITE):
            return True
        return self.is_file() and self.read_bytes() == data

    def delete(self, names: Sequence[str] | None = None) -> None:
        """Delete the object, or those below of these names; one that is not there is passed over."""
        keys = [self.key] if names is None else [f"{self.key}/{name}" for name in names]

        def ask(batch: list[str]) -> None:
            try:
                _obstore().delete(self._store(True), batch)
            except FileNotFoundError:  # Google says so of one, and obstore leaves others
                for key in batch if len(batch) > 1 else ():
                    ask([key])

        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            _asked(self, lambda batch=batch: ask(batch), _WRITE)  # type: ignore[misc]

    def objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All objects below: the rest of the name, and what ``head`` says of it."""
        for each in self._listed():
            yield str(each["path"]).removeprefix(f"{self.key}/"), each

    def download(self, path: Path) -> None:
        """Write the object to a new file, piece by piece, of one version.

        Raises:
            InputError: there is no such object, or it was replaced meanwhile.
        """
        about = self.head()
        if about is None:
            raise InputError(f"{self}: no such object; check the URL")
        with path.open("xb") as file:
            for start in range(0, about["size"], _PIECE):
                file.write(self.read_range(start, min(start + _PIECE, about["size"]), about["e_tag"]))

    def client(self) -> Any:  # noqa: ANN401 (obstore's type)
        """obstore's client of the objects below."""
        return _opened(_settings(), self._scheme, self._bucket, self.key)

    def _listed(self, chunk: int = 1000) -> Iterator[dict[str, Any]]:
        """What the server lists below the name. A list that was cut off goes on after the last name."""
        pages: Iterator[Any] | None = None
        last: str | None = None

        def following() -> Any:  # noqa: ANN401 (obstore's type)
            nonlocal pages
            if pages is None:
                pages = iter(_obstore().list(self._store(), f"{self.key}/", chunk_size=chunk, offset=last))
            try:
                return next(pages, None)
            except Exception:
                pages = None
                raise

        while (page := _asked(self, following)) is not None:
            for each in page:
                yield dict(each)
            last = page[-1]["path"]

    def _store(self, writes: bool = False) -> Any:  # noqa: ANN401 (obstore's type)
        return _opened(_settings(), self._scheme, self._bucket, None, writes)


Place: TypeAlias = Path | ObjectPath
"""A file or folder, or a name in an object store."""


def is_url(path: Path | str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of an object store. ``Path`` makes one slash of two, which is understood as well."""
    return _URL.fullmatch(os.fspath(path)) is not None


def as_place(path: Path | str | os.PathLike[str] | ObjectPath) -> Place:
    """The place that a path or a URL names. Raises UsageError for a URL that names no object."""
    if isinstance(path, ObjectPath):
        return path
    return ObjectPath(os.fspath(path)) if is_url(path) else Path(path)


def spelled(path: Path) -> str:
    """A path for a command line that is given in any folder: absolute, or the URL."""
    return str(as_place(path)) if is_url(path) else str(path.absolute())


def lies_there(place: Place) -> bool:
    """Whether something has this name, if only a link that leads nowhere."""
    return os.path.lexists(place) if isinstance(place, Path) else place.exists()


def anchor_of(place: Place) -> Path:
    """What is locked for a place, and what spilled tiles lie beside: itself, or ``ObjectPath.anchor``."""
    return place if isinstance(place, Path) else place.anchor


def check_local(name: str, path: Path | str | os.PathLike[str] | ObjectPath) -> Path:
    """The path, which must be no URL: stores alone are written to one. ``name``: the option. Raises UsageError."""
    if isinstance(path, ObjectPath) or is_url(path):
        raise UsageError(
            f"{option(name, as_place(path))}: only stores are written to an object store; name a file or folder, and copy it "
            "there afterwards"
        )
    return Path(path)


def local_copy(path: Place) -> Path:
    """A file by its name: a local one as it is, and one of a URL downloaded to a temporary folder of this process.

    Raises:
        InputError: there is no such object.
        StorageError: the object store does not answer.
    """
    place = as_place(path)
    return _downloaded(place) if isinstance(place, ObjectPath) else place


@cache
def _downloaded(url: ObjectPath) -> Path:
    path = Path(tempfile.mkdtemp(dir=_downloads().name)) / url.name
    url.download(path)
    return path


@cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    """Folder of downloads, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="engine-")


@cache
def _obstore() -> Any:  # noqa: ANN401 (a module that need not be installed)
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise UsageError(
            'URLs of object stores: obstore is not installed; pip install "ourgan-engine[cloud]"'
        ) from error
    return obstore


def _settings() -> int:
    """Digest of the variables that obstore reads when it makes a client: an address or credentials that are set later need
    another one.
    """
    return hash(frozenset((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES)))


@cache
def _opened(settings: int, scheme: str, bucket: str, prefix: str | None, writes: bool = False) -> Any:  # noqa: ANN401
    """obstore's client of a bucket, with the credentials of the environment, of files or of the machine's role.

    Args:
        settings: ``_settings``, which tells clients apart.
        scheme: kind of object store.
        bucket: name of the bucket.
        prefix: name that all keys begin with, if any.
        writes: requests may take as long as whole objects do on a slow network.
    """
    store = _obstore().store
    backoff = {"init_backoff": timedelta(seconds=_BACKOFF), "max_backoff": timedelta(seconds=5), "base": 2}
    options: dict[str, Any] = {
        "client_options": {
            "timeout": _PUT_TIMEOUT if writes else _TIMEOUT,
            "connect_timeout": _CONNECT_TIMEOUT,
            # These options replace those of the environment, which says so for a server of one's own.
            "allow_http": os.environ.get(_ALLOW_HTTP[scheme], "").lower() in ("1", "true"),
        },
        "retry_config": {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=_PUT_RETRY_SECONDS if writes else _RETRY_SECONDS),
            "backoff": backoff,
        },
    }
    if scheme == "s3" and (provider := _provider_from_files()) is not None:
        options["credential_provider"] = provider
    url = f"{scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
    try:
        return store.from_url(url, **options)
    except Exception as error:  # of its configuration
        raise failure(ObjectPath(f"{url}/name"), error) from None


def _provider_from_files() -> Any:  # noqa: ANN401
    """Credentials of S3 from the files of AWS, which boto3 reads; None where the environment or a role has them."""
    environment = os.environ
    if environment.get("AWS_ACCESS_KEY_ID") or environment.get("AWS_SKIP_SIGNATURE"):
        return None
    files = [Path(environment.get(name, default)).expanduser() for name, default in _BOTO_FILES.items()]
    if not environment.get("AWS_PROFILE") and not any(file.is_file() for file in files):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UsageError(
            'credentials in the files of AWS: boto3 is not installed; pip install "ourgan-engine[cloud]"'
        ) from error
    try:
        return Boto3CredentialProvider()
    except Exception:  # its messages may quote the files
        raise AccessError("credentials in the files of AWS: not usable; check AWS_PROFILE and ~/.aws") from None


def _asked(place: ObjectPath, ask: Callable[[], _T], advice: str = _READ) -> _T:
    """The answer to a request, which is repeated while the fault may pass; ``advice``: what to do after the last.

    Raises:
        FileNotFoundError: there is no such object.
        AccessError: access is refused, or there is no such bucket.
        StorageError: the object store does not answer.
    """
    for pause in pauses():
        try:
            return ask()
        except (FileNotFoundError, UsageError, StorageError):
            raise
        except Exception as error:  # obstore's own, and those of Python
            if pause is None or not is_passing(error):
                raise failure(place, error, advice) from None
        time.sleep(pause)
    raise AssertionError


def pauses() -> Iterator[float | None]:
    """Seconds to wait after each attempt; None after the last."""
    yield from (_PAUSE * 2**count for count in range(_RETRIES))
    yield None


def is_passing(error: Exception) -> bool:
    """Whether a repetition may help that obstore does not try: of a list, or of an error's text, that was cut off."""
    return "response body" in str(error)


def failure(place: ObjectPath, error: Exception, advice: str = _READ) -> Exception:
    """The engine's error for one of obstore. Texts of servers are left out: they may name keys."""
    if isinstance(error, UsageError | InputError | StorageError | FileNotFoundError):
        return error
    kind, text = type(error).__name__, str(error)
    status = re.search(r"status code: (\d{3})", text)
    if "169.254." in text or "metadata.google" in text or "CredentialProvider" in text:
        return AccessError(f"{place}: no credentials found; set them in the environment or in files (docs/cloud.md)")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (status and status[1] in ("401", "403")):
        return AccessError(f"{place}: access denied; check the credentials and what they allow")
    if kind == "PreconditionError":
        return InputError(f"{place}: replaced while it was read; {advice}")
    if status and status[1] == "404":
        return AccessError(f"{place}: no such bucket; check the URL")
    if kind == "UnknownConfigurationKeyError" or "builder error" in text:
        return UsageError(f"{place}: settings of the object store are wrong; check its variables of the environment")
    reason = f"status {status[1]}" if status else "no whole answer"
    return StorageError(
        f"{place}: the object store failed ({reason}, {_RETRIES} repetitions); check the network and {advice}"
    )
