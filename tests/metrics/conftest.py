"""Networks with random weights: the computation is tested, which is the same with trained ones."""

import pytest
import torch

from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures, Lpips
from engine.metrics.sifid import Inception

CHANNELS = (64, 192, 384, 256, 256)


def _varied(network):
    """Draw the statistics and biases of BatchNorm, so that ignoring them changes the output."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, 0.0), (module.running_var, 0.01)):
                tensor.data.uniform_(low, low + 1, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def inception_network():
    """float64; shared, so tests must not change it."""
    torch.manual_seed(1)
    return _varied(InceptionPrefix()).double()


@pytest.fixture(scope="session")
def inception(inception_network):
    return Inception(inception_network)


@pytest.fixture(scope="session")
def alex_network():
    """float64; shared, so tests must not change it."""
    torch.manual_seed(2)
    return AlexFeatures().eval().requires_grad_(False).double()


@pytest.fixture(scope="session")
def heads():
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(c, generator=generator, dtype=torch.float64) for c in CHANNELS]


@pytest.fixture(scope="session")
def lpips(alex_network, heads):
    return Lpips(alex_network, heads)
