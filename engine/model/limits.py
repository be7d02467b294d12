"""Bounds on files that anybody may have made: they are checked before a network is built or a value is touched.

A file can promise more than it holds: strides of zero, holes, deflated records, numbers in names, nesting. Within these
bounds, memory and time grow with the size of the file and no faster.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.causes import raise_if_exhausted
from engine.errors import ModelError

MAX_TENSORS = 1 << 14
"""Tensors of a file. The largest published networks have some thousands."""

MAX_TUPLE = 1 << 12
"""Values of a tuple with those of its tuples. Sizes and the arguments of a tensor have about 20."""

MAX_NAME = 512
"""Characters of a tensor's name."""

JSON_LIMIT = 1 << 20
"""Characters of a manifest. Those of trained models with profiles have about 10,000."""

JSON_DEPTH = 32
"""Nested objects and lists of a manifest."""

SLACK = 1.1
"""Bytes of the tensors, as a multiple of the file's."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = frozenset((*_FLOATS, *_INTEGERS))
"""Types of values that checkpoints hold; integers are those of buffers."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


def check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Check tensors before anything reads their values.

    Args:
        tensors: tensors of a file by name.
        size: bytes of the file.

    Raises:
        ModelError: tensors that are not plain arrays on the CPU, or that promise more values than the file holds.
    """
    check_names(tensors)
    total = 0
    for name, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        if not is_plain or tensor.dtype not in DTYPES:
            kind = f"nested, {tensor.dtype}" if tensor.is_nested else f"{tensor.layout}, {tensor.dtype}"
            raise ModelError(
                f"{name} is no plain array ({kind}, on {tensor.device.type}); save dense tensors of floats"
            )
        nbytes = tensor.numel() * tensor.itemsize
        if nbytes > tensor.untyped_storage().nbytes():
            raise ModelError(
                f"{name} promises {nbytes} bytes and holds {tensor.untyped_storage().nbytes()}; save it contiguous"
            )
        total += nbytes
    if total > size * SLACK:
        raise ModelError(f"its tensors take {total} bytes, more than its {size}; save each tensor once, uncompressed")


def check_names(names: Iterable[str]) -> None:
    """Raise ModelError for more tensors, or for longer names, than any network has."""
    names = list(names)
    if len(names) > MAX_TENSORS:
        raise ModelError(f"{len(names)} tensors, at most {MAX_TENSORS} are read; name a checkpoint of a network")
    if (longest := max(map(len, names), default=0)) > MAX_NAME:
        raise ModelError(f"a tensor's name of {longest} characters, at most {MAX_NAME} are read; name another file")


def check_pickle(file: BinaryIO) -> None:
    """Check the tuples of a pickle up to its end, before it is loaded.

    The unpickler hashes keys. A tuple that holds another one twice, and so on, takes a few bytes for every level, and twice
    the time for its hash. Damage is left to the unpickler, which stops at the same place.

    Raises:
        ModelError: a tuple of more values than any checkpoint has.
    """
    stack: list[int] = []  # values in each object, 0 for a mark; only tuples count their items
    memo: dict[Any, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            else:
                items = _popped(stack, opcode)
                size = 1 + sum(items) if opcode.name.startswith("TUPLE") else 1
                if size > MAX_TUPLE:
                    raise ModelError(
                        f"a tuple of {size} nested values, at most {MAX_TUPLE} are read; save its tensors alone, as safetensors"
                    )
                stack += [0 if each is pickletools.markobject else size for each in opcode.stack_after]
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise_if_exhausted(error)


def _popped(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Objects that an operation takes from the stack; those above the last mark where it takes a mark."""
    items: list[int] = []
    below = opcode.stack_before
    if pickletools.markobject in below:
        while value := stack.pop():
            items.append(value)
        below = below[: below.index(pickletools.markobject)]
    return items + [stack.pop() for _ in below]


def check_archive(file: BinaryIO) -> None:
    """Check a ZIP archive, which PyTorch writes without compression, before its records are loaded.

    Raises:
        ModelError: a damaged archive, a program, compressed records, records that take more bytes than the file, or a pickle
            that ``check_pickle`` refuses.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records, comment = archive.infolist(), archive.comment
    except Exception as error:  # a damaged directory can fail in any way at all
        raise_if_exhausted(error)
        raise ModelError("damaged, or not a checkpoint of PyTorch; fetch it again") from error
    if any(re.search(r"/code/.*\.py$", record.filename) for record in records):
        raise ModelError("a TorchScript program, not a checkpoint; save the state_dict() of its network")
    if len(records) > 2 * MAX_TENSORS:
        raise ModelError(f"{len(records)} records; checkpoints of at most {MAX_TENSORS} tensors are read")
    # A comment could hide a second directory, which another reader of archives would find first.
    if comment or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ModelError("its records are compressed, which PyTorch's never are; save it again by torch.save")
    size = file.seek(0, 2)
    if (total := sum(record.file_size for record in records)) > size:
        raise ModelError(f"its records take {total} bytes, more than its {size}; fetch it again")
    with zipfile.ZipFile(file) as archive:
        for record in records:
            if record.filename.endswith(".pkl"):
                check_pickle(io.BytesIO(archive.read(record)))


def parse_json(text: str) -> object:
    """JSON of a file's metadata. Raises ValueError if it is damaged, or larger or deeper than any that is written here."""
    check_json(text)
    return json.loads(text)


def check_json(text: str) -> None:
    """Raise ValueError for JSON that is too long or too deeply nested to be parsed."""
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{len(text)} characters, at most {JSON_LIMIT} are read")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > JSON_DEPTH:
            raise ValueError(f"nested deeper than {JSON_DEPTH} levels")
