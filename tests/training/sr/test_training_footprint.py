"""Memory of an iteration: the estimate matches the measured peak."""

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
from engine.training.sr.footprint import checkpoint_blocks, estimate, needs_checkpointing
from engine.training.sr.trainer import feature_layers

CPU = torch.device("cpu")
NETWORKS = {
    "rrdb": lambda: RRDBNet(channels=32, blocks=6, growth=16),
    "noise": lambda: RRDBNet(channels=32, blocks=6, growth=16, noise_channels=16),
    "swinir": lambda: SwinIR(dim=60, depths=(6, 6, 6), heads=(6, 6, 6), hidden=120),
}


def peak(name, checkpointing, batch, side):
    """Bytes of a forward and a backward pass; the weights' gradients exist before."""
    fix_malloc_thresholds()
    network = NETWORKS[name]()
    if checkpointing:
        checkpoint_blocks(network)
    network(torch.rand(1, 3 + network.noise_channels, 8, 8)).sum().backward()
    x = torch.rand(batch, 3 + network.noise_channels, side, side)
    with PeakMemory(CPU) as memory:
        network(x).square().sum().backward()
    return memory.host - memory.start


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name", ["rrdb", pytest.param("noise", marks=pytest.mark.slow), pytest.param("swinir", marks=pytest.mark.slow)]
)
def test_estimate_matches_peak(recipe, name, checkpointing):
    """Measured in a fresh process: the heap of this one has holes, which change the peak by up to a quarter."""
    recipe = recipe.replace(batch=8, crop=128, adversarial=0.0)
    network, discriminator = NETWORKS[name](), build("patch", 128, 8)
    weights = sum(28 * p.numel() for p in network.parameters())
    estimated = estimate(network, discriminator, None, recipe, checkpointing=checkpointing) - weights
    with get_context("spawn").Pool(1) as pool:
        measured = pool.apply(peak, (name, checkpointing, 8, 32))
    assert 0.75 * measured < estimated < 2 * measured


@pytest.mark.slow
def test_feature_maps_are_counted(with_features, vgg_file):
    fix_malloc_thresholds()
    recipe = with_features.replace(batch=4, crop=128)
    network, discriminator = NETWORKS["rrdb"](), build("projected", 128, 32)
    vgg = VGGFeatures(vgg_file, feature_layers(recipe))
    estimated = estimate(network, discriminator, vgg, recipe, checkpointing=False) - estimate(
        network, discriminator, None, plain(recipe), checkpointing=False
    )

    def look(fake, real):
        discriminator(vgg(fake)).mean().backward()
        with torch.no_grad():
            maps = vgg(real)
        discriminator(maps).mean().backward()

    look(torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32))
    fake, real = torch.rand(4, 3, 128, 128, requires_grad=True), torch.rand(4, 3, 128, 128)
    with PeakMemory(CPU) as memory:
        look(fake, real)
    assert 0.75 * (memory.host - memory.start) < estimated < 2.5 * (memory.host - memory.start)


def plain(recipe):
    return recipe.replace(adversarial=0.0, feature_texture=0.0)


def test_estimate_changes_nothing(recipe):
    network, discriminator = NETWORKS["rrdb"](), build("vgg", 32, 8)
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    drawn = torch.get_rng_state()
    estimate(network, discriminator, None, recipe, checkpointing=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in discriminator.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in network.parameters())


def test_checkpointing_depends_on_budget(recipe):
    network, discriminator = NETWORKS["rrdb"](), build("patch", 32, 8)
    plain_bytes, checkpointed = (
        estimate(network, discriminator, None, recipe, checkpointing=value) for value in (False, True)
    )
    assert checkpointed < plain_bytes

    def decide(budget):
        return needs_checkpointing("step 2", network, discriminator, None, recipe, budget, CPU)

    assert not decide(plain_bytes)
    assert decide(plain_bytes - 1)
    assert decide(checkpointed)
    with pytest.raises(BudgetError, match="smaller batch than 4, smaller crops than 32") as error:
        decide(checkpointed - 1)
    assert "\n" not in str(error.value)


def test_checkpointing_keeps_gradients():
    for name, make in NETWORKS.items():
        network = make()
        x = torch.rand(1, 3 + network.noise_channels, 16, 16)
        network(x).square().sum().backward()
        gradients = [p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        checkpoint_blocks(network)
        network(x).square().sum().backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(gradients, network.parameters(), strict=True)), name
