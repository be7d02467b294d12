"""Super-resolution architectures: which one a checkpoint's tensors are, and the network that they fill.

Knows one ordered table and what can be wrong with a set of named tensors; knows nothing of files (that is
engine/checkpoints.py). Hyper-parameters are read from tensor shapes. To add an architecture, write one file like
esrgan.py and one line of `ARCHITECTURES`; a network that generates structure (hpvaegan.py) has no place here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.archs import esrgan, swinir
from engine.errors import ModelError

State: TypeAlias = Mapping[str, Tensor]
# Every network has `scale`, `align` (the grid of tile origins), `radius` (its receptive field), `noise_channels`,
# `to_mixed(dtype)`, and `trunk` and `tail` (layers.TAIL_REACH).
Upscaler: TypeAlias = esrgan.RRDBNet | swinir.SwinIR


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to recognise an architecture, name its tensors and size its network."""

    name: str
    detect: Callable[[State], bool]
    canonical: Callable[[State], dict[str, Tensor]]
    from_shapes: Callable[[State], Upscaler]


# The first that recognises the tensors wins.
ARCHITECTURES = (
    Architecture(esrgan.NAME, esrgan.detect, esrgan.canonical, esrgan.RRDBNet.from_shapes),
    Architecture(swinir.NAME, swinir.detect, swinir.canonical, swinir.SwinIR.from_shapes),
)


def identify(state: State, source: str = "checkpoint") -> Architecture:
    """The architecture of these tensors; `source` is what an error calls them."""
    for architecture in ARCHITECTURES:
        if architecture.detect(state):
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ModelError(f"{source}: unknown architecture with {_some(list(state))}; known are {known}")


def build(state: State, source: str = "checkpoint") -> Upscaler:
    """The network in fp32, frozen and in evaluation mode. It takes the tensors over: fp32 ones are not copied."""
    architecture = identify(state, source)
    state = architecture.canonical(state)
    label = f"{source} ({architecture.name})"
    network = _sized(architecture, state, label)
    _check_names_and_shapes(network.state_dict(), state, label)
    _check_values(state, label)
    network.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _sized(architecture: Architecture, state: State, label: str) -> Upscaler:
    """The network on the meta device: shapes without values."""
    try:
        with torch.device("meta"):
            return architecture.from_shapes(state)
    except KeyError as error:
        raise ModelError(f"{label}: the tensor {error.args[0]}, which tells the network's size, is missing") from error
    except (ValueError, IndexError) as error:
        raise ModelError(f"{label}: a tensor that tells the network's size is misshapen ({error})") from error
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error


def _check_names_and_shapes(expected: State, state: State, label: str) -> None:
    if missing := [name for name in expected if name not in state]:
        raise ModelError(f"{label}: {_some(missing)} missing of {len(expected)}; the file is incomplete")
    wrong = [name for name in expected if state[name].shape != expected[name].shape]
    if wrong:
        found, wanted = list(state[wrong[0]].shape), list(expected[wrong[0]].shape)
        raise ModelError(f"{label}: {_some(wrong)} misshapen; {wrong[0]} is {found}, expected {wanted}")
    if extra := [name for name in state if name not in expected]:
        raise ModelError(f"{label}: {_some(extra)} unexpected; this is a variant that the engine does not know")


def _check_values(state: State, label: str) -> None:
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{label}: {name} is stored as {tensor.dtype}; only floating-point weights can be used")
        if bad := int((~torch.isfinite(tensor.float())).sum()):
            raise ModelError(f"{label}: {name} holds {bad} NaN or infinite values of {tensor.numel()}")


def _some(names: Sequence[str], most: int = 3) -> str:
    """How many, and the first of them by name."""
    rest = ", ..." if len(names) > most else ""
    first = ", ".join(names[:most]) + rest
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}" + (f" ({first})" if names else "")
