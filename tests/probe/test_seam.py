"""Seam curves against computed errors and against real tiles."""

import pytest
import torch
from support.plans import stage_of
from torch import nn
from torch.nn import functional as F

from engine.geometry import Box
from engine.probe.seam import NEGLIGIBLE, far_effect, seam_curve


@pytest.fixture
def content(picture):
    return [picture(96, 144)[None]]


def curve_of(network, content):
    return seam_curve(network, content, network.scale, network.align)[0]


@pytest.fixture(params=["rrdb", "swinir"])
def network(request, small_rrdb, small_swinir):
    return {"rrdb": small_rrdb, "swinir": small_swinir}[request.param]


class Blur(nn.Module):
    """Box filter of a known radius; beyond a cut it averages zeros."""

    scale, align = 1, 1

    def __init__(self, radius):
        super().__init__()
        self.radius = radius

    def forward(self, x):
        side = 2 * self.radius + 1
        return F.avg_pool2d(x, side, stride=1, padding=self.radius)


def test_curve_ends_at_the_theoretical_radius(content):
    for radius in (0, 1, 5, 10):
        points = curve_of(Blur(radius), content)
        for point in points:
            assert (point.max < NEGLIGIBLE) == (point.halo >= radius)
        assert radius <= points[-1].halo <= radius + 1


def test_errors_of_a_blur(picture):
    """On white, a box of radius r at distance h from a straight cut loses (r - h) / (2 r + 1)."""
    points = curve_of(Blur(10), [torch.ones(1, 3, 96, 96)])
    by_halo = {p.halo: p for p in points}
    for halo in (0, 4, 8):
        lost = [(10 - h) / 21 for h in (halo, halo + 1)]
        # The maximum is at the corner of both cuts; the mean is that of two rows along one cut.
        corner = 1 - (1 - lost[0]) ** 2
        assert by_halo[halo].max == pytest.approx(255 * corner, abs=0.01)
        assert by_halo[halo].mean == pytest.approx(255 * sum(lost) / 2, rel=0.1)


def test_curve_of_a_network(network, content):
    points, (output,) = seam_curve(network, content, network.scale, network.align)
    assert torch.equal(output, network(content[0]).clamp(0, 1))
    # Halos are steps of the window.
    halos = [p.halo for p in points]
    assert halos[0] == 0
    assert {b - a for a, b in zip(halos, halos[1:], strict=False)} == {max(2, network.align)}
    # The largest error only falls; the last one is the first that is negligible.
    largest = [p.max for p in points]
    assert largest[0] > 1
    assert largest == sorted(largest, reverse=True)
    assert all(0 <= p.mean <= p.p999 <= p.max <= 255 for p in points)
    assert [p.halo for p in points if p.max < NEGLIGIBLE] == halos[-1:]
    # The theoretical radius is enough.
    assert halos[-1] <= -(-network.radius // network.align) * network.align


def test_cuts_lie_on_the_window_grid(small_swinir, picture):
    """SwinIR refuses a size off its grid, but cannot detect an origin off it: the error would then never decay."""
    shapes = []

    class Spy(nn.Module):
        def forward(self, x):
            shapes.append(tuple(x.shape[2:]))
            return small_swinir(x)

    for size in ((96, 144), (40, 200), (24, 16)):
        seam_curve(Spy(), [picture(*size)[None]], 4, 8)
        whole, *tiles = shapes
        assert whole == size
        assert len(tiles) == 2
        for tile in tiles:
            cuts = [w - t for w, t in zip(whole, tile, strict=True)]
            assert all(cut % 8 == 0 and 0 < cut < w for cut, w in zip(cuts, whole, strict=True))
        shapes.clear()


def test_small_pictures_give_a_short_or_empty_curve(small_swinir, small_rrdb, picture):
    for network, size in [(small_swinir, (8, 8)), (small_swinir, (8, 40)), (small_rrdb, (3, 5))]:
        points, (output,) = seam_curve(network, [picture(*size)[None]], 4, network.align)
        assert output.shape[2:] == (4 * size[0], 4 * size[1])
        assert points == () or points[-1].halo < min(size)


def test_every_picture_counts(small_rrdb, picture):
    flat = torch.full((1, 3, 96, 96), 0.5)
    busy = picture(96, 96)[None]
    both = curve_of(small_rrdb, [flat, busy])
    alone = {p.halo: p.max for p in curve_of(small_rrdb, [busy])}
    assert all(p.max >= alone.get(p.halo, 0.0) for p in both)


def test_a_tile_has_the_measured_error(network, content):
    """A tile with the same cut as the measurement has the same error."""
    picture = content[0]
    points = {p.halo: p for p in curve_of(network, content)}
    align, scale = network.align, network.scale
    halo = 8
    cy, cx = (max(align, int(n * 0.35) // align * align) for n in picture.shape[2:])
    cut = stage_of(*picture.shape[2:], 8, halo, align, scale)
    read = Box(cy, cx, *picture.shape[2:])
    core = Box(cy + halo, cx + halo, *picture.shape[2:]).scale(scale)
    assert all(v % align == 0 for v in (read.y0, read.x0))
    assert cut.padded == tuple(picture.shape[2:])
    tile = network(picture[:, :, cy:, cx:]).clamp(0, 1)[0]
    whole = network(picture).clamp(0, 1)[0]
    rows, columns = core.slices
    inner = core.relative_to(read.scale(scale)).slices
    error = (tile[:, inner[0], inner[1]] - whole[:, rows, columns]).abs().max() * 255
    assert float(error) <= points[halo].max + 1e-3


def test_networks_that_look_at_the_whole_picture_show_it(picture):
    image, blur = picture(32, 48)[None], nn.AvgPool2d(5, stride=1, padding=2)
    assert far_effect(blur, image, 1, 1) == (0, 12)
    effect, _ = far_effect(lambda x: x - x.mean(dim=(2, 3), keepdim=True), image, 1, 1)
    negative = torch.cat([image[..., :24], 1 - image[..., 24:]], 3)
    expected = (negative.mean(dim=(2, 3)) - image.mean(dim=(2, 3))).abs().max() * 255
    assert effect == pytest.approx(float(expected), rel=1e-3)
