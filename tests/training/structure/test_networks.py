"""Encoder and discriminator of step 1: published sizes, and an input gradient equal to autograd's."""

import pytest
import torch

from engine.archs.hpvaegan import Config
from engine.training.structure.networks import Discriminator, Encoder


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("coordinates", "encoder", "discriminator"), [(False, 223_360, 187_009), (True, 227_392, 190_474)]
)
def test_parameter_counts(coordinates, encoder, discriminator):
    config = Config(coordinates=coordinates)
    assert count(Encoder(config)) == encoder
    assert count(Discriminator(config)) == discriminator


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
def test_input_gradient_is_autograds(padding, coordinates):
    """The gradient w.r.t. the input, and the gradient penalty's gradient w.r.t. every weight."""
    config = Config(channels=6, layers=2, padding=padding, coordinates=coordinates)
    critic = Discriminator(config).double().eval()  # in evaluation, reading a weight does not change it
    x = torch.randn(2, 3, 9, 7).double().requires_grad_()
    (expected,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    gradient = critic.input_gradient(x.detach())
    torch.testing.assert_close(gradient, expected)
    for name, weight in critic.named_parameters():
        if not name.endswith("bias"):
            ours, theirs = (
                torch.autograd.grad(((g.norm(dim=1) - 1) ** 2).mean(), weight, retain_graph=True)[0]
                for g in (gradient, expected)
            )
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs)


def test_input_gradient_reads_each_weight_once():
    """Under spectral normalisation every read continues the power iteration, as one forward pass does."""
    config = Config(channels=6, layers=2)
    differentiated, evaluated = Discriminator(config), Discriminator(config)
    evaluated.load_state_dict(differentiated.state_dict())
    x = torch.randn(1, 3, 8, 8)
    differentiated.input_gradient(x)
    evaluated(x)
    for ours, theirs in zip(differentiated.buffers(), evaluated.buffers(), strict=True):
        assert torch.equal(ours, theirs)
