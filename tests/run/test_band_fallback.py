"""Rows of shards that half precision cannot represent: float32's pixels there, half's elsewhere, in any order of the work."""

import gc
import json
from dataclasses import replace
from weakref import WeakSet

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from support.stores import files, pixels, render

from engine.archs.esrgan import RRDBNet
from engine.bands.stream import RowStream
from engine.errors import RenderError
from engine.model.bundle import load
from engine.plan import strips
from engine.plan.request import Request
from engine.run.stage import Stage

ROWS = 64
"""Rows of a shard."""

SPOT = 150
"""LR row of a bright spot, in the tenth row of shards."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(strips, "SHARD", ROWS)
    monkeypatch.setattr(strips, "CHUNK", ROWS)


@torch.no_grad()
def louder(network, gain):
    """The same function with feature maps ``gain`` times as large between the first and the last convolution."""
    network.conv_first.weight.mul_(gain)
    network.conv_last.weight.div_(gain)
    for name, parameter in network.named_parameters():
        if name.endswith("bias") and name != "conv_last.bias":
            parameter.mul_(gain)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark pictures with and without a bright spot, and a network whose maps overflow fp16 at the spot alone."""
    folder = tmp_path_factory.mktemp("overflow")
    torch.manual_seed(0)
    network = RRDBNet(channels=16, blocks=1, growth=8).eval().requires_grad_(False)
    network.conv_last.bias.fill_(0.3)
    network.conv_last.weight.mul_(20)
    dark = (torch.rand(3, 300, 36) * 50).round()
    spot = dark.clone()
    spot[:, SPOT, 20] = 255
    for name, image in (("dark", dark), ("spot", spot)):
        Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8)).save(folder / f"{name}.png")
    with torch.no_grad():
        largest = [float(network.trunk(image[None] / 255).abs().max()) for image in (dark, spot)]
    assert largest[1] > 1.5 * largest[0]
    save_file(louder(network, 65504 / (0.7 * largest[1])).state_dict(), folder / "loud.safetensors")
    return folder


def request(folder, picture, precision, **changes):
    return Request(init=folder / f"{picture}.png", executor="bands", precision=precision, device="cpu", **changes)


@pytest.fixture(scope="module")
def loud(folder):
    return load(folder / "loud.safetensors")


def redone_rows(image, expected):
    """Numbers of the rows of shards in which ``image`` is ``expected``."""
    tops = range(0, image.shape[1], ROWS)
    return {y // ROWS for y in tops if np.array_equal(image[:, y : y + ROWS], expected[:, y : y + ROWS])}


def test_overflowing_rows_are_those_of_fp32(tmp_path, folder, loud):
    """The spot reaches as far as the receptive field; rows beyond have the bits of a picture without it."""
    images = {}
    for picture, precision in (("spot", "fp16"), ("spot", "fp32"), ("dark", "fp16")):
        job = render(loud, request(folder, picture, precision), tmp_path / f"{picture} {precision}.zarr")
        images[picture, precision] = pixels(job.out)
        assert job.redone == (3 if (picture, precision) == ("spot", "fp16") else 0), (picture, precision)
    reach = job.stages[0].radius
    reached = {y * 4 // ROWS for y in range(SPOT - reach, SPOT + reach + 1)}
    half, full, dark = images.values()
    assert half.std() > 2
    assert redone_rows(half, full) >= reached
    assert redone_rows(half, dark) >= set(range(1200 // ROWS)) - reached
    assert not np.array_equal(full[:, : 4 * (SPOT - 2 * reach)], dark[:, : 4 * (SPOT - 2 * reach)])


@pytest.mark.parametrize("tile", [None, 16])
def test_resumed_anywhere_it_has_the_same_bits(tmp_path, folder, loud, tile):
    """Resumed above, within and below the rows that overflow; in strips too."""
    spot = request(folder, "spot", "fp16", tile=tile, overlap="8")
    whole = render(loud, spot, tmp_path / "out.zarr")
    expected, boxes = files(tmp_path), list(whole.plan.writes())
    assert 3 <= whole.redone < len(boxes)
    for lost in ([8], [9, 10], [11], range(7, len(boxes))):
        for index in lost:
            for row, column in whole.plan.grid().indices(boxes[index]):
                (whole.out / "0" / "c" / "0" / str(row) / str(column)).unlink()
        group = zarr.open_group(whole.out, mode="r+")
        group.attrs["ourgan"] = {**group.attrs["ourgan"], "complete": False}
        render(loud, spot, whole.out, resume=True)
        assert files(tmp_path) == expected, lost


def test_at_most_one_stream_of_a_stage_is_in_memory(tmp_path, folder, loud, monkeypatch):
    alive, counts, make = WeakSet(), [], RowStream.__init__

    def counted(self, *args):
        alive.add(self)
        counts.append(len(alive))
        make(self, *args)

    monkeypatch.setattr(RowStream, "__init__", counted)
    gc.collect()
    gc.disable()
    try:
        assert render(loud, request(folder, "spot", "fp16"), tmp_path / "out.zarr").redone == 3
    finally:
        gc.enable()
    assert len(counts) > 2
    assert max(counts) == 1


def poison(monkeypatch, is_poisoned):
    """Put NaN into row 700 of the output of some stages."""
    push = Stage.push

    def poisoned(self, *arguments):
        for y, rows in push(self, *arguments):
            if is_poisoned(self) and y <= 700 < y + rows.shape[2]:
                rows = rows.clone()
                rows[0, 1, 700 - y, 20] = torch.nan
            yield y, rows

    monkeypatch.setattr(Stage, "push", poisoned)


def test_bf16_too_and_the_report_counts_them(tmp_path, folder, monkeypatch, call):
    poison(monkeypatch, lambda stage: stage.precision == "bf16")
    for precision in ("bf16", "fp32"):
        report = tmp_path / f"{precision}.json"
        code, out, _ = call(
            f"render {folder / 'loud.safetensors'} --init {folder / 'spot.png'} --precision {precision} --executor bands "
            f"--out {tmp_path / precision}.zarr --report {report} -v"
        )
        assert code == 0
        assert json.loads(report.read_text())["measured"]["tiles_redone_in_fp32"] == (precision == "bf16")
        assert ("rows of shards computed again in fp32: 1" in out) == (precision == "bf16")
    half, full = (pixels(tmp_path / f"{precision}.zarr") for precision in ("bf16", "fp32"))
    assert redone_rows(half, full) == {700 // ROWS}


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_without_a_fault_stay_in_half(tmp_path, models, monkeypatch, stage):
    """The stage with the fault runs in float32, the other one does not: the pixels are those of neither precision."""
    small = Request(size=(256, 192), stages=2, overlap="exact", executor="bands", device="cpu")
    images = {p: pixels(render(models["rrdb"], replace(small, precision=p), tmp_path / f"{p}.zarr").out)
              for p in ("fp32,bf16", "bf16,fp32", "bf16")}  # fmt: skip
    row, push = {1: 30, 2: 100}[stage], Stage.push
    job_stages = []

    def poisoned(self, stream, band):
        for y, rows in push(self, stream, band):
            first = self.precision == "bf16" and rows.shape[3] == {1: 64, 2: 256}[stage]
            if first and y <= row < y + rows.shape[2]:
                job_stages.append(self)
                rows = rows.clone()
                rows[0, 0, row - y, 3] = torch.inf
            yield y, rows

    monkeypatch.setattr(Stage, "push", poisoned)
    job = render(models["rrdb"], replace(small, precision="bf16"), tmp_path / "out.zarr")
    assert job_stages
    assert job.redone >= 1
    mixed = pixels(job.out)
    again = redone_rows(mixed, images["fp32,bf16" if stage == 1 else "bf16,fp32"]) - redone_rows(mixed, images["bf16"])
    assert again
    assert (row * (4 if stage == 1 else 1)) // ROWS in again
    assert len(again | redone_rows(mixed, images["bf16"])) == 192 // ROWS


def test_fault_in_fp32_too_ends_the_render(tmp_path, folder, loud, monkeypatch):
    poison(monkeypatch, lambda stage: True)
    for precision, words in (("bf16", ", in fp32; .*not written; check"), ("fp32", ", in fp32; .*not written; check")):
        with pytest.raises(
            RenderError, match=rf"step 2: 1 NaN or infinite values in rows \d+ to \d+{words} the weights"
        ):
            render(loud, request(folder, "spot", precision), tmp_path / f"{precision}.zarr")
