"""SwinIR packed for kernels: equal to the network up to rounding, whole and in bands; its traffic and its launches."""

import copy

import pytest
import torch
from support.kernels import needs_triton
from support.networks import lively
from support.streams import pour, stream, whole

from engine.archs import to_mixed
from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.archs.swinir_packed import pack, padded
from engine.device.choose import PRECISIONS
from engine.kernels.launch import use_kernel
from engine.plan.gpus import GPUS
from engine.probe.count import counting
from engine.run.stage import Stage

SMALL = {"dim": 20, "depths": (2, 1), "heads": (2, 4), "hidden": 36, "features": 6}
BYTES = 6000
"""Most bytes of a pixel that a layer of SwinIR-M may move: one read and one write of the stream for each of two kernels."""


def test_padded_numbers_are_two_blocks():
    assert [padded(n) for n in (1, 16, 17, 33, 49, 60, 90, 180, 240, 360)] == [
        16,
        16,
        32,
        48,
        64,
        64,
        96,
        192,
        256,
        384,
    ]


HEADS = [
    {"head": "pixelshuffle", "scale": 3, "convs": 3},
    {"head": "pixelshuffledirect", "fold": 2, "window": 4},
    {"head": "none", "scale": 1, "image_channels": 1},
]


@pytest.mark.parametrize("options", [{}, {"noise_channels": 2}, {"scale": 2}, {"window": 4}, *HEADS], ids=str)
def test_packed_network_is_equal(options):
    network = lively(SwinIR(**SMALL, **options), 0.2).double()
    packed = pack(copy.deepcopy(network), torch.float64)
    assert packed.conv_first.out_channels == 32
    image = torch.rand(2, 3 + options.get("noise_channels", 0), 16, 24).double()
    torch.testing.assert_close(packed(image), network(image), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@needs_triton
def test_kernels_are_as_exact_as_mixed_precision(monkeypatch, dtype):
    network = lively(SwinIR(**SMALL), 0.1)
    image = torch.rand(1, 3, 16, 24)
    exact = network(image)
    mixed = copy.deepcopy(network).to_mixed(dtype)(image)
    packed = to_mixed(copy.deepcopy(network), dtype, kernels=True)
    for module in ("layer_norm", "norm_linear", "mlp", "window_attention"):
        # The interpreter in place of a GPU, where the operation would take its kernel.
        take = lambda device, forced: use_kernel(device, True if forced is None else forced)  # noqa: E731
        monkeypatch.setattr(f"engine.kernels.{module}.use_kernel", take)
    with torch.inference_mode():
        error = (packed(image) - exact).abs().mean()
    # The interpreter cuts bfloat16 off where a GPU rounds.
    assert 0 < error < (3 if dtype == torch.bfloat16 else 1.2) * (mixed - exact).abs().mean()


def test_bands_equal_the_whole_image():
    network = pack(lively(SwinIR(**SMALL, window=4), 0.2), torch.float32)
    image = torch.rand(3, 52, 20)
    rows = stream(network, 8, 20, 4)
    expected = whole(network, image)
    low, high = expected.aminmax()
    assert (pour(rows, image) - expected).abs().max() <= 2e-6 * (high - low)


def test_only_stages_with_kernels_in_half_precision_are_packed(monkeypatch):
    plain = Stage(lively(SwinIR(**SMALL)), torch.device("cpu"), "bf16")
    assert plain.network.conv_first.out_channels == 20
    monkeypatch.setattr("engine.run.stage.use_kernel", lambda *_: True)
    for precision in PRECISIONS:
        stage = Stage(lively(SwinIR(**SMALL)), torch.device("cpu"), precision)
        assert stage.network.conv_first.out_channels == (20 if precision == "fp32" else 32)
        assert stage.run(torch.rand(1, 3, 16, 16)).isfinite().all()
    assert Stage(RRDBNet(8, 1, 4), torch.device("cpu"), "bf16").network.conv_first.out_channels == 8


def operations_of(call, *, kernels=True):
    """Launches of SwinIR-M on a GPU with the kernels or without."""
    with torch.device("meta"):
        network = SwinIR().eval().requires_grad_(False)
    network = to_mixed(network.to("meta"), torch.float16, kernels=kernels)  # with the buffers that are on the host
    with counting(None if kernels else GPUS["t4"]) as counter:
        call(network)
    return counter.operations


def test_bytes_and_launches():
    """A layer of SwinIR-M is three launches, in torch alone many more: the mask does not add some for every window row."""

    def layers(network):
        network.layers[0].residual_group["blocks"](
            torch.empty(1, 256, 256, network.conv_first.out_channels, device="meta")
        )

    def trunk(network):
        network.trunk(torch.empty(1, 3, 256, 256, device="meta"))

    packed = operations_of(layers)
    assert len(packed) == 6 * 3
    assert sum(o.bytes for o in packed) / 256**2 / 6 <= BYTES
    assert len(operations_of(trunk)) <= 135 + 9  # with the biases of nine convolutions
    assert len(operations_of(layers, kernels=False)) <= 6 * 31
