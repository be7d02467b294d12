"""Community networks against spandrel: the same scale and output, and in bands the whole image's."""

from functools import partial

import pytest
import torch
from support.community import compact, esrgan, output_of, span, state_of, swinir
from support.streams import pour, stream, whole

from engine.archs import ARCHITECTURES, build

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # in spandrel's SwinIR

SOME = {
    "esrgan x1, plain": partial(esrgan, 0),
    "esrgan x2, plus": partial(esrgan, 1, plus=True),
    "esrgan x2, folded": partial(esrgan, fold=2),
    "esrgan x4, alpha": partial(esrgan, channels=4),
    "esrgan x8, grey": partial(esrgan, 3, channels=1),
    "compact x2": partial(compact, 2, convs=3),
    "compact x1, grey": partial(compact, 1, 1),
    "span x4": span,
    "span x2, grey": partial(span, 2, 1, norm=False),
    "swinir x4, nearest": partial(swinir, resi_connection="3conv"),
    "swinir x3, shuffle": partial(swinir, "pixelshuffle", 3),
    "swinir x2, direct": partial(swinir, "pixelshuffledirect", 2),
    "swinir x1, JPEG, grey": partial(swinir, "", 1, 1, window=7),
}

HEADS = {"nearest+conv": (2, 4, 8), "pixelshuffle": (2, 3, 4, 8), "pixelshuffledirect": (2, 3, 4), "": (1,)}

MORE = {
    **{
        f"esrgan {n} upsamplings, fold {fold}, {channels} channels, plus {plus}": partial(
            esrgan, n, fold, channels, plus=plus
        )
        for n in range(5)
        for fold in (1, 2, 4)
        for channels in (1, 3)
        for plus in (False, True)
        if fold <= 2**n
    },
    **{
        f"compact x{n}, {channels} channels": partial(compact, n, channels)
        for n in (1, 2, 3, 4, 8)
        for channels in (1, 3, 4)
    },
    **{f"span x{n}": partial(span, n) for n in (1, 2, 3, 8)},
    **{f"span x{n}, alpha": partial(span, n, 4, norm=False) for n in (1, 4)},
    **{
        f"swinir x{n}, {head}, {convs}, window {window}": partial(swinir, head, n, window=window, resi_connection=convs)
        for head, scales in HEADS.items()
        for n in scales
        for convs in ("1conv", "3conv")
        for window in (4, 7)
    },
    **{f"swinir folded to x{n // 2}": partial(swinir, scale=n, start_unshuffle=2) for n in (2, 4, 8)},
}


def check(make, picture):
    state = state_of(make())
    network = build(state)
    assert [a.detect(state) for a in ARCHITECTURES].count(True) == 1
    side = 24 // network.align * network.align
    image = picture(side, side)
    expected, scale = output_of(state, image)
    assert network.scale == scale
    low, high = expected.aminmax()
    tolerance = 1e-5 * max(1.0, float(high - low))
    result = whole(network, image)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
    banded = pour(stream(network, network.align, side, block=10), image)
    torch.testing.assert_close(banded, result, rtol=0, atol=tolerance / 5)


@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
def test_equals_spandrel(make, picture):
    check(make, picture)


@pytest.mark.slow
@pytest.mark.parametrize("make", MORE.values(), ids=MORE)
def test_more_forms_equal_spandrel(make, picture):
    check(make, picture)
