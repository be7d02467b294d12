"""Hostile models and checkpoints: each is refused in one line, in little time and memory, whatever it promises."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from support.sandbox import run

from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.model.bundle import _content_digest, load
from engine.model.limits import check_json
from engine.model.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore")  # making hostile files takes functions that are deprecated

SECONDS, MEMORY = 10, 1 << 30


def small():
    torch.manual_seed(0)
    return dict(RRDBNet(channels=4, blocks=1, growth=4).state_dict())


def broad(channels):
    with torch.device("meta"):
        return RRDBNet(channels, 1, channels).state_dict()


def expanded(path):
    torch.save({name: torch.ones(1).expand(t.shape) for name, t in broad(12_000).items()}, path)


def shared(path):
    """Tensors that are all the same numbers of the file."""
    numbers = torch.zeros(1 << 20)
    torch.save({f"{i}": numbers for i in range(2_000)} | {"body.0.rdb1.conv1.weight": numbers}, path)


def deflated(path):
    buffer = io.BytesIO()
    torch.save({"body.0.rdb1.conv1.weight": torch.zeros(1 << 26)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for record in whole.infolist():
            small.writestr(record.filename, whole.read(record))


def with_comment(path):
    torch.save(small(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5\6"


def blocks(path):
    empty = {f"body.{i}.rdb1.conv1.weight": torch.zeros(0) for i in range(8_000)}
    torch.save({**small(), **empty}, path)


def many_blocks(path):
    torch.save({**small(), **{f"body.{i}.rdb1.conv1.weight": torch.zeros(1) for i in range(1, 8_000)}}, path)


def long_name(path):
    torch.save({**small(), "module." * 150_000: torch.zeros(1)}, path)


def coloured_name(path):
    torch.save({**small(), "a\x1b[31m\r\n" * 40: torch.zeros(1)}, path)


def many_names(path):
    save_file({f"a{i}": torch.zeros(0) for i in range(70_000)}, path)


def window(path):
    state = dict(SwinIR(dim=4, depths=(1,), heads=(1,), window=2, hidden=4, features=4).state_dict())
    key = next(name for name in state if name.endswith("relative_position_bias_table"))
    state[key] = torch.zeros((2 * 1000 - 1) ** 2, 1)
    torch.save(state, path)


def of(tensor):
    def write(path):
        torch.save({**small(), "conv_hr.weight": tensor()}, path)

    return write


def nested():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def quantized():
    return torch.quantize_per_tensor(torch.zeros(4, 4, 3, 3), 0.1, 0, torch.qint8)


def empty(path):
    torch.save({**small(), "conv_hr.weight": torch.zeros(0, 1 << 40, 3, 3)}, path)


class Runs:
    """Pickled, a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def call(function, *arguments, protocol=2):
    def write(path):
        path.write_bytes(pickle.dumps({"params": Runs(function, *arguments)}, protocol))

    return write


def zipped_call(path):
    torch.save({"params": Runs(os.system, "touch ran")}, path)


def huge_number(path):
    torch.save({10**5000: torch.zeros(1)}, path)


def deep_pickle(path):
    content = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    path.write_bytes(content)


def tar(path):
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), path)


def ncnn(path, graph, size=100):
    path.with_suffix(".param").write_text(graph)
    with path.open("wb") as file:
        file.truncate(size)


def graph(convolutions):
    lines = [f"Convolution c{i} 1 1 a b 0=4 1=3 4=1 5=1 6=144" for i in range(convolutions)]
    return "\n".join(["7767517", f"{len(lines)} 9", *lines])


def ncnn_graph(path):
    ncnn(path, graph(300_006))


def ncnn_blocks(path):
    ncnn(path, graph(15 * 1_000 + 6))


def ncnn_hole(path):
    state = RRDBNet(4, 1, 4).state_dict()
    shapes = [tensor.shape for name, tensor in state.items() if name.endswith("weight")]
    lines = [f"Convolution c{i} 1 1 a b 0={s[0]} 1=3 4=1 5=1 6={s.numel()}" for i, s in enumerate(shapes)]
    ncnn(path, "\n".join(["7767517", f"{len(lines)} 9", *lines]), 9 << 30)


CHECKPOINTS = {
    "expanded.pth": expanded,
    "shared.pth": shared,
    "deflated.pth": deflated,
    "comment.pth": with_comment,
    "blocks.pth": blocks,
    "many-blocks.pth": many_blocks,
    "long-name.pth": long_name,
    "coloured-name.pth": coloured_name,
    "many-names.safetensors": many_names,
    "window.pth": window,
    "sparse.pth": of(lambda: torch.zeros(4, 4, 3, 3).to_sparse()),
    "meta.pth": of(lambda: torch.zeros(4, 4, 3, 3, device="meta")),
    "nested.pth": of(nested),
    "quantized.pth": of(quantized),
    "complex.pth": of(lambda: torch.zeros(4, 4, 3, 3, dtype=torch.complex64)),
    "float8.pth": of(lambda: torch.zeros(4, 4, 3, 3).to(torch.float8_e4m3fn)),
    "bits.pth": of(lambda: torch.zeros(4, 4, 3, 3, dtype=torch.int32)),
    "empty.pth": empty,
    "system.pth": call(os.system, "touch ran"),
    "eval-0.pth": call(eval, "open('ran', 'w')", protocol=0),
    "exec-5.pth": call(exec, "open('ran', 'w')", protocol=5),
    "zipped-system.pth": zipped_call,
    "allocation.pth": call(torch.Tensor, 1 << 20, 1 << 20),
    "huge-number.pth": huge_number,
    "deep.pth": deep_pickle,
    "tar.pth": tar,
    "script.pt": script,
    "graph.bin": ncnn_graph,
    "more-blocks.bin": ncnn_blocks,
    "hole.bin": ncnn_hole,
}
"""Checkpoints that look like ESRGAN's or SwinIR's, by file name."""


@pytest.fixture(scope="module")
def bundle(model_file):
    """Function ``bundle(path, tensors={}, manifest=None, **structure)``: writes a model that differs and has a true digest."""
    with safe_open(model_file, "pt") as file:
        metadata = file.metadata()
        original = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def write(path, tensors=(), manifest=None, **structure):
        content = original | dict(tensors)
        text = manifest
        if text is None:
            fields = json.loads(metadata["ourgan"])
            fields["structure"] |= structure
            states = {}
            for key, tensor in content.items():
                prefix, _, name = key.partition(".")
                states.setdefault(prefix, {})[name] = tensor
            fields["digest"] = _content_digest(Manifest.from_json(json.dumps(fields), path), states)
            text = json.dumps(fields)
        save_file(content, path, {"ourgan": text})

    return write


def deep_list(levels):
    return "[" * levels + "]" * levels


BUNDLES = {
    "gap": {"tensors": {"structure.decoder.body.30000.conv.weight": torch.zeros(1)}},
    "digits": {"tensors": {"structure.blocks." + "9" * 400 + ".tail.weight": torch.zeros(1)}},
    "deep": {"manifest": '{"format": "ourgan-engine/1", "structure": {"a": ' + deep_list(2_000) + "}}"},
    "deeper": {"manifest": deep_list(200_000)},
    "long": {"manifest": '{"format": "' + "x" * 2_000_000 + '"}'},
    "quotes": {"manifest": r'"' + r"\"" * 400_000},
    "sides": {"sizes": [[6, 8], [12, 16], [6_000_000, 8_000_000]]},
    "area": {"sizes": [[6, 8], [12, 16], [60_000, 60_000]]},
}


def check(results):
    for result in results:
        assert (result.code, result.problem) == (4, ""), result
        assert result.seconds < SECONDS, result
        assert result.peak < MEMORY, result


def test_checkpoints(tmp_path):
    for name, write in CHECKPOINTS.items():
        write(tmp_path / name)
    check(run([["info", tmp_path / name] for name in CHECKPOINTS], tmp_path))
    assert not (tmp_path / "ran").exists()


def test_bundles(tmp_path, bundle):
    for name, change in BUNDLES.items():
        bundle(tmp_path / f"{name}.safetensors", **change)
    check(run([["plan", tmp_path / f"{name}.safetensors", "--size", "256x192"] for name in BUNDLES], tmp_path))


def test_the_same_model_unchanged_is_read(tmp_path, bundle):
    bundle(tmp_path / "same.safetensors")
    assert load(tmp_path / "same.safetensors").base_size == (24, 32)


def test_a_header_that_promises_more_than_the_file(tmp_path):
    data = save(small())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["conv_hr.weight"]["shape"] = [1 << 40]
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    check(run([["info", tmp_path / "a.safetensors"]], tmp_path))


@pytest.mark.parametrize("text", [deep_list(33), '{"a": ' * 40, "x" * 2_000_000])
def test_json_that_is_not_parsed(text):
    with pytest.raises(ValueError, match="nested|characters"):
        check_json(text)


def test_brackets_in_strings_are_no_nesting():
    check_json(json.dumps({"a": "[" * 100 + '"\\' * 3}))
