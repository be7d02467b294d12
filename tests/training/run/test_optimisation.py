"""Steps of optimisation and EMA against plain arithmetic."""

import math

import torch

from engine.training.run.ema import Ema
from engine.training.run.optimisation import Optimisation, make_scaler


def make(weights, **options):
    scaler = make_scaler(torch.device("cpu"), "fp32")
    return Optimisation([(weights, 0.1)], (0.9, 0.999), scaler, **options)


def test_sum_of_losses_equals_one_loss():
    once, split = (torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    assert make([once]).descend([once.square().sum() + once.sum()])
    assert make([split]).descend(loss for loss in (split.square().sum(), split.sum()))
    assert torch.equal(once, split)


def test_nonfinite_loss_changes_nothing():
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    assert not make([weight]).descend([weight.sum(), weight.sum() * math.inf])
    assert weight.tolist() == [1.0, -2.0]


def test_gradients_of_the_compute_copy_move_the_master_weights():
    master, alone = (torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    computing = master.detach().bfloat16().requires_grad_()
    make([master], compute_copy=[computing]).descend([(3 * computing).sum()])
    make([alone]).descend([(3 * alone).sum()])
    assert torch.equal(master, alone)
    assert computing.tolist() == [1.0, -2.0]


def test_clip():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    make([weight], clip=1.0).descend([weight.square().sum()])
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8]))


def test_set_rate():
    weight = torch.tensor([1.0], requires_grad=True)
    optimisation = make([weight])
    optimisation.set_rate(0.0)
    optimisation.descend([weight.sum()])
    assert weight.tolist() == [1.0]


def test_ema():
    weight = torch.tensor([1.0, 0.0], requires_grad=True)
    ema = Ema([weight])
    with torch.no_grad():
        weight += 1
    assert ema.values[0].tolist() == [1.0, 0.0]
    ema.update(0.25)
    assert ema.values[0].tolist() == [1.25, 0.25]
    ema.copy_to_weights()
    assert weight.tolist() == [1.25, 0.25]
    ema.load([torch.tensor([5.0, 6.0])])
    assert ema.values[0].tolist() == [5.0, 6.0]
