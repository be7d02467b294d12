"""Super-resolution architectures: which one a checkpoint's tensors belong to, and the network that they fill.

Holds one ordered table and the checks of a set of named tensors; knows nothing of files (see ``engine.model.checkpoints``).
Hyper-parameters are read from tensor shapes. To add an architecture, write one file like esrgan.py and one line of
``ARCHITECTURES``. Networks that are only recognised are in community.py. Step 1's generator (hpvaegan.py) has no place
in either table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.archs import compact, esrgan, foreign, span, swinir, swinir_packed
from engine.archs.community import SPANDREL, Signature, recognise
from engine.archs.last_conv import PackedLastConv
from engine.archs.layers import RGB, Upscaler
from engine.errors import ModelError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Trainable",
    "Upscaler",
    "build",
    "canonical",
    "identify",
    "refusal",
    "to_mixed",
]

State: TypeAlias = Mapping[str, Tensor]

Trainable: TypeAlias = esrgan.RRDBNet | swinir.SwinIR
"""A network that ``engine train`` starts from: an upscaler with the ``blocks`` of its trunk."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One line of the table."""

    name: str
    """Name in manifests."""

    form: str
    """The form of the network that this package builds, as the community calls it."""

    detect: Callable[[State], bool]
    """Whether these tensors belong to it."""

    canonical: Callable[[State], dict[str, Tensor]]
    """Tensors under the names of this package, without tensors that carry no information; itself unchanged by itself."""

    from_shapes: Callable[[State], Upscaler]
    """A network of the size of these tensors, not yet filled with them."""


ARCHITECTURES = (
    Architecture(esrgan.NAME, esrgan.FORM, esrgan.detect, esrgan.canonical, esrgan.RRDBNet.from_shapes),
    Architecture(swinir.NAME, swinir.FORM, swinir.detect, swinir.canonical, swinir.SwinIR.from_shapes),
    Architecture(compact.NAME, compact.FORM, compact.detect, compact.canonical, compact.Compact.from_shapes),
    Architecture(span.NAME, span.FORM, span.detect, span.canonical, span.SPAN.from_shapes),
)
"""The first that detects the tensors is taken."""

FORMS = ", ".join(architecture.form for architecture in ARCHITECTURES[:-1]) + f" and {ARCHITECTURES[-1].form}"
"""The networks that this package builds, for messages."""

EXTRA_MODELS = "install ourgan-engine[models], which runs it by spandrel"
"""Advice about networks that spandrel builds."""


def to_mixed(network: Upscaler, dtype: torch.dtype, *, kernels: bool) -> Upscaler:
    """Cast in place to mixed precision for inference.

    With ``kernels``, in the form that the Triton kernels of a GPU read fastest.
    """
    if kernels and isinstance(network, swinir.SwinIR):
        parts: Any = swinir_packed.pack(network, dtype)
    else:
        parts = network.to_inference(dtype) if isinstance(network, esrgan.RRDBNet) else network.to_mixed(dtype)
    last = getattr(parts, "conv_last", None)
    if kernels and last is not None and last.out_channels == RGB:
        parts.conv_last = PackedLastConv(last, dtype)
    return network


def identify(state: State, source: str = "checkpoint") -> Architecture:
    """The architecture of these tensors.

    Raises:
        ModelError: tensors of another network, which the message names if it is known; ``source`` names the tensors.
    """
    if (other := recognise(state)) is not None:
        if other.is_in_spandrel and foreign.is_installed():
            return _by_spandrel(other)
        advice = EXTRA_MODELS if other.is_in_spandrel else other.advice
        raise ModelError(f"{source}: {refusal(other.name, advice)}")
    for architecture in ARCHITECTURES:
        if architecture.detect(state):
            return architecture
    unknown = f"unknown architecture with {_summary(list(state))}"
    raise ModelError(f"{source}: {refusal(unknown, 'name a checkpoint of one of these')}")


def refusal(name: str, advice: str = SPANDREL) -> str:
    """Message about a network that this package does not build, without its subject.

    Args:
        name: the network as the community calls it.
        advice: what to do with its file.
    """
    return f"{name} is not supported ({FORMS} are); {advice}"


def build(state: State, source: str = "checkpoint") -> Upscaler:
    """The network of these tensors in float32, frozen and in evaluation mode. float32 tensors are shared, not copied.

    Raises ModelError, in which ``source`` names the tensors, for an unknown architecture and for tensors that are missing,
    unexpected, misshapen, not floating-point or not finite.
    """
    architecture = identify(state, source)
    state = canonical(architecture, state, source)
    label = f"{source} ({architecture.name})"
    if empty := [name for name, tensor in state.items() if not tensor.numel()]:
        raise ModelError(f"{label}: {_summary(empty)} without values; the file is damaged, fetch it again")
    network = _from_shapes(architecture, state, label)
    if isinstance(network, foreign.Foreign):
        return network
    _check_names_and_shapes(network.state_dict(), state, label)
    _check_values(state, label)
    network.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    return network.eval().requires_grad_(False)


def canonical(architecture: Architecture, state: State, source: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of an architecture under its names. Raises ModelError if they are incomplete or misshapen."""
    with _naming_tensors(f"{source} ({architecture.name})"):
        return architecture.canonical(state)


def _from_shapes(architecture: Architecture, state: State, label: str) -> Upscaler:
    """The network on the meta device: shapes without values; one by spandrel is whole."""
    with _naming_tensors(label):
        if architecture.name.startswith(foreign.PREFIX):
            return architecture.from_shapes(state)
        with torch.device("meta"):
            return architecture.from_shapes(state)


def _by_spandrel(line: Signature) -> Architecture:
    """The architecture of a network that spandrel builds."""
    return Architecture(
        name=f"{foreign.PREFIX}{line.name}",
        form=line.name,
        detect=lambda state: recognise(state) is line,
        canonical=dict,
        from_shapes=lambda state: foreign.build(state, line.name, line.grid),
    )


@contextmanager
def _naming_tensors(label: str) -> Iterator[None]:
    """Turn the errors of code that reads shapes into a ModelError about ``label``."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{label}: the tensor {error.args[0]}, which tells the network's size, is missing") from error
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"{label}: a tensor that tells the network's size is misshapen ({error})") from error
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error


def _check_names_and_shapes(expected: State, state: State, label: str) -> None:
    if missing := [name for name in expected if name not in state]:
        raise ModelError(f"{label}: {_summary(missing)} missing of {len(expected)}; the file is incomplete")
    wrong = [name for name in expected if state[name].shape != expected[name].shape]
    if wrong:
        shape, right = list(state[wrong[0]].shape), list(expected[wrong[0]].shape)
        raise ModelError(f"{label}: {_summary(wrong)} misshapen; {wrong[0]} is {shape}, expected {right}")
    if extra := [name for name in state if name not in expected]:
        raise ModelError(f"{label}: {_summary(extra)} unexpected; this variant of the architecture is not supported")


def _check_values(state: State, label: str) -> None:
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{label}: {name} is stored as {tensor.dtype}; convert it to a floating-point dtype")
        if bad := int((~torch.isfinite(tensor.float())).sum()):
            raise ModelError(f"{label}: {name} holds {bad} NaN or infinite values of {tensor.numel()}; fetch it again")


def _summary(names: Sequence[str], most: int = 3) -> str:
    """Number of tensors, and the names of the first ``most``."""
    rest = ", ..." if len(names) > most else ""
    first = ", ".join(names[:most]) + rest
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}" + (f" ({first})" if names else "")
