"""Write the corpus: tiny models, checkpoints and pictures that are corrupted, each in a way of its own.

    python tests/corpus/make.py

The files are committed, so that libraries which write them today cannot change them. ``seeds`` writes the sound files that
the corpus and the fuzzer (tests/fuzz.py) start from. All files are below 10 KB.
"""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from safetensors.torch import save_file

import engine  # noqa: F401 (sets the environment of libvips, before pyvips is loaded)
from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config
from engine.model.build import build
from engine.model.structure_file import write_structure

FILES = Path(__file__).parent / "files"

MODEL, PICTURE = "info", "picture"
"""Words of tests/support/sandbox.py for the two kinds of files."""


def command(path):
    """Words that read a file of the corpus."""
    is_picture = path.suffix in (".png", ".jpg", ".tif", ".webp", ".gif", ".bmp", ".ppm", ".svg", ".avif")
    return [PICTURE if is_picture else MODEL, path]


def seeds(folder):
    """Write one sound file of every kind; returns their paths."""
    import pyvips
    from PIL import Image

    torch.manual_seed(0)
    state = {name: tensor.half() for name, tensor in RRDBNet(1, 1, 1).state_dict().items()}
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "bare.safetensors")
    write_structure(
        BaseGenerator(Config(1, 1, channels=1, latent=1, layers=1), [(4, 4), (8, 8)]), folder / "step1.safetensors"
    )
    build(folder / "step1.safetensors", [str(folder / "bare.safetensors")], licence="CC0-1.0", margin=0).save(
        folder / "bundle.safetensors"
    )
    (folder / "step1.safetensors").unlink()  # it is read when a model is built of it
    ncnn(folder / "ncnn", state)
    image = pyvips.Image.new_from_array(
        np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3), interpretation="srgb"
    )
    for suffix in ("png", "jpg", "tif", "webp", "gif", "avif", "ppm"):
        if suffix == "ppm":
            (folder / "a.ppm").write_bytes(b"P6 16 16 255\n" + bytes(16 * 16 * 3))
        else:
            image.write_to_file(str(folder / f"a.{suffix}"))
    Image.new("RGB", (16, 16), (10, 20, 30)).save(folder / "a.bmp")
    return sorted(path for path in folder.iterdir() if path.suffix != ".param")


def ncnn(stem, state, channels=1):
    """An ncnn pair of an RRDBNet."""
    weights = [(name, tensor) for name, tensor in state.items() if name.endswith("weight")]
    lines = [f"Convolution c{i} 1 1 a b 0={w.shape[0]} 1=3 4=1 5=1 6={w.numel()}" for i, (_, w) in enumerate(weights)]
    lines += [f"Interp u{i} 1 1 a b" for i in range(2)]
    stem.with_suffix(".param").write_text("\n".join(["7767517", f"{len(lines)} 9", *lines]) + "\n")
    content = b""
    for name, weight in weights:
        content += (
            bytes(4)
            + weight.float().numpy().tobytes()
            + state[name.removesuffix("weight") + "bias"].float().numpy().tobytes()
        )
    stem.with_suffix(".bin").write_bytes(content)


class Runs:
    """Pickled, a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def manifest(text):
    return safetensors({"__metadata__": {"ourgan": text}})


def png(width, height, kind=2, data=b"\x78\x9c\x03\x00\x00\x00\x00\x01", extra=b""):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def deflated(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in whole.infolist():
            archive.writestr(record.filename, whole.read(record))
    return buffer.getvalue()


def models():
    """Corrupted models and checkpoints by file name."""
    name = "body.0.rdb1.conv1.weight"
    f16 = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}
    yield "empty.safetensors", b""
    yield "garbage.safetensors", bytes(range(256))
    yield "long-header.safetensors", struct.pack("<Q", 90_000_000) + b'{"a":'
    yield "offsets.safetensors", safetensors({name: f16 | {"data_offsets": [0, 1 << 60]}}, b"12")
    yield "shape.safetensors", safetensors({name: f16 | {"shape": [1 << 62, 1 << 62]}}, b"12")
    yield "float4.safetensors", safetensors({name: f16 | {"dtype": "F4", "shape": [4]}}, b"12")
    yield "float8.safetensors", safetensors({name: f16 | {"dtype": "F8_E4M3", "shape": [2]}}, b"12")
    yield "deep-header.safetensors", safetensors(b'{"a":' * 1_500)
    yield (
        "deep-manifest.safetensors",
        manifest('{"format": "ourgan-engine/1", "structure": ' + "[" * 4_000 + "]" * 4_000 + "}"),
    )
    yield "manifest-array.safetensors", manifest("[]")
    yield (
        "manifest-numbers.safetensors",
        manifest('{"format": "ourgan-engine/1", "stages": [], "digest": 1e999}'),
    )
    yield "manifest-text.safetensors", manifest('{"format": "\\u001b[31m"}')
    yield "coloured.safetensors", safetensors({"\x1b[31mred\x1b[0m": f16}, b"12")
    yield "expanded.pth", saved({name: torch.ones(1).expand(1 << 16, 1 << 16, 3, 3)}, zipped=False)
    yield "sparse.pth", saved({name: torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (1 << 50,))})
    yield "meta.pth", saved({name: torch.zeros(1 << 40, device="meta")})
    yield "complex.pth", saved({name: torch.zeros(2, dtype=torch.complex64)})
    yield "deflated.pth", deflated(saved({name: torch.zeros(1 << 18)}))
    yield "cut.pth", saved({name: torch.zeros(4)})[:700]
    yield "number.pth", saved({10**4500: torch.zeros(1)}, zipped=False)
    yield "list.pth", saved([torch.zeros(1)])
    yield "system.pth", pickle.dumps(Runs(os.system, "touch ran"), 2)
    yield "eval.pth", pickle.dumps({"params": Runs(eval, "open('ran', 'w')")}, 4)
    yield "zipped-system.pth", saved({"params": Runs(os.system, "touch ran")})
    yield "allocation.pth", pickle.dumps(Runs(torch.Tensor, 1 << 30, 1 << 10), 2)
    yield "deep.pth", b"\x80\x02" + b"]" * 4_000 + b"a" * 3_999 + b"."
    yield "tuples.pth", b"\x80\x02}()q\x00" + b"".join(bytes([104, i, 134, 113, i + 1]) for i in range(60)) + b"K\x01u."
    yield "names.pth", saved({"module." * 1_000 + name: torch.zeros(1)}, zipped=False)
    yield (
        "window.pth",
        saved(
            {"layers.0.residual_group.blocks.0.attn.relative_position_bias_table": torch.zeros(1).expand(3999**2, 1)}
        ),
    )


def pictures():
    """Corrupted pictures by file name."""
    yield "empty.png", b""
    yield "huge.png", png(10**7, 10**7)
    yield "large.png", png(90_000, 90_000)
    yield "negative.png", png(2**32 - 1, 5)
    yield "no-pixels.png", png(16, 16)
    yield "palette.png", png(16, 16, kind=3)
    yield "huge.ppm", b"P6 99999999999999999999 1 255\n"
    yield "short.ppm", b"P6 20000 20000 255\nabc"
    yield "header.tif", b"II*\0\xff\xff\xff\x7f"
    yield "loop.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"
    yield (
        "cut.jpg",
        b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1",
    )
    yield "cut.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8L\xff\xff\0\0\x2f\xff\xff\xff\xff"
    yield "cut.gif", b"GIF89a\xff\xff\xff\xff\xf7\0\0"
    yield (
        "size.bmp",
        b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield (
        "file.svg",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>',
    )
    yield (
        "entities.svg",
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "' + b"a" * 99 + b'"><!ENTITY b "&a;&a;">]><svg>&b;</svg>',
    )


def pairs(folder):
    """Corrupted ncnn pairs."""
    state = RRDBNet(1, 1, 1).state_dict()
    for name, size in (("short", 40), ("more", 9_000)):
        ncnn(folder / name, state)
        content = (folder / f"{name}.bin").read_bytes()
        (folder / f"{name}.bin").write_bytes(content[:size].ljust(size if name == "more" else 0, b"\0"))
    ncnn(folder / "count", state)
    graph = (folder / "count.param").read_text().replace("6=9", "6=" + "9" * 5_000, 1)
    (folder / "count.param").write_text(graph)
    ncnn(folder / "negative", state)
    (folder / "negative.param").write_text((folder / "negative.param").read_text().replace(" 1 1 a b", " -9 1 a b", 1))
    (folder / "magic.param").write_text("7767517\n\x1b[31m\n")
    (folder / "magic.bin").write_bytes(b"")


def main():
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    for name, content in (*models(), *pictures()):
        (FILES / name).write_bytes(content)
    pairs(FILES)
    large = [path.name for path in FILES.iterdir() if path.stat().st_size > 10_000]
    assert not large, large


if __name__ == "__main__":
    main()
