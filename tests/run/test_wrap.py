"""Images that repeat: they begin anywhere on the periodic plane with the same pixels, bit for bit, and have no seam."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support import networks, small
from support.plans import cost_of, measured_of
from support.stores import attributes, pixels, render

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config
from engine.errors import ResumeError, UsageError
from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.job import Job
from engine.model.bundle import load
from engine.plan.canvas import Canvas, wrapped_picture, wrapped_scene
from engine.plan.make import make_plan
from engine.plan.measured import BandCost
from engine.plan.request import WRAPS, Request
from engine.run.pipeline import row_chain, tile_chain
from engine.run.rows import RowReader
from engine.run.stage import Stage

BASE = (12, 16)
OFFSETS = ((4, 0), (8, 12))
"""Rows and columns of the base, whole windows of the networks."""


@pytest.fixture(scope="module", params=["rrdb", "swinir"])
def stage(request):
    torch.manual_seed(0)
    if request.param == "rrdb":
        network = networks.lively(RRDBNet(channels=8, blocks=1, growth=4, scale=2, noise_channels=3))
    else:
        network = networks.swinir(4, 2)
    return Stage(network, torch.device("cpu"), "fp32")


def planned(stage, wrap, executor, tile=None):
    """Cuts of two steps over ``BASE``."""
    canvas = Canvas(tuple(4 * n for n in BASE), BASE, 2, wraps=WRAPS[wrap])
    cost = cost_of(
        bands=BandCost(stage.stream_plan(64).band, 0.0, 0.0), scale=2, align=stage.align, radius=stage.radius, sigma=0.1
    )
    request = Request(executor=executor, tile=tile, overlap="exact", wrap=wrap)
    return make_plan(request, measured_of([cost, cost], canvas=canvas)).stages


def begun_at(cuts, offset):
    """The cuts of the image that begins elsewhere on the plane; ``offset``: rows and columns of the base."""
    starts = [tuple(n + d * 2**k for n, d in zip(cut.start, offset, strict=True)) for k, cut in enumerate(cuts)]
    return tuple(replace(cut, start=start) for cut, start in zip(cuts, starts, strict=True))


@pytest.mark.parametrize("executor", ["tiles", "bands", "strips"])
def test_rolled_image_is_the_image_begun_there(stage, executor, tmp_path):
    """With noise in both steps, added and appended, in tiles that do not divide the image."""
    torch.manual_seed(1)
    image = torch.rand(3, *BASE)
    name, tile = {"tiles": ("tiles", 8), "bands": ("bands", None), "strips": ("bands", 8)}[executor]
    cuts = planned(stage, "both", name, tile)

    def whole(start):
        moved = begun_at(cuts, start)
        height, width = moved[-1].grid.bounds.shape
        if executor == "tiles":
            folder = tmp_path / str(start)
            chain = tile_chain(moved, [stage] * 2, TensorSource(image), seed=5, scratch=folder, cache_bytes=1 << 30)
            return chain[-1].read(Box(0, 0, height, width))
        step = width if executor == "bands" else 16
        strips = [
            RowReader(row_chain(moved, [stage] * 2, TensorSource(image), (x, x + step), seed=5).rows(0)).take(height)
            for x in range(0, width, step)
        ]
        return torch.cat([strip.pixels for strip in strips], 2)

    expected = whole((0, 0))
    assert expected.shape == (3, *(4 * n for n in BASE))
    assert expected.float().std() > 5
    for offset in OFFSETS:
        rolled = expected.roll([-4 * n for n in offset], (1, 2))
        assert not torch.equal(rolled, expected)
        assert torch.equal(whole(offset), rolled)


@pytest.mark.parametrize(("wrap", "unlike"), [("x", "y"), ("y", "x")])
def test_other_axis_keeps_its_border(stage, wrap, unlike):
    """Along it nothing is added, and the image ends as without --wrap."""
    one, other = planned(stage, wrap, "bands"), planned(stage, unlike, "bands")
    axis = 0 if wrap == "x" else 1
    for cut, swapped in zip(one, other, strict=True):
        assert (cut.height, cut.width)[axis] == cut.source_shape[axis] < (swapped.height, swapped.width)[axis]
        assert cut.period[axis] == cut.start[axis] == cut.margins[axis] == 0
        assert cut.margins[1 - axis] >= cut.halo


@pytest.mark.parametrize("wrap", ["x", "y", "both"])
def test_step_1_begins_anywhere(wrap):
    """Rolled noise is a rolled image, to the rounding of its statistics, where every scale is a multiple of the first."""
    torch.manual_seed(0)
    config = Config(last=2, last_vae=1, channels=8, latent=6, layers=1, coordinates=wrap == "x")
    plain = BaseGenerator(config, ((6, 8), (12, 16), (24, 32)))
    structure = plain.wrapped(WRAPS[wrap])
    axes = [axis for axis, wraps in enumerate(WRAPS[wrap], 1) if wraps]

    def draw(offset):
        def noise(scale, shape):
            generator = torch.Generator().manual_seed(scale)
            return torch.randn(shape, generator=generator).roll([-offset * 2**scale] * len(axes), axes)

        return structure.sample(noise)

    first = draw(0)
    torch.testing.assert_close(draw(3), first.roll([-12] * len(axes), axes), atol=1e-4, rtol=0)
    assert structure.decoder.tail.weight is plain.decoder.tail.weight
    assert not plain.wraps[0]
    assert not plain.decoder.tail.wraps[1]


def test_render_resumes_and_records_it(model_file, tmp_path):
    """With memory for one tile or strip, by tiles and by bands; another wrap is another image."""
    model = load(model_file)
    options = {"size": (64, 48), "stages": 1, "precision": "fp32", "overlap": "exact", "wrap": "both"}
    images = []
    for executor, tile in (("bands", None), ("tiles", 16)):
        request = Request(executor=executor, tile=tile, seed=3, **options)
        whole = render(model, request, tmp_path / f"{executor}.zarr")
        assert (whole.plan.wrap, whole.plan.base, whole.plan.canvas) == ("both", (12, 16), (48, 64))
        assert attributes(whole.out)["plan"]["wrap"] == "both"
        assert whole.seam_error == 0.0
        images.append(pixels(whole.out).astype(int))
        begun = tmp_path / "begun.zarr"
        render(model, request, begun, writes=1, overwrite=True)
        render(model, request, begun, resume=True)
        assert np.array_equal(pixels(begun), images[-1])
        with pytest.raises(ResumeError, match='wrap: "both" there, "x" here'):
            Job.prepare(model, replace(request, wrap="x"), begun).open_sink(resume=True)
    assert np.abs(images[0] - images[1]).max() <= 1
    plain = pixels(render(model, Request(**options | {"seed": 3, "wrap": None}), tmp_path / "plain.zarr").out)
    for axis in (1, 2):
        inside = np.abs(np.diff(images[0], axis=axis)).mean()
        across, unwrapped = (np.abs(i.take(0, axis) - i.take(-1, axis)).mean() for i in (images[0], plain.astype(int)))
        assert across < 1.5 * inside < unwrapped


def test_scene_becomes_whole_periods():
    """Of whole windows of the first step; a base that was cropped, or is between two enlargements, is reduced."""
    scene, both = Canvas((96, 128), (24, 32), 1), WRAPS["both"]
    assert wrapped_scene(scene, both, [4, 4], [8, 8]) == replace(scene, wraps=both)
    between = Canvas((140, 200), (45, 64), 1, enlarged=(179, 256))
    assert wrapped_scene(between, both, [4, 4], [1, 1]) == replace(between, enlarged=(180, 256), wraps=both)
    assert wrapped_scene(between, WRAPS["x"], [4, 4], [1, 1]) == replace(between, wraps=WRAPS["x"])
    with pytest.raises(UsageError, match="^size=.200x140.: would stretch .* by 7% .* of 32 are exact.; use 192x128$"):
        wrapped_scene(between, both, [4, 4], [8, 8])


def test_pictures_repeat_in_whole_windows():
    picture, wraps = (24, 32), WRAPS["x"]
    canvas = Canvas((48, 64), picture, 1, enlarged=(96, 128))
    assert wrapped_picture(canvas, wraps, picture, [4], [8]) == replace(canvas, wraps=wraps)
    with pytest.raises(UsageError, match="^size=.1280x960.: too large to repeat .at most 128x96 from 32x24."):
        wrapped_picture(Canvas((960, 1280), (240, 320), 1), wraps, picture, [4], [8])
    with pytest.raises(UsageError, match="^wrap: .* of 30x24 .*; resize it to 24x24$"):
        wrapped_picture(Canvas((96, 120), (24, 30), 1), WRAPS["both"], (24, 30), [4], [8])


@pytest.mark.parametrize("size", [(96, 72), (128, 96)])
@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_deep_picture_with_alpha_repeats(model_file, tmp_path, executor, size):
    """Alpha, and the colours beside it that fill transparent pixels, continue on the other side."""
    image = np.full((24, 32, 4), 65535, np.uint16)
    image[..., :3] = (small.picture(24, 32).permute(1, 2, 0) * 65535).numpy()
    image[8:, 28:] = 0
    model, images = load(model_file), []
    request = Request(executor=executor, tile=16 if executor == "tiles" else None, precision="fp32", overlap="exact")
    for offset in (0, 8):
        path = tmp_path / f"{offset}.tif"
        tifffile.imwrite(path, np.roll(image, -offset, (0, 1)), photometric="rgb", extrasamples=["unassalpha"])
        one = replace(request, init=path, stages=1, size=size, wrap="both")
        images.append(pixels(render(model, one, tmp_path / f"{offset}.zarr").out).astype(int))
    assert images[0].shape[0] == 4
    difference = np.abs(np.roll(images[0], -8 * size[0] // 32, (1, 2)) - images[1])
    assert difference[3].max() <= 1
    assert difference.max() <= 8


@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_reduced_enlargement_of_a_rolled_picture(model_file, tmp_path, executor):
    """A rolled picture becomes the rolled image, to the rounding of the window's weights."""
    image = small.picture(24, 32).mul(255).byte().permute(1, 2, 0).numpy()
    model, images = load(model_file), []
    request = Request(executor=executor, tile=16 if executor == "tiles" else None, precision="fp32", overlap="exact")
    for number, offset in enumerate((0, 8)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.roll(image, -offset, (0, 1))).save(path)
        one = replace(request, init=path, stages=1, size=(96, 72), wrap="both")
        job = render(model, one, tmp_path / f"{number}.zarr")
        assert (job.plan.enlarged, job.plan.stages[-1].is_image) == ((96, 128), False)
        images.append(pixels(job.out).astype(int))
    difference = np.abs(np.roll(images[0], -24, (1, 2)) - images[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


def test_blend_and_unknown_axes_are_refused():
    with pytest.raises(UsageError, match="^blend=8: "):
        Request(wrap="x", blend=8)
    with pytest.raises(UsageError, match="^wrap=.z.: .*use one of x, y, both"):
        Request(wrap="z")
