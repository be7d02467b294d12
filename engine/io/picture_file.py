"""Opening of picture files by libvips; of PNM and BMP, which the wheel of libvips leaves out, by other means.

The module does not convert colours: its images have the samples of the file.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from engine.causes import naming, raise_if_exhausted
from engine.errors import InputError
from engine.geometry import PictureTiles
from engine.io.picture_header import (
    BMP,
    PNG,
    PNM,
    SAVE_AGAIN,
    SELDOM_READ,
    TIFF,
    check_header,
    format_of,
    head,
    largest_strip,
)

if TYPE_CHECKING:
    import pyvips
    from PIL import Image

DISC_THRESHOLD = 32 << 20
"""Bytes of a decoded picture above which libvips keeps it in a temporary file instead of in memory."""

_PARTIAL = 1
"""Flag of libvips: the loader decodes region by region."""

_FRAME_LOADERS = ("webp", "gif", "heif")
"""Loaders that hold whole frames while they decode."""

_FRAMES = 3
"""Bytes that such loaders hold, as a multiple of the decoded picture's: RGBA frames, and planes before and after."""

_ROWS, _ROWS_OF_THREAD = 640, 64
"""Rows that libvips holds while it writes a temporary file: the loader's and the writer's, and those of a thread. A picture of
100,000 columns took 736 rows with 2 threads, and 1130 with 8."""

_ROWS_MAPPED = 384
"""Rows of the temporary file that a thread maps at once: a tile of 128 rows, and up to 128 above and below."""

_COPIES = 2
"""Copies of a picture of few rows in memory while libvips writes its temporary file: the loader's rows and the written ones."""

BMP_PIXELS = 2**25
"""Pixels of the largest BMP, which is decoded in memory; a picture of 7680x4320 has fewer."""

_BMP_BYTES = 10
"""Bytes of a BMP's pixel while it is decoded."""

_SAMPLE_BYTES = {"uchar": 1, "char": 1, "ushort": 2, "short": 2, "float": 4, "int": 4, "uint": 4}
"""Bytes of a sample, by libvips' format."""

FLOATS = "engine-float-bits"
"""Entry of an opened picture's metadata: bits of the file's floats, which are opened as 16-bit integers."""

_UNKNOWN_DPI = {"jpeg": 72.0, "png": 71.9836}
"""Resolutions that libvips gives to pictures without one, beside a pixel in a millimetre."""

_MM_PER_INCH = 25.4

_TURNED = 5
"""EXIF orientations from here on swap width and height."""

_CONVERT = "convert it to PNG, TIFF or JPEG"

_NO_CAUSE = re.compile(r"(?:\w+: load error)?")
"""libvips' text where a thread of it lacked memory, and elsewhere: a damaged file does not decode when it is read again."""

_DECODED = 1 << 20
"""Bytes that decoding takes at least."""


@cache
def vips() -> ModuleType:
    """libvips, imported at first use: most renders decode nothing. It reads its threshold from the environment, once."""
    os.environ.setdefault("VIPS_DISC_THRESHOLD", str(DISC_THRESHOLD))
    import pyvips

    pyvips.operation_block_set("VipsForeignLoadRaw", False)  # it parses nothing; _open_pnm gives it a checked header

    # Its cache of operations goes by file names: a picture that changed would be read as it was.
    pyvips.cache_set_max(0)
    return pyvips  # type: ignore[no-any-return]


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn an error of libvips into an InputError of one line that names the file and, if it is seldom read, its format."""
    try:
        with naming(path):
            yield
    except vips().Error as error:
        raise_if_exhausted(error)
        with naming(path):
            name = format_of(path)
        if name in (PNG, TIFF) and re.search("not (?:a|in a) known", error.detail):  # it could not be read
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
        if name == PNG and "vipspng: " in error.detail and _decodes(path, name):  # the machine failed
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
        if name and _NO_CAUSE.fullmatch(error.detail.strip()):
            bytearray(_DECODED)  # a MemoryError where memory is exhausted for good
            if _decodes(path, name):
                raise MemoryError from error
        if name in SELDOM_READ:
            raise InputError(f"{path}: {name} is not read; {_CONVERT}") from error
        if "is not in a known format" in error.detail:
            raise InputError(f"{path}: cannot be read as a picture (unknown format); {_CONVERT}") from error
        detail = error.detail.replace(f"{path}: ", "")
        reason = "; ".join(dict.fromkeys(line.strip() for line in detail.splitlines() if line.strip())) or "damaged"
        raise InputError(f"{path}: cannot be read as a picture ({reason}); {SAVE_AGAIN}") from error


def open_picture(path: Path) -> pyvips.Image | None:
    """A picture with its metadata, undecoded and unchecked; None if libvips does not know the file.

    Raises OSError where the machine fails: descriptors or the disk.
    """
    try:
        with naming(path):
            return vips().Image.new_from_source(vips().Source.new_from_file(str(path)), "") if path.is_file() else None
    except vips().Error as error:
        raise_if_exhausted(error)
        return None


def check_exists(path: Path, kind: str) -> None:
    """Raise InputError unless ``path`` is a readable file; ``kind`` names it in the message."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name one {kind}")
    if not path.is_file():
        raise InputError(f"{path}: no such {kind}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it; change its mode")


@dataclass(frozen=True, slots=True)
class Header:
    """A picture whose header was read."""

    image: pyvips.Image
    """The upright picture: its size, samples and metadata."""
    pages: int
    """Pages or frames in the file."""
    memory: int
    """Upper bound of the bytes of memory that decoding holds; 0 if it goes region by region."""
    temporary: int
    """Bytes of the temporary file that decoding writes; 0 without one."""
    tiles: PictureTiles | None = None
    """Tiles that a read decodes; None where the picture has none."""


def open_header(path: Path) -> Header:
    """Read the header of a picture; nothing large is decoded.

    Raises:
        InputError: damaged, of a format that is not read, or with samples of unknown meaning.
    """
    name = format_of(path)
    pages = check_header(path, name)
    with decoding(path):
        if name == PNM:
            return Header(_open_pnm(path), 1, 0, 0)
        if name == BMP:
            return _bmp_header(_open_bmp(path))
        loaded = _load(path, name, raw=True)
        pages = pages or (loaded.get("n-pages") if loaded.get_typeof("n-pages") else 1)
        return Header(integers(loaded).autorot(), pages, *_decoding_bytes(path, loaded), _tiles_of(loaded))


def open_upright(path: Path, *, raw: bool = False) -> pyvips.Image:
    """The picture with its EXIF orientation applied; but for a BMP it is decoded when it is first read.

    Args:
        path: the file.
        raw: keep floats.

    Raises InputError as ``open_header`` does.
    """
    name = format_of(path)
    check_header(path, name)
    with decoding(path):
        if name == PNM:
            return _open_pnm(path)
        if name == BMP:
            image = _open_bmp(path).decode()
            if image.width * image.height * image.bands <= DISC_THRESHOLD:
                return image
            kept = vips().Image.new_temp_file("%s.v")
            image.write(kept)
            return kept
        return _load(path, name, raw=raw).autorot()


def open_rows(path: Path) -> pyvips.Image:
    """The picture as it is stored, to be read once from top to bottom. Raises InputError as ``open_header`` does."""
    name = format_of(path)
    check_header(path, name)
    with decoding(path):
        if name == PNM:
            return _open_pnm(path)
        return _open_bmp(path).decode() if name == BMP else _load(path, name, access="sequential")


def open_top(path: Path, side: int) -> pyvips.Image:
    """Up to ``side`` x ``side`` pixels at the top of the picture as it is stored: the rest of it is not decoded."""
    image = open_rows(path)
    with decoding(path):
        width, height = min(side, image.width), min(side, image.height)
        return image.crop((image.width - width) // 2, 0, width, height).copy_memory().autorot()


def _bmp_header(bmp: _Bmp) -> Header:
    """A small BMP is decoded, to see damage; the header of a large one belongs to a black picture."""
    width, height, bands = bmp.shape
    size = width * height * bands
    if size <= DISC_THRESHOLD:
        return Header(bmp.decode(), 1, _BMP_BYTES * width * height, 0)
    image = vips().Image.black(width, height, bands=bands).copy(interpretation="srgb")
    return Header(image, 1, _BMP_BYTES * width * height, size)


def dpi_of(image: pyvips.Image) -> tuple[float, float] | None:
    """(horizontal, vertical) resolution of an opened picture in dots per inch; None where its file records none."""
    dpi = image.xres * _MM_PER_INCH, image.yres * _MM_PER_INCH
    loader = image.get("vips-loader").split("load")[0] if image.get_typeof("vips-loader") else ""
    unknown = {_MM_PER_INCH} if image.get_typeof("resolution-unit") else {_MM_PER_INCH, _UNKNOWN_DPI.get(loader, 0.0)}
    return None if min(dpi) < 1 or any(abs(dpi[0] - each) < 0.01 for each in unknown) else dpi


def _load(path: Path, name: str, *, raw: bool = False, **options: str) -> pyvips.Image:
    """The picture as it is stored, floats as 16-bit integers unless ``raw``.

    By a source: libvips would take brackets in a file's name for options.
    """
    source = vips().Source.new_from_file(str(path))
    image = vips().Image.new_from_source(source, "", fail_on=_strictness(name), **options)
    return image if raw else integers(image)


def is_float(image: pyvips.Image) -> bool:
    """Whether the samples are a TIFF's floats, whose white is 1.0 whatever libvips takes them for."""
    return image.format in ("float", "double") and image.get("vips-loader").startswith("tiff")


def integers(image: pyvips.Image) -> pyvips.Image:
    """The image with integer samples: floats from 0 to 1 become 16 bits, those outside are clipped."""
    if not is_float(image):
        return image
    bits = image.get("bits-per-sample") if image.get_typeof("bits-per-sample") else 32
    deep = (image * 65535).rint().cast("ushort").copy(interpretation="grey16" if image.bands < 3 else "rgb16")
    deep.set_type(vips().GValue.gint_type, FLOATS, bits)
    return deep


def _decodes(path: Path, name: str) -> bool:
    """Whether a picture can be decoded from top to bottom."""
    try:
        _load(path, name, access="sequential").avg()
    except vips().Error:
        return False
    return True


def _decoding_bytes(path: Path, image: pyvips.Image) -> tuple[int, int]:
    """Bytes of memory and of the temporary file that random access to a loaded picture takes."""
    loader = image.get("vips-loader")
    source = vips().Source.new_from_file(str(path))
    _, found = vips().Operation.call(loader, source, flags=True)
    size = image.width * image.height * _pixel_bytes(image)
    is_interlaced = bool(image.get_typeof("interlaced")) and image.get("interlaced") == 1
    frames = _FRAMES * size if is_interlaced or loader.startswith(_FRAME_LOADERS) else 0
    if loader.startswith("tiff"):
        frames = largest_strip(path)
    if found["flags"] & _PARTIAL:
        return frames, 0
    if size <= DISC_THRESHOLD:
        return frames + size, 0
    threads = int(os.environ.get("VIPS_CONCURRENCY", "0")) or os.cpu_count() or 1
    rows, copies = _ROWS + _ROWS_OF_THREAD * threads, _COPIES
    if _is_turned(image):
        # A read of some rows goes through all rows of the file, whose pages count while they are mapped.
        rows, copies = rows + _ROWS_MAPPED * (threads + 1), copies + 1
    return frames + min(copies * size, size // image.height * rows), size


def _tiles_of(image: pyvips.Image) -> PictureTiles | None:
    """Tiles of a loaded picture, upright; None for other pictures."""
    if not image.get_typeof("tile-width"):
        return None
    size, tile = (image.height, image.width), (image.get("tile-height"), image.get("tile-width"))
    count, most = (-(-size[0] // tile[0]), -(-size[1] // tile[1])), 2 * (1 + size[1] // tile[1])  # as libvips keeps
    tile = min(tile[0], size[0]), min(tile[1], size[1])
    if _is_turned(image):
        tile, count = tile[::-1], count[::-1]
    return PictureTiles(tile, count, most, _pixel_bytes(image))


def _is_turned(image: pyvips.Image) -> bool:
    """Whether the upright picture has the width of a loaded one as its height."""
    return bool(image.get_typeof("orientation")) and image.get("orientation") >= _TURNED


def _pixel_bytes(image: pyvips.Image) -> int:
    return int(image.bands) * _SAMPLE_BYTES.get(image.format, 8)


def open_thumbnail(path: Path, size: tuple[int, int]) -> pyvips.Image:
    """The upright picture at (height, width), in sRGB but with its alpha, shrunk while it is loaded."""
    height, width = size
    options = {"height": height, "size": "force", "output_profile": "srgb"}
    name = format_of(path)
    with decoding(path):
        # libvips would take brackets in the name for options, and floats for linear light.
        if name in (PNM, BMP) or path.name.endswith("]") or (name == TIFF and is_float(_load(path, name, raw=True))):
            return open_upright(path).thumbnail_image(width, **options)
        # Not of a source: libvips makes a thumbnail of one that is damaged, too.
        return vips().Image.thumbnail(str(path), width, fail_on=_strictness(name), **options)


def _strictness(name: str) -> str:
    """The lowest severity at which decoding fails.

    libvips only warns about missing strips of a TIFF and fills them with noise. For other formats a warning is harmless.
    """
    return "warning" if name == TIFF else "error"


def _open_pnm(path: Path) -> pyvips.Image:
    """A binary PGM or PPM of 8 or 16 bits, read from the file as it is."""
    space = rb"(?:\s|#[^\n]*\n)+"
    header = re.match(rb"P([56])%b(\d{1,7})%b(\d{1,7})%b(\d{1,5})\s" % (space, space, space), head(path))
    white = int(header[4]) if header else 0
    if header is None or white not in (255, 65535):
        raise InputError(f"{path}: not a binary PGM or PPM whose white is 255 or 65535; {_CONVERT}")
    bands, deep = (1 if header[1] == b"5" else 3), white == 65535
    image = vips().Image.rawload(
        str(path),
        int(header[2]),
        int(header[3]),
        bands,
        offset=header.end(),
        format="ushort" if deep else "uchar",
        interpretation={1: "grey16", 3: "rgb16"}[bands] if deep else {1: "b-w", 3: "srgb"}[bands],
    )
    return image.byteswap() if deep and sys.byteorder == "little" else image


@dataclass(frozen=True, slots=True)
class _Bmp:
    """A BMP whose header was read by Pillow."""

    path: Path
    shape: tuple[int, int, int]
    """Width, height and samples a pixel."""

    def decode(self) -> pyvips.Image:
        """The picture in memory."""
        with _pillow(self.path) as picture:
            decoded = picture if picture.mode in ("RGB", "RGBA") else picture.convert("RGB")
            pixels = decoded.tobytes()
        return vips().Image.new_from_memory(pixels, *self.shape, "uchar").copy(interpretation="srgb")


def _open_bmp(path: Path) -> _Bmp:
    with _pillow(path) as picture:
        return _Bmp(path, (picture.width, picture.height, 4 if picture.mode == "RGBA" else 3))


@contextmanager
def _pillow(path: Path) -> Iterator[Image.Image]:
    """A BMP, opened by Pillow. Raises InputError when it is damaged or too large."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture = Image.open(path, formats=["BMP"])
        with picture:
            if picture.width * picture.height > BMP_PIXELS:
                raise Image.DecompressionBombError
            yield picture
    except Image.DecompressionBombError as error:
        limit = f"{BMP_PIXELS / 1e6:.1f} megapixels"
        raise InputError(f"{path}: a BMP is read up to {limit}, and this one is larger; convert it to PNG") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); {SAVE_AGAIN}") from error
