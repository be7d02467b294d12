"""Feature maps of rolled, padded and enlarged images."""

import pytest
import torch

from engine.training.losses.features import ImageFeatures, ReflectPad, draw_roll, maps_of
from engine.training.losses.vgg import VGGFeatures


@pytest.fixture(scope="module")
def vgg(vgg_file):
    return VGGFeatures(vgg_file, ("relu1_2", "relu3_3"))


def test_no_maps_without_vgg():
    assert maps_of(torch.rand(1, 3, 8, 8), None, (3, 4), "bf16") == {}


def test_maps_of_a_rolled_image(vgg):
    x = torch.rand(2, 3, 24, 32)
    maps, expected = maps_of(x, vgg, (5, 7), "fp32"), vgg(x.roll((5, 7), (2, 3)))
    assert maps.keys() == expected.keys()
    assert all(torch.equal(maps[name], expected[name]) for name in maps)
    assert maps_of(x, vgg, (0, 0), "bf16")["relu3_3"].dtype == torch.bfloat16


def test_small_images_are_enlarged(vgg):
    for size, zoom in (((16, 40), 1), ((15, 40), 2), ((5, 40), 4), ((1, 20), 16)):
        x = torch.rand(1, 3, *size)
        maps = maps_of(x, vgg, (0, 0), "fp32")["relu1_2"]
        assert maps.shape[2:] == (zoom * size[0], zoom * size[1])
        assert torch.equal(maps, vgg(x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3))["relu1_2"])


def test_every_roll_is_drawn():
    generator = torch.Generator().manual_seed(0)
    assert {draw_roll((2, 3), generator) for _ in range(200)} == {(y, x) for y in range(2) for x in range(3)}


def test_reflect_pad():
    generator = torch.Generator().manual_seed(0)
    for size in ((30, 100), (5, 32), (1, 2)):
        x = torch.rand(1, 3, *size)
        pads = [ReflectPad.draw(size, generator) for _ in range(100)]
        assert len({(pad.top, pad.left) for pad in pads}) > 1 or min(size) < 3
        for pad in pads:
            padded = pad(x)
            assert padded.shape[2:] == tuple(length + min(24, length - 1) for length in size)
            rows, columns = slice(pad.top, pad.top + size[0]), slice(pad.left, pad.left + size[1])
            assert torch.equal(padded[:, :, rows, columns], x)
            if size[0] > 24:
                assert 8 <= pad.top <= 16
                assert torch.equal(padded[0, :, pad.top - 3, columns], x[0, :, 3])
                assert torch.equal(padded[0, :, pad.top + size[0], columns], x[0, :, -2])


def test_heights_of_a_padded_image():
    heights = ReflectPad(3, 2, 9, 9).heights(11)
    assert heights.tolist() == pytest.approx([-0.4, -0.6, -0.8, *(k / 5 - 1 for k in range(11)), 0.8, 0.6], abs=1e-6)


def test_detached_features_have_no_gradient(vgg):
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    features = ImageFeatures(x, maps_of(x, vgg, (0, 0), "fp32"))
    assert all(maps.requires_grad for maps in features.maps.values())
    assert not features.detach().image.requires_grad
    assert not any(maps.requires_grad for maps in features.detach().maps.values())
    assert features.rows(1).keys() == features.maps.keys()
