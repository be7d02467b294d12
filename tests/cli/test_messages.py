"""Wrong inputs of a new user: one line that says what is wrong and what to do, in words of the command line."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request

MODEL = "model.safetensors"
RENDER = f"render {MODEL} --size 96x64 --stages 1 --overlap 4 --precision fp32 --executor tiles --tile 16"
SUPPORTED = "is not supported (ESRGAN, SwinIR, Compact and SPAN are)"
EXTRA = "open it with spandrel and its package spandrel_extra_arches"


@pytest.fixture(scope="module")
def material(tmp_path_factory, model_file):
    """Folder with a model, a store's place, pictures, and checkpoints of other networks."""
    folder = tmp_path_factory.mktemp("material")
    shutil.copy(model_file, folder / MODEL)
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(folder / "base.png")
    (folder / "afile").write_text("a text")
    (folder / "empty").mkdir()
    (folder / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    state = RRDBNet(channels=8, blocks=1, growth=4).state_dict()
    save_file(state, folder / "renamed.pth")
    torch.save({"model": {"params": state}}, folder / "wrapped.ckpt")
    lost = ("conv_up1", "conv_hr")
    torch.save({name: t for name, t in state.items() if not name.startswith(lost)}, folder / "incomplete.pth")
    small = torch.zeros(1)
    srformer = ("layers.0.residual_group.blocks.0.attn.aligned_relative_position_index",)
    torch.save({"params_ema": dict.fromkeys(srformer, small)}, folder / "srformer.pth")
    relu = {f"body.{i}.weight": torch.zeros(8 if i < 4 else 12, 8 if i else 3, 3, 3) for i in (0, 2, 4)}
    torch.save(relu, folder / "compact.pth")
    torch.save({**state, "conv_first.weight": torch.zeros(8, 5, 3, 3)}, folder / "five.pth")
    torch.save({"conv0.weight": small, "conv1.weight_orig": small}, folder / "net_d.pth")
    torch.save({"one": {"w": small}, "two": {"w": small}}, folder / "two.pth")
    torch.save({"epoch": 1, "iter": 2, "optimizers": [{}]}, folder / "7.state")
    graph = "7767517\n2 2\nInput data 0 1 a\nReLU act 1 1 a b\nDeconvolution up 1 1 b c\n"
    (folder / "anime.param").write_text(graph)
    (folder / "anime.bin").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def store(material):
    """A finished store of 96x64."""
    request = Request(size=(96, 64), stages=1, overlap="4", precision="fp32", executor="tiles", tile=16)
    job = Job.prepare(load(material / MODEL), request, material / "s.zarr")
    job.render(job.open_sink(resume=False, overwrite=False))
    return job.out


@pytest.fixture
def folder(material, store, monkeypatch):
    """The working folder, with everything in it."""
    monkeypatch.chdir(material)
    return material


# Command line, exit code, and the line without "engine: ". Three dots stand for any text.
REFUSALS = [
    # Numbers and names
    ("plan --size -5x10", 2, "--size -5x10: not a size; write WIDTHxHEIGHT in pixels, such as 4096x3072"),
    ("plan --roi -1,0,5,5", 2, "--roi -1,0,5,5: not a region; write X,Y,WIDTH,HEIGHT ..."),
    ("plan --memory 10", 2, "--memory 10: has no unit; write one, such as 10GiB or 10MiB"),
    ("plan --memory 0", 2, "--memory 0: has no unit; ..."),
    ("plan --memory 10B", 2, "--memory 10B: too little to be meant (at least 1 MB); write an amount such as 2GiB"),
    ("plan --vram 2", 2, "--vram 2: has no unit; write one, such as 2GiB or 2MiB"),
    ("plan --memory lots", 2, "--memory lots: not an amount of memory; write a number with a unit, such as 2GiB"),
    ("plan --device foo", 2, "--device foo: not a device of this machine; use cpu..."),
    ("plan --device meta", 2, "--device meta: not a device of this machine; use cpu..."),
    ("plan --device cuda:99", 2, "--device cuda:99: not a...; use cpu..."),
    # Model files
    (
        "model build --out m.safetensors --sr nothing",
        4,
        "nothing: no such file; name a checkpoint, or packaged weights (realsr, x4plus)",
    ),
    ("model build --out m.safetensors --sr empty", 4, "empty: not a file; name a checkpoint"),
    ("model build --out m.safetensors --sr afile", 4, "afile: not a checkpoint; name a file such as .safetensors, ..."),
    (
        f"model build --out m.safetensors --sr {MODEL} --sigma 0 --sigma 0",
        2,
        "--sigma: more values (2) than steps (1); give one per step",
    ),
    ("info srformer.pth", 4, f"srformer.pth: SRFormer {SUPPORTED}; {EXTRA}"),
    ("render srformer.pth --init base.png --out o.zarr", 4, f"srformer.pth: SRFormer {SUPPORTED}; {EXTRA}"),
    (
        "info compact.pth",
        4,
        "compact.pth (compact): has no PReLU slopes, so its activation is not known; add them: ...",
    ),
    ("info five.pth", 4, "five.pth (esrgan): takes 5 channels and yields 3; networks of grey, RGB or RGBA images ..."),
    (
        "info anime.param",
        4,
        f"anime.param: waifu2x UpConv7 {SUPPORTED}; open it with waifu2x-ncnn-vulkan",
    ),
    ("info incomplete.pth", 4, "incomplete.pth (esrgan): 4 tensors (...) missing of 42; the file is incomplete"),
    ("info net.onnx", 4, "net.onnx: an ONNX graph, which is not supported; name the .pth or .safetensors file ..."),
    ("info net_d.pth", 4, f"net_d.pth: the U-Net discriminator of Real-ESRGAN's training {SUPPORTED}; name the ..."),
    (
        "info two.pth",
        4,
        "two.pth: holds several sets of tensors ('one', 'two'); save the network's alone, under 'params'",
    ),
    ("info 7.state", 4, "7.state: the state of a training, without weights; name the weights, such as ..."),
    # Stores and exports
    (
        "export nothing o.png",
        4,
        "nothing: no such store; name the folder that engine render wrote",
    ),
    ("export afile o.png", 4, "afile: is a file, not a store of engine render; name the folder that it wrote"),
    ("export base.png o.jpg", 4, "base.png: is a picture, not a store of engine render; name the folder that it wrote"),
    ("export empty o.png", 4, "empty: is a folder without an OME-Zarr image; name the folder that engine render wrote"),
    ("export s.zarr/0 o.png", 4, "s.zarr/0: is one level of a store; name the folder above it"),
    ("export s.zarr s.zarr/x.png", 2, "s.zarr/x.png: lies in the store; choose a place outside s.zarr"),
    ("export s.zarr base.png", 4, "base.png: exists; give --overwrite or choose another name"),
    ("export s.zarr afile/o.png", 4, "afile/o.png: ...afile is not a folder; choose another name"),
    (
        "export s.zarr o.png --quality 90",
        2,
        "--quality: does not apply to .png; its options are --dpi, --width-mm, --depth",
    ),
    (
        "export s.zarr o.tif --quality 90",
        2,
        "--quality: deflate is lossless; give --compression jpeg, or leave it out",
    ),
    (f"{RENDER} --out o.dzi", 2, "o.dzi: a render ends in a store or a picture; render ..."),
    ("export s.zarr o.bmp", 2, "o.bmp: no exporter for suffix '.bmp'; choose one of .tif, ..."),
    (f"{RENDER} --out s.zarr", 4, "s.zarr: exists; give --resume to finish it, --overwrite to replace it, or ..."),
    (
        f"{RENDER} --out new.zarr --report {MODEL}",
        2,
        f"--report {MODEL}: is the input {MODEL}, which it would replace; name another file",
    ),
    (
        f"{RENDER} --out new.zarr --report new.zarr/r.json",
        2,
        "--report new.zarr/r.json: cannot be written; name a file in a folder that exists",
    ),
    (
        f"probe {MODEL} --plot {MODEL}",
        2,
        f"--plot {MODEL}: unknown suffix; name a file that ends in .png or .svg",
    ),
    (
        "render renamed.pth --init base.png --out base.png --overwrite",
        2,
        "--out base.png: is the input base.png, which it would replace; name another file",
    ),
    ("check empty", 4, "empty: not a store of this engine, or its zarr.json is damaged; name the folder that ..."),
    (f"{RENDER} --out empty --resume", 4, "empty: not a store of this engine; give another --out, or --overwrite ..."),
]

PYTHON = ("Traceback", "PosixPath", "b'", 'b"', "Box(", "=True", "\x02")
"""Texts that no message may hold."""


def problem(code, err, expected_code, line):
    """Text about a message that is not as it should be, or None."""
    pattern = ".*".join(re.escape(part) for part in f"engine: {line}\n".split("..."))
    if code == expected_code and re.fullmatch(pattern, err) and not any(text in err for text in PYTHON):
        return None
    return f"exit code {code}, stderr {err!r}"


def test_messages(folder, call):
    before = sorted(map(str, Path().rglob("*")))
    failures = [
        f"{command}: {wrong}"
        for command, expected_code, line in REFUSALS
        for code, _, err in [call(command)]
        if (wrong := problem(code, err, expected_code, line))
    ]
    assert failures == []
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch can use a GPU")
def test_pytorch_without_cuda(folder, call):
    code, _, err = call("plan --device cuda")
    assert not problem(code, err, 2, "--device cuda: not available, this PyTorch is built without CUDA; use cpu")


def test_the_advice_for_too_little_memory_works(folder, call):
    plan = f"plan {MODEL} --stages 1 --overlap 4 --precision fp32 --executor tiles"
    call(f"{plan} --size 96x64 --memory 100MB")  # measures, in smaller tiles than with more memory
    code, _, err = call(f"{plan} --size 96x64 --memory 100MB")
    needs = "needs ... GiB of memory, more than 95.4 MiB; give at least --memory ..., as the idle process takes ... GiB"
    assert not problem(code, err, 3, f"--memory: the smallest tile of step 2 (...) {needs}")
    assert call(f"{plan} --size 96x64 {re.search(r'--memory .*MiB', err.split('at least')[1])[0]}")[0] == 0
    code, _, err = call(f"{plan} --size 400000x400000 --memory 2GiB")
    needs = "needs ... GiB of memory, more than 2.00 GiB; give at least --memory ...GiB, or use a smaller --size"
    assert not problem(code, err, 3, f"--memory: step 1 for its image of 100000x100000 {needs}")


def test_files_that_are_accepted(folder, call):
    """Contents count, not names, and wrappers are opened."""
    for name in ("renamed.pth", "wrapped.ckpt"):
        code, out, err = call(f"info {name}")
        assert (code, err) == (0, ""), name
        assert "esrgan" in out


def test_the_advice_for_a_damaged_shard_works(folder, call):
    """At full size and in the pyramid: the two named commands are given, the export succeeds."""
    for level, size in (("0", ""), ("1", "--max-size 48")):
        shutil.rmtree("cut.zarr", ignore_errors=True)
        shutil.copytree("s.zarr", "cut.zarr")
        shard = Path("cut.zarr") / level / "c" / "0" / "0" / "0"
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        code, _, err = call(f"export cut.zarr o.png --overwrite {size}")
        advice = "run engine check cut.zarr --repair, then repeat the store's engine render with --resume"
        assert not problem(code, err, 4, f"{shard}: damaged shard (wrong checksum, region 0,0,...); {advice}")
        assert call("check cut.zarr --repair")[0] == 0
        assert not shard.exists()
        code, _, err = call(f"{RENDER} --out cut.zarr --resume")
        assert code == 0, err
        for store in ("cut", "s"):
            assert call(f"export {store}.zarr {store}.png --overwrite {size}")[0] == 0
        assert Path("cut.png").read_bytes() == Path("s.png").read_bytes()


@pytest.mark.parametrize("name", ["picosdeeuropa", "life"])
def test_theory_of_every_model(call, name):
    model = Path(__file__).parents[2] / "models" / f"{name}.safetensors"
    code, out, err = call(f"plan {model} --theory")
    assert (code, err) == (0, "")
    assert f"{name}.safetensors: parameters" in out
