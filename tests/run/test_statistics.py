"""Frozen statistics: found by the shapes of two runs, averaged over tiles, and replaced by constants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.geometry import Box
from engine.run.statistics import Core, Recorder, Statistics, averaged, find_sites

CPU = torch.device("cpu")
SHAPE = (48, 64)


def channel_attention(x):
    """[B, C, H, W]: queries, normalised over all pixels, by keys."""
    q = F.normalize(x.flatten(2), dim=-1)
    return ((q @ q.transpose(-2, -1)).softmax(-1) @ x.flatten(2)).view_as(x)


def windows(x):
    """Attention within windows of 8: products that grow with the picture."""
    b, c, h, w = x.shape
    y = x.view(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 64, c)
    y = (y @ y.transpose(1, 2)).softmax(-1) @ y
    return y.view(b, h // 8, w // 8, 8, 8, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


NORM = nn.GroupNorm(2, 6)

LAYERS = {
    "average": (lambda x: x * x.mean((2, 3), keepdim=True), ["aten::mean"]),
    "pooling": (lambda x: x * F.adaptive_avg_pool2d(x, 1), ["aten::mean"]),
    "last axis": (lambda x: x * x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None], ["aten::mean"]),
    "deviation": (lambda x: x / x.std((2, 3), keepdim=True), ["aten::std"]),
    "unpadded": (lambda x: x * F.avg_pool2d(x, 3, 1).mean((2, 3), keepdim=True), ["aten::mean"]),
    "group norm": (NORM, ["aten::native_group_norm"]),
    "channel attention": (channel_attention, ["aten::linalg_vector_norm", "aten::bmm"]),
    "windows": (windows, []),
}


class Network(nn.Module):
    """A layer between two convolutions."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.layer = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1), layer

    def forward(self, x):
        return self.last(self.layer(self.first(x)))


def record(network, sites, x, core, shape=SHAPE, constants=None):
    with torch.inference_mode(), Recorder(Statistics(sites, shape, constants or {}), core) as recorder:
        network(x)
    return recorder.moments


@pytest.mark.parametrize("name", LAYERS)
def test_tiles_record_what_the_whole_picture_has(name, picture):
    layer, operations = LAYERS[name]
    network, x = Network(layer), picture(*SHAPE)[None]
    sites = find_sites(network, 3, 8, CPU)
    assert [site.operation for site in sites.values()] == operations
    constants = {}
    for _ in range(len(sites)):  # each site is exact once those before it are
        records = []
        for left in (0, 32):  # tiles of 48 columns, whose halo of 16 is on the inner side
            start = 0 if left == 0 else 16
            core = Core(Box(0, left - start, 48, left - start + 32), (48, 48))
            records.append(record(network, sites, x[..., start : start + 48], core, constants=constants))
        constants = averaged(records)
    with torch.inference_mode():
        expected = network(x)
        statistics = Statistics(sites, SHAPE, constants)
        with statistics.frozen():
            assert (network(x) - expected).abs().max() < 1e-5
        with statistics.frozen():
            tile = network(x[..., 16:])[..., 16:]
        assert (tile - expected[..., 32:]).abs().max() < 1e-5
        if sites:
            assert (network(x[..., 16:])[..., 16:] - expected[..., 32:]).abs().max() > 1e-4


def test_statistics_are_kept_exactly_and_damage_is_found(tmp_path, picture):
    network = Network(NORM)
    sites = find_sites(network, 3, 1, CPU)
    whole = Core(Box(0, 0, *SHAPE), SHAPE)
    statistics = Statistics(sites, SHAPE, averaged([record(network, sites, picture(*SHAPE)[None], whole)]))
    path = tmp_path / "folder" / "statistics.safetensors"
    statistics.save(path)
    assert Statistics(sites, (0, 0), {}).load(path).digest == statistics.digest
    assert Statistics({}, (0, 0), {}).load(path) is None  # of another network
    path.write_bytes(path.read_bytes()[:-9])
    assert Statistics(sites, (0, 0), {}).load(path) is None
    assert Statistics(sites, (0, 0), {}).load(tmp_path / "none") is None
