"""The command line on a pretend accelerator: the pixels of the CPU, within the device's memory."""

import json
from contextlib import contextmanager
from copy import deepcopy
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.accelerator import GIB, MIB, TYPE, pretend_accelerator
from support.stores import files, pixels
from support.training import stop_after
from support.undo import without

from engine.cli import score
from engine.device import runtime
from engine.device.queue import memory_errors
from engine.errors import Interrupted
from engine.job import Job
from engine.kernels.blend import weights as ramps
from engine.metrics import weights
from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures, Lpips
from engine.metrics.sifid import Inception
from engine.model.bundle import load
from engine.plan.request import Request
from engine.probe import erf, footprint
from engine.run import batched, blend
from engine.run.batched import BatchRunner
from engine.run.stage import Stage
from engine.run.tiles import TiledStage
from engine.training.run.runtime import Runtime
from engine.training.structure.train import train_structure

SMALL = "--size 256x192 --stages 2 --seed 3 --overlap 4 --tile 16"
"""12 writes."""


def assert_close(image, expected, levels=1):
    """A tail in chunks sums in another order: one level in single pixels, as on a real device."""
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= levels
    assert difference.mean() < 0.1 * levels


@pytest.fixture
def accelerator(monkeypatch):
    """Two devices, whose footprints are measured on small tiles."""
    monkeypatch.setattr(footprint, "_SMALL", 16)
    monkeypatch.setattr(footprint, "_LARGE", 32)
    ramps.cache_clear()  # tensors of the device of an earlier test
    with pretend_accelerator() as board:
        yield board


@pytest.fixture
def render(tmp_path, call, model_file):
    """Function ``render(name, options)`` that renders to a store and returns its pixels."""

    def run(name, options, model=model_file, code=0, small=SMALL):
        out = tmp_path / name / "out.zarr"
        out.parent.mkdir(exist_ok=True)
        ended, _, errors = call(f"render {model} {small} {options} --out {out}")
        assert ended == code, errors
        return pixels(out) if code == 0 else errors

    return run


def test_batches_have_the_pixels_of_the_cpu(tmp_path, render, accelerator):
    """The user names a type; the device has an index from then on."""
    expected = render("cpu", "--device cpu --precision fp32")
    report = tmp_path / "report.json"
    image = render("device", f"--device {TYPE} --precision fp32 --vram 400MiB --report {report}")
    assert_close(image, expected)
    assert accelerator.counts["replays"] > 1
    measured = json.loads(report.read_text())
    assert 300 * MIB < measured["measured"]["device_peak"] <= 400 * MIB
    assert measured["projection"]["device"] <= 400 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--executor bands", "--executor tiles"])
def test_other_executors_have_the_pixels_of_the_cpu(render, accelerator, options):
    expected = render("cpu", f"--device cpu --precision fp32 {options}")
    assert_close(render("device", f"--precision fp32 {options}"), expected)
    assert accelerator.counts["launches"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["batched", "tiles"])
def test_tiles_are_cross_faded_on_the_device(tmp_path, render, accelerator, monkeypatch, executor):
    """Only finished cells come to the host, within the projection."""
    blended = []

    def watched(first, second, *arguments):
        blended.append({first.device.type, second.device.type})
        return kernel(first, second, *arguments)

    kernel = blend.blend
    options = f"--precision fp32 --blend 8 --executor {executor}"
    expected = render("cpu", f"--device cpu {options}")
    monkeypatch.setattr(blend, "blend", watched)
    report = tmp_path / "report.json"
    assert_close(render("device", f"{options} --report {report}"), expected)
    assert len(blended) > 10
    assert all(types == {TYPE} for types in blended)
    content = json.loads(report.read_text())
    assert content["measured"]["device_peak"] <= content["projection"]["device"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinir", "noisy"])
def test_other_networks_in_half_precision(render, models, accelerator, name):
    expected = render("cpu", "--device cpu --precision fp32", models[name].path)
    assert_close(render("device", "--precision fp16", models[name].path), expected, 3)


@pytest.mark.slow
def test_second_device_is_used_alone(render, accelerator):
    """The current device stays the first: a call without a device would be about the wrong one."""
    render("device", f"--device {TYPE}:1 --precision fp32 --vram 400MiB")
    first, second = accelerator.memory
    assert (first.peak_reserved, first.live) == (0, 0)
    assert second.peak_reserved > 0


def test_nothing_waits_while_batches_are_queued(render, accelerator, monkeypatch):
    """A batch is queued without waiting for the device, but for events and for pixels of the stage below."""
    start, depth = BatchRunner._start, count()

    def watched(runner, image, tiles):
        with accelerator.forbid_synchronization():
            next(depth)
            return start(runner, image, tiles)

    monkeypatch.setattr(BatchRunner, "_start", watched)
    render("device", "--precision fp32")
    assert next(depth) > 1


@pytest.mark.slow
def test_exhausted_memory_makes_batches_smaller(render, accelerator, monkeypatch):
    """Another process takes the memory between the plan and the render."""
    expected = render("roomy", "--precision fp32")
    allocate = BatchRunner.allocate
    batches = []

    def crowded(runner):
        memory = accelerator.memory[0]
        memory.others = memory.total - memory.context - memory.reserved - 8 * MIB
        batches.append(runner.batch)
        allocate(runner)

    monkeypatch.setattr(BatchRunner, "allocate", crowded)
    assert_close(render("crowded", "--precision fp32"), expected)
    assert min(batches) < max(batches)


@contextmanager
def overflowing():
    """A pixel of the first tile of every batch overflows in half precision."""
    fill = Stage.fill

    def bright(stage, out, tiles, chunks):
        fill(stage, out, tiles, chunks)
        if stage.precision == "fp16":
            out[0, 0, out.shape[2] // 2, out.shape[3] // 2] = torch.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "fill", bright)
        yield


@pytest.mark.slow
def test_overflowing_tiles_are_computed_again_in_float32(tmp_path, render, accelerator):
    expected = render("fp32", "--precision fp32")
    report = tmp_path / "report.json"
    with overflowing():
        image = render("fp16", f"--precision fp32,fp16 --report {report}")
    assert json.loads(report.read_text())["measured"]["tiles_redone_in_fp32"] > 0
    assert_close(image, expected, 3)


@pytest.mark.slow
def test_stopped_render_is_finished_with_the_same_bits(render, tmp_path, model_file, accelerator):
    request = Request(size=(256, 192), stages=2, seed=3, overlap="4", tile=16, precision="fp32")
    render("whole", "--precision fp32")
    job = Job.prepare(load(model_file), request, tmp_path / "parts" / "out.zarr", lambda line: None)
    (tmp_path / "parts").mkdir()
    run = job.run(job.open_sink())
    for _ in range(5):
        next(run)
    run.close()
    render("parts", "--precision fp32 --resume")
    assert {n: b for n, b in files(tmp_path / "parts").items() if "zarr.json" not in n} == {
        n: b for n, b in files(tmp_path / "whole").items() if "zarr.json" not in n
    }


@pytest.mark.slow
def test_float32_has_the_device_to_itself_if_batches_cannot_shrink(render, accelerator, monkeypatch):
    """Beside the batches there is no memory for a tile in float32, which is then not a reason for smaller tiles."""
    with overflowing():
        expected = render("roomy", "--precision fp32,fp16")
    monkeypatch.setattr("support.accelerator.memory.SEGMENT", 512)  # the tiles are small
    prepare, redone = batched._prepare, []

    def crowded(runners):
        prepare(runners)
        memory = accelerator.memory[0]
        memory.empty_cache()
        memory.others = memory.others or memory.free - MIB

    in_float32 = TiledStage._in_float32

    def large(image, *arguments):
        """As a network of the usual size takes it."""
        redone.append(accelerator.memory[0].free)
        with memory_errors():
            torch.empty(2 * MIB, dtype=torch.uint8, device=image.stage.device)
        return in_float32(image, *arguments)

    monkeypatch.setattr(batched, "_prepare", crowded)
    monkeypatch.setattr(TiledStage, "_in_float32", large)
    monkeypatch.setattr(BatchRunner, "shrink", lambda runner: False)
    with overflowing():
        image = render("crowded", "--precision fp32,fp16")
    np.testing.assert_array_equal(image, expected)
    assert min(redone) < 2 * MIB < max(redone)


def probe(call, model, device):
    code, out, errors = call(f"probe {model} --json --device {device}")
    assert code == 0, errors
    return json.loads(out)


def test_probe_measures_what_the_cpu_measures(call, model_file, accelerator, monkeypatch):
    monkeypatch.setattr(erf, "SAMPLES", 3)
    on_cpu, on_device = (probe(call, model_file, device) for device in ("cpu", TYPE))
    for one, other in zip(on_cpu["steps"], on_device["steps"], strict=True):
        assert one["erf_abs"] == other["erf_abs"]
        assert one["erf_square"] == other["erf_square"]
    assert accelerator.counts["aten::convolution_backward"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training(tmp_path, call, large_photo, start_file, structure_file, config, accelerator, precision):
    """With simulated inputs, validation, discriminators and checkpoints."""
    words = f"train sr {large_photo} --config {config} --start {start_file} --structure {structure_file}"
    code, _, errors = call(f"{words} --precision {precision} --out {tmp_path / 'sr.safetensors'}")
    assert code == 0, errors
    assert accelerator.counts["aten::convolution_backward"] > 10
    assert (tmp_path / "sr.safetensors").is_file()


@pytest.mark.slow
def test_training_of_step_1_resumes(tmp_path, photo, structure_request, accelerator):
    """By its own losses, with networks whose gradients are differentiated again."""
    request, device = structure_request(iterations=(2, 2, 2), adversarial=0.1), torch.device(TYPE, 0)
    train_structure(photo, tmp_path / "whole.safetensors", request, Runtime(device=device))
    out = tmp_path / "parts.safetensors"
    with pytest.raises(Interrupted):
        train_structure(photo, out, request, Runtime(device=device, on_event=stop_after(1, phase=2)))
    train_structure(photo, out, request, Runtime(device=device, resume=True))
    assert load_file(out).keys() == load_file(tmp_path / "whole.safetensors").keys()
    for name, values in load_file(tmp_path / "whole.safetensors").items():
        assert torch.equal(load_file(out)[name], values), name


@pytest.mark.slow
def test_score(tmp_path, call, picture, accelerator, monkeypatch):
    """With networks of random weights: a few differences in the last bits against the CPU."""
    for seed in range(3):
        values = (picture(64, 80, seed=seed).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / f"{seed}.png")
    inception, alex = InceptionPrefix().eval(), AlexFeatures().eval()
    heads = [torch.rand(channels) for channels in (64, 192, 384, 256, 256)]
    monkeypatch.setattr(score, "choose_metrics", lambda *_: (("sifid", "lpips"), []))
    monkeypatch.setattr(weights, "load_inception", lambda _, device: Inception(deepcopy(inception), device))
    monkeypatch.setattr(weights, "load_lpips", lambda _, device: Lpips(deepcopy(alex), heads, device))
    # The root of a covariance takes the host half a minute; means and covariances are what the device computes.
    monkeypatch.setattr("engine.metrics.score.frechet_distance", lambda a, b: float(((a.mean - b.mean) ** 2).sum()))
    results = []
    for device in ("cpu", TYPE):
        names = " ".join(str(tmp_path / f"{seed}.png") for seed in (1, 2))
        code, out, errors = call(f"score --real {tmp_path / '0.png'} {names} --json --device {device}")
        assert code == 0, errors
        results.append(json.loads(out))
    on_cpu, on_device = results
    assert on_device["device_peak"] > 300 * MIB
    assert on_device["mean"]["sifid"] == pytest.approx(on_cpu["mean"]["sifid"], rel=1e-3)
    assert on_device["diversity"]["lpips"] == pytest.approx(on_cpu["diversity"]["lpips"], rel=1e-3)


@pytest.mark.slow
def test_a_probe_in_a_render_keeps_to_the_limit(tmp_path, render, accelerator, monkeypatch):
    """Gradients take many times a tile's memory. Nothing was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(erf, "SAMPLES", 3)
    render("device", f"--precision fp32 --overlap erf:0.98 --vram {GIB}B", small=SMALL.replace("--overlap 4 ", ""))
    memory = accelerator.memory[0]
    assert accelerator.counts["aten::convolution_backward"] > 0
    assert memory.peak_reserved + memory.context <= GIB


# What the accelerator is for: mends of blockers, taken out


def test_finds_a_device_without_an_index(render, accelerator, monkeypatch):
    """PyTorch limits the memory of devices with an index only."""
    without(monkeypatch, runtime, "current_device", "torch.device(kind, ", "torch.device(kind) if kind else (")
    errors = render("device", f"--device {TYPE} --precision fp32 --vram 400MiB", code=1)
    assert "Expected a torch.device with a specified index or an integer" in errors


def test_finds_a_gradient_left_on_the_device(call, model_file, accelerator, monkeypatch):
    without(monkeypatch, erf, "_bin", ".cpu()")
    code, _, errors = call(f"probe {model_file} --json --device {TYPE}")
    assert code == 1
    assert "index_add_: Expected all tensors to be on the same device" in errors
