"""Measurements before a plan: the automatic precision, by the measured error of the chain."""

import numpy as np
import pytest
from support.stores import attributes, pixels, render

from engine.job import Job
from engine.plan.measured import PrecisionError
from engine.plan.request import Request

AUTO = Request(size=(192, 256), stages=2, tile=16, overlap="4", executor="tiles", device="cpu", precision="auto")


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
        monkeypatch.setattr("engine.probe.precision.precision_errors", lambda *_, errors=errors: errors)
        job = Job.prepare(model, AUTO, tmp_path / "out.zarr")
        assert job.plan.precision == precision
        assert job.measured.precision_error == error
        assert [stage.precision for stage in job.stages] == (precision.split(",") * 2)[:2]


def test_error_of_half_precision_is_measured_once(tmp_path, model, monkeypatch):
    monkeypatch.setattr("engine.measure.fast_half", lambda device: "bf16")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = []
    first, second = (render(model, AUTO, tmp_path / f"{name}.zarr", log=lines.append) for name in "ab")
    assert lines.count("measuring the error of bf16 (once)") == 1
    assert first.plan == second.plan
    error = attributes(first.out)["precision_error_levels"]
    assert first.plan.precision == "fp32" or PrecisionError(**error).tolerable
    np.testing.assert_array_equal(pixels(first.out), pixels(second.out))
