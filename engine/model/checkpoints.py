"""Checkpoint files of any origin: from a path to named tensors in the stored dtype.

Three formats can be read: safetensors, PyTorch's pickles (by its restricted unpickler) and ncnn's pairs of files. The
contents of a file decide its format, not its name. The module does not know what the tensors mean.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.archs import refusal
from engine.causes import naming, raise_if_exhausted
from engine.errors import ModelError
from engine.io.tensors import open_tensors
from engine.model.limits import check_archive, check_names, check_pickle, check_tensors, parse_json
from engine.model.ncnn import MAGIC, read_ncnn

WRAPPERS = (
    "params_ema",
    "params-ema",
    "params",
    "state_dict",
    "model_state_dict",
    "net_g_ema",
    "net_g",
    "netG",
    "model",
    "net",
)
"""Keys under which a pickle may hold its weights. The EMA comes first, because it is the published version."""

GENERATORS = ("netG.", "net_g.")
"""Prefixes of the network's tensor names in a file that holds other networks of a training too."""

PREFIXES = ("module.", "_orig_mod.", "model.", *GENERATORS)
"""Prefixes that wrappers add to all tensor names: PyTorch's, and those of training programs."""

_PICKLES = 5
"""Pickles at the start of PyTorch's older files: magic number, version, machine, contents, names of the storages."""

_ZIP = b"PK\x03\x04"
"""First bytes of a ZIP archive."""

HEADER_LIMIT = 100_000_000
"""Largest header of a safetensors file in bytes, by its specification."""

PROVENANCE_KEY = "training"
"""Key of a safetensors file's metadata: JSON with source, licence, sigma and the settings of ``engine train``."""


def read_provenance(path: Path) -> dict[str, Any]:
    """Provenance that ``engine train`` recorded with the weights; empty for files from elsewhere.

    Raises:
        ModelError: a damaged safetensors file.
    """
    try:
        if not is_safetensors(path):
            return {}
        with open_tensors(path) as file:
            provenance = parse_json((file.metadata() or {}).get(PROVENANCE_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise_if_exhausted(error)
        raise ModelError(f"{path}: cannot be read as a safetensors file ({error}); fetch it again") from None
    return provenance if isinstance(provenance, dict) else {}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU.

    Raises:
        ModelError: no such file, an unknown format, damage, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: {'not a file' if path.exists() else 'no such file'}; name a checkpoint")
    try:
        with naming(path):
            reader = _reader_of_contents(path) or READERS.get(path.suffix.lower())
            if reader is None:
                raise ModelError(f"{path}: not a checkpoint; name a file such as {', '.join(READERS)}")
            return reader(path)
    except OSError as error:
        raise_if_exhausted(error)
        raise ModelError(f"{path}: cannot be read ({_one_line(error)}); choose another file") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file can be read and begins as a safetensors file does; it may still be damaged.

    Raises OSError where the machine fails: descriptors or the disk.
    """
    try:
        return _reader_of_contents(path) is read_safetensors
    except OSError as error:
        raise_if_exhausted(error)
        return False


def _reader_of_contents(path: Path) -> Callable[[Path], dict[str, Tensor]] | None:
    """Reader of the format that the first bytes of a file show, or None. Raises OSError."""
    with naming(path), path.open("rb") as file:
        head = file.read(16)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < HEADER_LIMIT:
        return read_safetensors
    if head.startswith((_ZIP, b"\x80")):
        return _read_pickle
    if head.startswith(MAGIC.encode()) or (path.suffix.lower() == ".bin" and path.with_suffix(".param").is_file()):
        return read_ncnn
    # The first field of an ONNX graph is its version, the second the name of the program that wrote it.
    if path.suffix.lower() == ".onnx" or re.match(rb"\x08[\x01-\x20]\x12", head):
        return _refuse_onnx
    return None


def _one_line(error: Exception) -> str:
    """Message of another library's error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ModelError or OSError."""
    try:
        with open_tensors(path) as file:
            names = list(file.keys())
            check_names(names)
            tensors = {name: file.get_tensor(name) for name in names}
        check_tensors(tensors, path.stat().st_size)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # of the format, or of a dtype that PyTorch does not have
        raise_if_exhausted(error)
        raise ModelError(f"{path}: damaged safetensors file ({_one_line(error)}); fetch it again") from error
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        is_archive = file.read(len(_ZIP)) == _ZIP  # what PyTorch goes by; zipfile.is_zipfile can be made to say no
        file.seek(0)
        try:
            if is_archive:
                check_archive(file)
            else:
                for _ in range(_PICKLES):
                    check_pickle(file)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about formats that it guesses; the checks below say more
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way at all
            asked = re.search(r"allocate (\d+) bytes", str(error))
            if asked is None or int(asked[1]) <= path.stat().st_size:  # a damaged file asks for any amount of memory
                raise_if_exhausted(error)
            raise ModelError(f"{path}: {_refusal(str(error))}") from error
    try:
        return _named_tensors(_unwrapped(content), path.stat().st_size)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _refuse_onnx(path: Path) -> dict[str, Tensor]:
    raise ModelError(
        f"{path}: an ONNX graph, which is not supported; name the .pth or .safetensors file that it was made from, or open "
        "it with chaiNNer"
    )


def _refusal(message: str) -> str:
    """PyTorch's paragraph in one line, without its advice to run the file's code."""
    if match := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", message):
        name = match[1] or match[2]
        return f"refused, because loading it would run code ({name}); save its tensors alone, as safetensors"
    return "damaged, or not a checkpoint of PyTorch; fetch it again"


def _unwrapped(content: object) -> object:
    """The one dictionary of tensors in a pickle, at most two wrappers deep; anything else unchanged.

    Raises ModelError for several dictionaries of which none is known to be the network's, and for none of tensors.
    """
    for _ in range(2):
        if not isinstance(content, Mapping):
            break
        if "nunif_model" in content:
            raise ModelError(refusal(_text(content.get("name")), "open it with nunif, the program of its author"))
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping) and value}
        sets = [key for key, value in inner.items() if any(isinstance(item, Tensor) for item in value.values())]
        if known := [key for key in WRAPPERS if key in inner]:
            content = inner[known[0]]
        elif any(isinstance(value, Tensor) for value in content.values()):
            break
        elif len(sets) > 1:
            names = ", ".join(repr(_text(key)) for key in sets)
            raise ModelError(f"holds several sets of tensors ({names}); save the network's alone, under 'params'")
        elif sets or len(inner) == 1:
            content = inner[sets[0]] if sets else next(iter(inner.values()))
        elif any(_text(key).startswith("optimizer") for key in content):
            raise ModelError("the state of a training, without weights; name the weights, such as net_g_latest.pth")
    return content


def _text(key: object) -> str:
    """A key of a pickle for messages; its type if it is no text: a number or a tuple can be too large to be printed."""
    return key if isinstance(key, str) else type(key).__name__


def _named_tensors(content: object, size: int) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrappers add; ``size``: bytes of the file, which bound them."""
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"holds a {type(content).__name__} without named tensors; name a checkpoint")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(f"{_text(key)!r} is a {type(value).__name__}, not a named tensor; save the tensors alone")
    check_tensors(content, size)
    return _without_prefixes({key: value.detach() for key, value in content.items()})


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefixes that all of them share; only the generator's if there are others beside it."""
    if (generator := next((p for p in GENERATORS if any(key.startswith(p) for key in state)), None)) is not None:
        state = {key: tensor for key, tensor in state.items() if key.startswith(generator)}
    while prefix := next((p for p in PREFIXES if all(_has_prefix(key, p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _has_prefix(key: str, prefix: str) -> bool:
    """Whether a wrapper added this prefix. ESRGAN's oldest names begin with "model." and a number themselves."""
    return key.startswith(prefix) and not key[len(prefix) : len(prefix) + 1].isdigit()


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": read_safetensors,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".ckpt": _read_pickle,
    ".param": read_ncnn,
    ".bin": read_ncnn,
}
"""Readers by suffix in lower case, for files whose first bytes show no format."""
