"""The networks match torchvision's: tensor names, shapes, and numbers of parameters derived from its totals."""

import torch

from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures


def count(network):
    return sum(p.numel() for p in network.parameters())


def conv(inputs, outputs, kernel):
    """A convolution without bias and its BatchNorm."""
    return inputs * outputs * kernel + 2 * outputs


def test_parameters_of_the_inception_prefix():
    published = 27_161_264  # all of torchvision's inception_v3
    auxiliary = conv(768, 128, 1) + conv(128, 768, 25) + 768 * 1000 + 1000
    mixed_7a = conv(768, 192, 1) + conv(192, 320, 9)
    mixed_7a += conv(768, 192, 1) + 2 * conv(192, 192, 7) + conv(192, 192, 9)
    mixed_7 = sum(
        conv(inputs, 320, 1) + conv(inputs, 384, 1) + 2 * conv(384, 384, 3)  # 1x1 and 3x3
        + conv(inputs, 448, 1) + conv(448, 384, 9) + 2 * conv(384, 384, 3) + conv(inputs, 192, 1)
        for inputs in (1280, 2048)
    )  # fmt: skip
    classifier = 2048 * 1000 + 1000
    assert count(InceptionPrefix()) == published - auxiliary - mixed_7a - mixed_7 - classifier == 8_965_856


def test_parameters_of_alexnet():
    published = 61_100_840
    classifier = (256 * 36 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 1000
    assert count(AlexFeatures()) == published - classifier == 2_469_696


def test_tensor_names_match_torchvision():
    """One tensor of every kind of block, as in the published files."""
    state = InceptionPrefix().state_dict()
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.bn.bias": (96,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert all(
        module.eps == 0.001 for module in InceptionPrefix().modules() if isinstance(module, torch.nn.BatchNorm2d)
    )
    alex = {name: tuple(tensor.shape) for name, tensor in AlexFeatures().state_dict().items()}
    weights = {f"features.{i}.weight" for i in (0, 3, 6, 8, 10)}
    assert set(alex) == weights | {name.replace("weight", "bias") for name in weights}
    assert alex["features.0.weight"] == (64, 3, 11, 11)
    assert alex["features.10.weight"] == (256, 256, 3, 3)
