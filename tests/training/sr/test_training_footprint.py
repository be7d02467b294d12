"""What an iteration takes is counted, and what is counted is what it takes."""

from multiprocessing import get_context

import pytest
import torch

from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.device.heap import fix_malloc_thresholds
from engine.device.memory import PeakMemory
from engine.errors import BudgetError
from engine.training.losses.discriminators import build
from engine.training.losses.vgg import VGGFeatures
from engine.training.sr.footprint import checkpoint_blocks, estimate, fit
from engine.training.sr.losses import feature_layers

NETWORKS = {
    "rrdb": lambda: RRDBNet(channels=32, blocks=6, growth=16),
    "noise": lambda: RRDBNet(channels=32, blocks=6, growth=16, noise_channels=16),
    "swinir": lambda: SwinIR(dim=60, depths=(6, 6, 6), heads=(6, 6, 6), hidden=120),
}


def peak(name, twice, batch, side):
    """Bytes of a forward and a backward pass; the gradients of the weights are there before."""
    fix_malloc_thresholds()
    network = NETWORKS[name]()
    if twice:
        checkpoint_blocks(network)
    network(torch.rand(1, 3 + network.noise_channels, 8, 8)).sum().backward()
    x = torch.rand(batch, 3 + network.noise_channels, side, side)
    with PeakMemory(torch.device("cpu")) as memory:
        network(x).square().sum().backward()
    return memory.host - memory.start


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("twice", [False, True])
def test_the_count_is_what_is_taken(recipe, name, twice):
    """Measured in a process of its own, for in the holes that other tests leave in the heap it takes up to a quarter more."""
    recipe = recipe.replace(batch=8, crop=128, adversarial=0.0)
    network, judge = NETWORKS[name](), build("patch", 128, 8)
    weights = sum(28 * p.numel() for p in network.parameters())
    counted = estimate(network, judge, None, recipe, twice=twice) - weights
    with get_context("spawn").Pool(1) as alone:
        measured = alone.apply(peak, (name, twice, 8, 32))
    assert 0.75 * measured < counted < 2 * measured


def test_feature_maps_are_counted(with_features, vgg_file):
    fix_malloc_thresholds()
    recipe = with_features.replace(batch=4, crop=128)
    network, judge = NETWORKS["rrdb"](), build("projected", 128, 32)
    vgg = VGGFeatures(vgg_file, feature_layers(recipe))
    counted = estimate(network, judge, vgg, recipe, twice=False) - estimate(
        network, judge, None, plain(recipe), twice=False
    )

    def look(fake, real):
        judge(vgg(fake)).mean().backward()
        with torch.no_grad():
            maps = vgg(real)
        judge(maps).mean().backward()

    look(torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32))
    fake, real = torch.rand(4, 3, 128, 128, requires_grad=True), torch.rand(4, 3, 128, 128)
    with PeakMemory(torch.device("cpu")) as memory:
        look(fake, real)
    assert 0.75 * (memory.host - memory.start) < counted < 2.5 * (memory.host - memory.start)


def plain(recipe):
    return recipe.replace(adversarial=0.0, feature_texture=0.0)


def test_counting_leaves_no_trace(recipe):
    network, judge = NETWORKS["rrdb"](), build("vgg", 32, 8)
    before = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    drawn = torch.get_rng_state()
    estimate(network, judge, None, recipe, twice=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in judge.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in network.parameters())


def test_the_budget_decides(recipe):
    network, judge = NETWORKS["rrdb"](), build("patch", 32, 8)
    once, twice = (estimate(network, judge, None, recipe, twice=value) for value in (False, True))
    assert twice < once
    assert not fit(network, judge, None, recipe, once)
    assert fit(network, judge, None, recipe, once - 1)
    assert fit(network, judge, None, recipe, twice)
    with pytest.raises(BudgetError, match="smaller batch than 4 or smaller crops than 32") as error:
        fit(network, judge, None, recipe, twice - 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same(name):
    network = NETWORKS[name]()
    x = torch.rand(1, 3 + network.noise_channels, 16, 16)
    network(x).square().sum().backward()
    plain = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    checkpoint_blocks(network)
    network(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, network.parameters(), strict=True))
