"""Building a model from step 1 and super-resolution checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from engine.archs.layers import noise_channels_of, with_noise_gain
from engine.errors import UsageError, counted, option
from engine.model.bundle import STRUCTURE, Model, State, is_bundle, load, open_structure, read_network, state_digest
from engine.model.manifest import MAX_MARGIN, MAX_STAGES, Manifest, SRStage, StageOrigin
from engine.model.packaged import PACKAGED
from engine.model.structure_file import structure_metadata, structure_state

DEFAULT_MARGIN = 8
"""Pixels of step 1's image along each side that are cropped from the result.

Artefacts of networks at a border, padded with zeros or mirrored, reach more than 4 and less than 8 pixels into the image
(docs/decisions/0011).
"""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Checked arguments of ``build``.

    Raises:
        UsageError: no checkpoint, more values than steps, or a value is out of range.
    """

    structure: Path | None
    """File of step 1, or a model file whose step 1 is taken; None for a model without step 1."""
    sr: tuple[str, ...]
    """One super-resolution network per stage, as ``read_stage`` takes it."""
    sigma: tuple[float, ...] = ()
    """Input noise per stage, as a share of 1.0; later stages keep the value that they were trained with."""
    licence: str | None = None
    """Licence of checkpoints that are given as files."""
    margin: int | None = None
    """Margin in pixels of step 1; None for ``DEFAULT_MARGIN`` with step 1 and 0 without."""
    noise_gain: tuple[float, ...] = ()
    """Factor per stage on its noise channels (docs/decisions/0020); 1 for later stages."""

    def __post_init__(self) -> None:
        if not self.sr:
            raise UsageError(f"{option('sr')}: a model needs at least one checkpoint; give one, such as realsr")
        for name, values in (("sigma", self.sigma), ("noise_gain", self.noise_gain)):
            if len(values) > len(self.sr):
                raise UsageError(
                    f"{option(name)}: more values ({len(values)}) than steps ({len(self.sr)}); give one per step"
                )
        for sigma in self.sigma:
            if not (math.isfinite(sigma) and sigma >= 0):
                raise UsageError(
                    f"{option('sigma')} {sigma:g}: must be 0 or more, as a share of 1.0; leave it out for no input noise"
                )
        for gain in self.noise_gain:
            if not (math.isfinite(gain) and gain > 0):
                raise UsageError(
                    f"{option('noise_gain')} {gain:g}: must be above 0; give 1 to leave noise channels as trained"
                )
        if self.margin is not None and (self.structure is None or not 0 <= self.margin <= MAX_MARGIN):
            raise UsageError(
                f"{option('margin')} {self.margin}: must be 0 to {MAX_MARGIN} pixels of step 1, in a model that has a step 1"
            )

    @property
    def effective_margin(self) -> int:
        """The margin with its default filled in."""
        if self.margin is not None:
            return self.margin
        return DEFAULT_MARGIN if self.structure is not None else 0


def build(
    structure: Path | None,
    sr: Sequence[str],
    sigma: Sequence[float] = (),
    licence: str | None = None,
    margin: int | None = None,
    noise_gain: Sequence[float] = (),
) -> Model:
    """Put a model together; ``BuildRequest`` describes the arguments.

    Raises:
        ModelError: a file that is missing, damaged or of an unknown architecture.
        UsageError: no checkpoint, more values than steps, a value out of range, or a noise gain for a network without noise
            channels.
    """
    request = BuildRequest(structure, tuple(sr), tuple(sigma), licence, margin, tuple(noise_gain))
    states: dict[str, State] = {}
    metadata: dict[str, Any] | None = None
    if structure is not None:
        network = open_structure(structure)
        states[STRUCTURE], metadata = structure_state(network), structure_metadata(network)
    parts = [_requested_stage(request, index) for index in range(len(request.sr))]
    return _assembled(Path("model.safetensors"), states, metadata, parts, request.effective_margin)


def chain(models: Sequence[Path | str]) -> Model:
    """A model that runs the enlargements of several models one after the other; of one model, that model.

    Args:
        models: model files, checkpoints or names of packaged weights. Step 1 of a model file takes no part in a chain.

    Raises:
        ModelError: as ``load`` does.
        UsageError: no model, or more enlargements than a model holds.
    """
    if len(models) == 1:
        return load(models[0])
    parts = []
    for name in models:
        model = load(name)
        parts += [(model.state(index), stage.origin) for index, stage in enumerate(model.stages)]
    if not 1 <= len(parts) <= MAX_STAGES:
        raise UsageError(f"{option('model')}: {len(parts)} enlargements in a chain; use 1 to {MAX_STAGES}")
    return _assembled(Path("+".join(Path(name).stem for name in models)), {}, None, parts, 0)


def with_louder_noise(model: Model, gains: Sequence[float]) -> Model:
    """The model for a render whose noise channels are ``gains`` times as loud: the weights of ``build(noise_gain=...)``.

    Noise channels are what a network draws fine texture from. The noise that is added to a step's input image (``sigma``) and
    the noise of step 1 stay, and so does the scene of a seed. Profiles are dropped: other weights have other errors.

    Args:
        model: model of the render.
        gains: one factor for all steps that have noise channels, or one per step; 0 silences them.

    Returns:
        A model with a digest of its own, whose ``original`` is ``model``; ``model`` itself if all factors are 1.

    Raises:
        UsageError: another number of factors than steps, or a factor for a step without noise channels.
    """
    text = ",".join(f"{gain:g}" for gain in gains)
    if all(gain == 1 for gain in gains):
        return model
    has_noise = [noise_channels_of(model.state(index)) > 0 for index in range(len(model.stages))]
    if len(gains) == 1:
        if not any(has_noise):
            raise UsageError(f"{option('noise_gain', text)}: {model.path.name} has no noise channels; leave it out")
        gains = [gains[0] if has else 1.0 for has in has_noise]
    if len(gains) != len(has_noise):
        raise UsageError(
            f"{option('noise_gain', text)}: {len(gains)} factors for {counted(len(has_noise), 'step')}; give one, or one per step"
        )
    parts = []
    for index, (stage, gain, has) in enumerate(zip(model.stages, gains, has_noise, strict=True)):
        if gain != 1 and not has:
            raise UsageError(
                f"{option('noise_gain', text)}: the network of step {index + 2} has no noise channels; give 1 for it"
            )
        parts.append(_louder(model.state(index), stage.origin, gain))
    manifest = model.manifest
    step_1 = {STRUCTURE: model.tensors(STRUCTURE)} if manifest.structure is not None else {}
    louder = _assembled(model.path, step_1, manifest.structure, parts, manifest.margin)
    louder.original, louder.noise_gain = model, tuple(gains)
    return louder


def read_stage(name: str, index: int = 0, licence: str | None = None) -> tuple[State, StageOrigin]:
    """Tensors of a super-resolution network under our names, and its origin.

    Args:
        name: a packaged checkpoint, the path of a checkpoint file, or the path of a model file.
        index: stage of a model file, from 0; the last one if it has fewer.
        licence: licence of a file, whatever the file says.

    Raises:
        ModelError: no such weights, or a file that is damaged or of an unknown architecture.
    """
    if name in PACKAGED or not is_bundle(Path(name)):
        return read_network(name, licence)
    model = load(name)
    index = min(index, len(model.stages) - 1)
    origin = model.stages[index].origin
    return model.state(index), replace(origin, licence=licence or origin.licence)


def _assembled(
    path: Path,
    states: dict[str, State],
    structure: dict[str, Any] | None,
    parts: Iterable[tuple[State, StageOrigin]],
    margin: int,
) -> Model:
    """A model of these enlargements; equal networks are kept once. ``states``: tensors of step 1, if there is one."""
    prefixes: dict[str, str] = {}  # digest of a network -> prefix of its tensors
    stages = []
    for state, origin in parts:
        prefix = prefixes.setdefault(state_digest(state), f"sr{len(prefixes)}")
        states[prefix] = state
        stages.append(SRStage.of(origin, weights=prefix))
    return Model.with_digest(path, Manifest(structure, tuple(stages), "", margin=margin), states)


def _requested_stage(request: BuildRequest, index: int) -> tuple[State, StageOrigin]:
    """The network of stage ``index`` with the requested sigma and noise gain."""
    name = request.sr[index]
    state, origin = read_stage(name, index, request.licence)
    changes: dict[str, Any] = {}
    if index < len(request.sigma):
        changes["sigma"] = request.sigma[index]
    if index < len(request.noise_gain) and (gain := request.noise_gain[index]) != 1:
        if not noise_channels_of(state):
            raise UsageError(
                f"{option('noise_gain')} {gain:g}: the network of {name} has no noise channels; give 1 for its stage"
            )
        state, origin = _louder(state, origin, gain)
    return state, replace(origin, **changes)


def _louder(state: State, origin: StageOrigin, gain: float) -> tuple[State, StageOrigin]:
    """A network and its origin with noise channels that are ``gain`` times as loud."""
    if gain == 1:
        return state, origin
    return with_noise_gain(state, gain), replace(origin, noise_gain=origin.noise_gain * gain)
