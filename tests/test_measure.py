"""Measurements before a plan: the automatic precision, by the measured error of the chain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.stores import attributes, pixels, render

from engine.job import Job
from engine.model.bundle import load
from engine.plan.measured import PrecisionError
from engine.plan.request import Request
from engine.probe import footprint

AUTO = Request(size=(256, 192), stages=2, tile=16, overlap="4", executor="tiles", device="cpu", precision="auto")


@pytest.fixture
def model(models):
    return models["rrdb"]


def test_automatic_precision(tmp_path, model, monkeypatch):
    """Half precision from the first step at which the error is tolerable."""
    good, bad = PrecisionError(0.3, 2.0, 9.0), PrecisionError(0.1, 2.1, 3.0)
    for half, errors, precision, error in (
        (None, None, "fp32", None),
        ("bf16", [good, good], "bf16", good),
        ("bf16", [bad, good], "fp32,bf16", good),
        ("fp16", [bad, bad], "fp32", None),
    ):
        monkeypatch.setattr("engine.measure.fast_half", lambda device, half=half: half)
        monkeypatch.setattr("engine.probe.footprint.half_pays", lambda *_: True)
        monkeypatch.setattr("engine.probe.precision.precision_errors", lambda *_, errors=errors: errors)
        job = Job.prepare(model, AUTO, tmp_path / "out.zarr")
        assert job.plan.precision == precision
        assert job.measured.precision_error == error
        assert [stage.precision for stage in job.stages] == (precision.split(",") * 2)[:2]


def test_error_of_half_precision_is_measured_once(tmp_path, model, monkeypatch):
    monkeypatch.setattr("engine.measure.fast_half", lambda device: "bf16")
    monkeypatch.setattr("engine.probe.footprint.half_pays", lambda *_: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = []
    first, second = (render(model, AUTO, tmp_path / f"{name}.zarr", log=lines.append) for name in "ab")
    assert lines.count("measuring the error of bf16 (once)") == 1
    assert first.plan == second.plan
    error = attributes(first.out)["precision_error_levels"]
    assert first.plan.precision == "fp32" or PrecisionError(**error).tolerable
    np.testing.assert_array_equal(pixels(first.out), pixels(second.out))


def test_half_precision_must_be_faster(tmp_path, monkeypatch):
    """A CPU may have the instructions and yet be slower with them. Measured once."""
    for ratio, pays in ((0.5, True), (1.4, False)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(ratio)))
        times = iter([ratio, 1.0])
        monkeypatch.setattr(footprint, "_convolution_seconds", lambda dtype, times=times: next(times))
        assert footprint.half_pays("bf16", torch.device("cpu")) is pays
        assert footprint.half_pays("bf16", torch.device("cpu")) is pays
    assert footprint.half_pays("fp16", torch.device("meta"))


def test_resume_keeps_the_precision_of_the_store(tmp_path, model, monkeypatch):
    """Another day's times would choose another precision; the store's own goes on."""
    expected = render(model, replace(AUTO, precision="bf16"), tmp_path / "whole" / "out.zarr")
    render(model, replace(AUTO, precision="bf16"), tmp_path / "part" / "out.zarr", writes=3)
    monkeypatch.setattr("engine.measure.fast_half", lambda device: None)
    job = render(model, AUTO, tmp_path / "part" / "out.zarr", resume=True)
    assert job.plan == expected.plan
    np.testing.assert_array_equal(pixels(job.out), pixels(expected.out))


def test_bands_in_one_strip_measure_little(tmp_path, model_file, monkeypatch, picture):
    """Neither halos nor the cost of tiles, for a bare checkpoint and a picture of any size."""

    def measured(*_, **__):
        raise AssertionError("measured")

    for name in ("footprint.stage_footprint", "profiles.measure_profiles"):
        monkeypatch.setattr(f"engine.probe.{name}", measured)
    values = (picture(20, 24).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "small.png")
    request = Request(init=tmp_path / "small.png", precision="fp32")
    job = render(load(model_file.parent / "sr.safetensors"), request, tmp_path / "out.zarr")
    assert job.plan.executor == "bands"
    assert job.seam_error == 0
    assert not job.plan.needs_halos
