"""What losses see of pictures: moved around, enlarged where they are too small, in the maps that were asked for."""

import pytest
import torch

from engine.training.losses.features import Frame, Look, draw_shift, maps_of
from engine.training.losses.vgg import VGGFeatures


@pytest.fixture(scope="module")
def vgg(vgg_file):
    return VGGFeatures(vgg_file, ("relu1_2", "relu3_3"))


def test_without_vgg_there_are_no_maps():
    assert maps_of(torch.rand(1, 3, 8, 8), None, (3, 4), "bf16") == {}


def test_maps_are_of_the_moved_picture(vgg):
    x = torch.rand(2, 3, 24, 32)
    found, expected = maps_of(x, vgg, (5, 7), "fp32"), vgg(x.roll((5, 7), (2, 3)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("size", "zoom"), [((16, 40), 1), ((15, 40), 2), ((5, 40), 4), ((1, 20), 16)])
def test_small_pictures_are_enlarged(vgg, size, zoom):
    x = torch.rand(1, 3, *size)
    found = maps_of(x, vgg, (0, 0), "fp32")["relu1_2"]
    assert found.shape[2:] == (zoom * size[0], zoom * size[1])
    assert torch.equal(found, vgg(x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3))["relu1_2"])


def test_half_precision_is_used(vgg):
    assert maps_of(torch.rand(1, 3, 16, 16), vgg, (0, 0), "bf16")["relu3_3"].dtype == torch.bfloat16


def test_every_shift_is_drawn():
    generator = torch.Generator().manual_seed(0)
    assert {draw_shift((2, 3), generator) for _ in range(200)} == {(y, x) for y in range(2) for x in range(3)}


@pytest.mark.parametrize("size", [(30, 100), (5, 32), (1, 2)])
def test_a_frame_is_the_picture_mirrored(size):
    generator, x = torch.Generator().manual_seed(0), torch.rand(1, 3, *size)
    frames = [Frame.draw(size, generator) for _ in range(100)]
    assert len({(one.top, one.left) for one in frames}) > 1 or min(size) < 3
    for frame in frames:
        framed = frame.around(x)
        assert framed.shape[2:] == tuple(length + min(24, length - 1) for length in size)
        down, right = slice(frame.top, frame.top + size[0]), slice(frame.left, frame.left + size[1])
        assert torch.equal(framed[:, :, down, right], x)
        if size[0] > 24:
            assert 8 <= frame.top <= 16
            assert torch.equal(framed[0, :, frame.top - 3, right], x[0, :, 3])
            assert torch.equal(framed[0, :, frame.top + size[0], right], x[0, :, -2])


def test_heights_follow_the_picture_into_its_frame():
    heights = Frame(3, 2, 9, 9).heights(11)
    assert heights.tolist() == pytest.approx([-0.4, -0.6, -0.8, *(k / 5 - 1 for k in range(11)), 0.8, 0.6], abs=1e-6)


def test_a_detached_look_has_no_gradient(vgg):
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    look = Look(x, maps_of(x, vgg, (0, 0), "fp32"))
    assert all(maps.requires_grad for maps in look.maps.values())
    assert not look.detach().picture.requires_grad
    assert not any(maps.requires_grad for maps in look.detach().maps.values())
    assert look.rows(1).keys() == look.maps.keys()
