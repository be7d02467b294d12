"""PSNR and SSIM against closed forms and against their definitions."""

import math

import numpy as np
import pytest
import torch

from engine.errors import InputError
from engine.io.photo import TensorSource
from engine.metrics import images
from engine.metrics.fidelity import compare
from engine.metrics.psnr import psnr


def fidelity(a, b):
    return compare(TensorSource(a), TensorSource(b))


def test_equal_pictures(picture):
    image = picture(80, 70)
    result = fidelity(image, image)
    assert (result.mse_rgb, result.mse_y) == (0, 0)
    assert result.psnr_rgb == result.psnr_y == math.inf
    assert (result.ssim_rgb, result.ssim_y) == (pytest.approx(1), pytest.approx(1))
    assert result.to_json()["psnr_rgb"] is None


def test_shift_of_ten_levels():
    """MSE 100; Y spans 219 of the 255 levels."""
    a = torch.full((3, 30, 40), 0.4)
    result = fidelity(a + 10 / 255, a)
    assert result.psnr_rgb == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert result.psnr_y == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)), abs=1e-4)


def test_ssim_of_two_constants():
    """Without variance only the means count: (2ab + C1) / (a^2 + b^2 + C1)."""
    a, b, c = 0.4 * 255, 0.7 * 255, (0.01 * 255) ** 2
    result = fidelity(torch.full((3, 30, 40), 0.4), torch.full((3, 30, 40), 0.7))
    assert result.ssim_rgb == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-6)


def ssim_by_definition(a, b):
    """Mean SSIM of [H, W] in levels, window by window."""
    at = np.arange(11) - 5
    kernel = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (kernel * p).sum(), (kernel * q).sum()
            vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
            cov = (kernel * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def luma(picture):
    """Y of MATLAB's rgb2ycbcr."""
    r, g, b = picture.double().numpy()
    return 16 + 65.481 * r + 128.553 * g + 24.966 * b


def test_equals_definition_for_any_strips(monkeypatch, picture):
    a, b = picture(37, 33), picture(37, 33, seed=1)
    b = 0.7 * a + 0.3 * b
    levels = [(p.double().numpy() * 255, q.double().numpy() * 255) for p, q in zip(b, a, strict=True)]
    ssim_rgb = np.mean([ssim_by_definition(p, q) for p, q in levels])
    ssim_y = ssim_by_definition(luma(b), luma(a))
    for band in (3, 16, 64):
        monkeypatch.setattr(images.bands, "__defaults__", (band,))
        result = fidelity(b, a)
        assert result.ssim_rgb == pytest.approx(ssim_rgb, abs=1e-9)
        assert result.ssim_y == pytest.approx(ssim_y, abs=1e-9)
        assert result.mse_y == pytest.approx(((luma(b) - luma(a)) ** 2).mean())
        assert result.mse_rgb == pytest.approx(float((255 * (b - a).double()).square().mean()))
    assert 0.3 < ssim_y < 0.95


def test_psnr():
    """The one PSNR: element by element, with a floor for equal images."""
    mse = torch.tensor([1.0, 0.01, 0.0])
    torch.testing.assert_close(psnr(mse), torch.tensor([0.0, 20.0, math.inf]))
    torch.testing.assert_close(psnr(mse, floor=1e-10), torch.tensor([0.0, 20.0, 100.0]))
    assert float(psnr(torch.tensor(255.0**2), peak=255)) == 0


def test_other_sizes_are_refused(picture):
    with pytest.raises(InputError, match="picture: 30x20, but the reference is 31x20"):
        fidelity(picture(20, 30), picture(20, 31))
    with pytest.raises(InputError, match="30x10 is smaller than SSIM's window of 11"):
        fidelity(picture(10, 30), picture(10, 30))
