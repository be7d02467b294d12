"""The model file: one safetensors bundle with every stage's weights and a manifest that says what they are.

Tensors carry their stage's prefix (``structure.``, ``sr0.``, ...); stages that share weights name the same prefix, so
shared weights are stored once. The manifest is a JSON string in the file's metadata. A file without a manifest is taken
as a bare super-resolution checkpoint: a model of one stage and no step 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine import archs
from engine.archs import Upscaler
from engine.archs.hpvaegan import BaseGenerator
from engine.archs.layers import noise_channels_of, with_noise_gain
from engine.errors import InputError, ModelError, UsageError
from engine.io.tensors import write_tensors
from engine.model import checkpoints
from engine.model.manifest import Manifest, SRStage
from engine.model.structure_file import (
    METADATA_KEY,
    read_structure,
    structure_from_state,
    structure_metadata,
    structure_state,
)
from engine.plan.measured import StageProfile

MARGIN, MOST_MARGIN = 8, 64
"""Pixels of step 1 beyond the image's sides: what networks make of a border, be it padded with zeros or mirrored, reaches more
than 4 and less than 8 pixels into it (docs/decisions/0011)."""

_KEY = "ourgan"
_STRUCTURE = "structure"

DEFAULT = Path(__file__).parents[1] / "models" / "picosdeeuropa.safetensors"
"""The model that comes with the engine: small networks, trained on one photograph of mountains."""

State = dict[str, Tensor]


class Model:
    """An open model file. Networks are built when first asked for; stages that share weights share one module."""

    def __init__(self, path: Path, manifest: Manifest, states: dict[str, State]) -> None:
        self.path = path
        self.manifest = manifest
        self._states = states
        self._networks: dict[tuple[str, str, str], Upscaler] = {}

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def stages(self) -> tuple[SRStage, ...]:
        return self.manifest.stages

    @cached_property
    def base_generator(self) -> BaseGenerator | None:
        """Step 1, or None when the file has only super-resolution stages."""
        metadata = self.manifest.structure
        if metadata is None:
            return None
        try:
            return structure_from_state(self._states[_STRUCTURE], metadata)
        except ModelError as error:
            raise ModelError(f"{self.path} (step 1): {error}") from error

    @property
    def base_size(self) -> tuple[int, int] | None:
        """(height, width) of the image that step 1 was trained to make."""
        return self.base_generator.base_size if self.base_generator is not None else None

    def network(self, index: int, precision: str = "fp32", device: str = "cpu") -> Upscaler:
        """The network of super-resolution stage ``index``, in float32, ready for inference.

        A stage casts and moves its module in place, so each precision and each device has a module of its own.
        """
        key = (self.stages[index].weights, precision, device)
        if key not in self._networks:
            self._networks[key] = self.new_network(index)
        return self._networks[key]

    def new_network(self, index: int) -> Upscaler:
        """The same, but nobody else's: it is gone when the caller is done with it."""
        return archs.build(self.state(index), str(self.path))

    def state(self, index: int) -> State:
        """The tensors of stage ``index``, as they are stored."""
        return self._states[self.stages[index].weights]

    def parameters(self, prefix: str) -> int:
        return sum(t.numel() for t in self._states[prefix].values())

    def weights_digest(self, index: int) -> str:
        return _digest({"w": self.state(index)}, ())

    def with_profiles(self, profiles: Sequence[StageProfile | None]) -> Model:
        stages = tuple(replace(s, profile=p) for s, p in zip(self.stages, profiles, strict=True))
        return Model(self.path, replace(self.manifest, stages=stages), self._states)

    def with_margin(self, margin: int) -> Model:
        """The same with another margin, in pixels of step 1: other images."""
        return _sealed(self.path, replace(self.manifest, margin=margin), self._states)

    def save(self, path: Path) -> None:
        """Write the bundle: to a temporary name first, so that a file of the final name is always whole."""
        tensors = {f"{p}.{key}": t.contiguous() for p, state in self._states.items() for key, t in state.items()}
        metadata = {
            _KEY: self.manifest.to_json(),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": path.stem,
            "modelspec.architecture": "our-gan",
            "modelspec.license": "; ".join(self.manifest.licences),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        write_tensors(path, tensors, metadata)


def load(path: Path | str) -> Model:
    """Open a model bundle, or a bare super-resolution checkpoint of any kind that ``engine.model.checkpoints`` reads.

    Raises:
        ModelError: missing, truncated or altered file, missing or misshapen tensors, NaN weights, unknown architecture.
    """
    path = Path(path)
    if not path.is_file():
        found = "not a file" if path.exists() else "no such file"
        raise ModelError(f"{path}: {found}; name a model bundle (engine model build makes one) or a checkpoint")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if _is_structure(about):
                    raise ModelError(
                        f"{path}: step 1 alone; engine model build --structure {path.name} --sr WEIGHTS --out MODEL.safetensors "
                        "makes a model of it"
                    )
                if (text := about.get(_KEY)) is not None:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                    return _open_bundle(path, Manifest.from_json(text, path), tensors)
        except SafetensorError as error:
            reason = f"damaged or truncated safetensors file ({error})"
            raise ModelError(f"{path}: {reason}; fetch or build it again") from error
    return _open_checkpoint(path)


def open_structure(path: Path) -> BaseGenerator:
    """Step 1, of a file of its own or of a model bundle. Raises ModelError."""
    if _is_structure(_metadata(path)):
        return read_structure(path)
    structure = load(path).base_generator
    if structure is None:
        raise ModelError(f"{path}: holds no step 1; name a model bundle with one, or what engine train structure wrote")
    return structure


def read_stage(name: str, place: int = 0, licence: str | None = None) -> tuple[State, SRStage]:
    """A super-resolution network's tensors under our names and what is known of them.

    ``name``: of a packaged checkpoint, a checkpoint file, or a model bundle, whose stage at this ``place`` (from 0; the last if
    it has fewer) is taken. ``licence``: instead of what a file says. The result's ``weights`` is empty, and it has no profile.

    Raises:
        ModelError: no such weights, or a file that is damaged or of an unknown architecture.
    """
    packaged = checkpoints.PACKAGED.get(name)
    path = checkpoints.find_packaged(name) if packaged else Path(name)
    if _KEY in _metadata(path):
        model = load(path)
        index = min(place, len(model.stages) - 1)
        stage = model.stages[index]
        return model.state(index), replace(stage, weights="", profile=None, licence=licence or stage.licence)
    raw = checkpoints.read_checkpoint(path)
    architecture = archs.identify(raw, str(path))
    state = architecture.canonical(raw)
    scale = archs.build(state, str(path)).scale
    if packaged:
        origin = packaged.provenance()
        return state, SRStage("", architecture.name, scale, 0.0, origin["source"], origin["licence"])
    facts = checkpoints.read_facts(path)
    source, licence = str(facts.get("source") or path.name), str(licence or facts.get("licence") or "not stated")
    sigma = facts.get("sigma", 0.0)
    if not isinstance(sigma, int | float) or not 0 <= sigma < math.inf:
        raise ModelError(f"{path}: its sigma, {sigma!r}, is no share of 1.0; the file is damaged, train it again")
    return state, SRStage("", architecture.name, scale, sigma, source, licence, training=facts or None)


def _is_structure(metadata: Mapping[str, str]) -> bool:
    return '"kind": "structure"' in metadata.get(METADATA_KEY, "")


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file; nothing of what is none."""
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        return file.metadata() or {}
    return {}


def build(
    structure: Path | None,
    checkpoint_names: Sequence[str],
    sigmas: Sequence[float] = (),
    licence: str | None = None,
    margin: int | None = None,
    noise_gains: Sequence[float] = (),
) -> Model:
    """Put a bundle together.

    ``structure``: a file of step 1, or a bundle whose step 1 is taken.
    ``checkpoint_names``: one per super-resolution stage, each as ``read_stage`` takes it.
    ``sigmas``: input noise per stage; where not given, what the network was trained with, as its file says, else 0.
    ``licence`` is recorded for checkpoints that are given as a path and do not say theirs. ``margin``: of step 1's image, in
    pixels; ``MARGIN`` if there is a step 1. ``noise_gains``: how many times as loud each stage's noise channels become
    (docs/decisions/0020); 1 where not given.
    """
    if not checkpoint_names:
        raise ModelError("a model needs at least one super-resolution checkpoint; give --sr PATH (or --sr realsr)")
    for values, name in ((sigmas, "sigma"), (noise_gains, "noise gain")):
        if len(values) > len(checkpoint_names):
            raise ModelError(
                f"{len(values)} values of {name} for {len(checkpoint_names)} stages; give at most one per stage"
            )
    if bad := [s for s in sigmas if not (math.isfinite(s) and s >= 0)]:
        raise UsageError(f"sigma {bad[0]:g}: must be 0 or more, as a share of 1.0; leave it out for no input noise")
    if bad := [g for g in noise_gains if not (math.isfinite(g) and g > 0)]:
        raise UsageError(
            f"noise gain {bad[0]:g}: must be above 0; 1 leaves a stage's noise channels as they were trained"
        )
    if margin is not None and (structure is None or not 0 <= margin <= MOST_MARGIN):
        raise UsageError(f"--margin {margin}: must be 0 to {MOST_MARGIN} pixels of step 1, which a model with one has")
    states: dict[str, State] = {}
    prefix_of: dict[str, str] = {}
    metadata: dict[str, Any] | None = None
    if structure is not None:
        network = open_structure(structure)
        states[_STRUCTURE], metadata = structure_state(network), structure_metadata(network)
        margin = MARGIN if margin is None else margin
    stages = []
    for index, name in enumerate(checkpoint_names):
        state, stage = read_stage(name, index, licence)
        if (gain := noise_gains[index] if index < len(noise_gains) else 1.0) != 1:
            if not noise_channels_of(state):
                raise UsageError(
                    f"noise gain {gain:g}: the network of {name} has no noise channels; give 1 for its stage"
                )
            state, stage = with_noise_gain(state, gain), replace(stage, noise_gain=stage.noise_gain * gain)
        content = _digest({"w": state}, ())
        prefix = prefix_of.setdefault(content, f"sr{len(prefix_of)}")
        states[prefix] = state
        stages.append(replace(stage, weights=prefix, sigma=sigmas[index] if index < len(sigmas) else stage.sigma))
    return _sealed(Path("model.safetensors"), Manifest(metadata, tuple(stages), "", margin=margin or 0), states)


def _open_bundle(path: Path, manifest: Manifest, tensors: State) -> Model:
    states: dict[str, State] = {}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition(".")
        states.setdefault(prefix, {})[name] = tensor
    wanted = {s.weights for s in manifest.stages} | ({_STRUCTURE} if manifest.structure else set())
    if missing := sorted(wanted - set(states)):
        raise ModelError(f"{path}: no tensors for {', '.join(missing)}; the file is incomplete, build it again")
    model = Model(path, manifest, states)
    _ = model.base_generator
    for index in range(len(model.stages)):
        model.network(index)
    actual = _digest(states, _decisive(manifest))
    if actual != manifest.digest:
        raise ModelError(f"{path}: contents {actual[:12]} do not match the manifest's {manifest.digest[:12]}: damaged")
    return model


def _open_checkpoint(path: Path) -> Model:
    state, stage = read_stage(str(path))
    stages = (replace(stage, weights="sr0"),)
    return _sealed(path, Manifest(None, stages, ""), {"sr0": state})


def _sealed(path: Path, manifest: Manifest, states: dict[str, State]) -> Model:
    """The model with the digest of its contents."""
    return Model(path, replace(manifest, digest=_digest(states, _decisive(manifest))), states)


def _decisive(manifest: Manifest) -> tuple[Any, ...]:
    """The part of the manifest that changes pixels: not the halo profiles, which the plan records itself."""
    stages = [(s.weights, s.architecture, s.scale, s.sigma) for s in manifest.stages]
    margin = (manifest.margin,) if manifest.margin else ()  # files that know of none keep their digest
    return manifest.structure, stages, *margin


def _digest(states: dict[str, State], extra: tuple[Any, ...]) -> str:
    sha = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for prefix in sorted(states):
        for key, tensor in sorted(states[prefix].items()):
            sha.update(f"{prefix}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(
                tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor.item()).encode()
            )
    return sha.hexdigest()
