"""The model file: one safetensors file with the weights of every stage and a manifest that describes them.

Tensors carry the prefix of their stage (``structure.``, ``sr0.``, ...). Stages that share weights name the same prefix, so
shared weights are stored once. The manifest is a JSON string in the file's metadata. A file without a manifest is read as a
bare super-resolution checkpoint: a model of one stage and no step 1.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import archs
from engine.archs import Upscaler
from engine.archs.hpvaegan import BaseGenerator
from engine.causes import raise_if_exhausted
from engine.errors import InputError, ModelError
from engine.io.objects import local_copy
from engine.io.tensors import open_tensors, write_tensors
from engine.model.checkpoints import is_safetensors, read_checkpoint, read_provenance
from engine.model.manifest import Manifest, SRStage, StageOrigin
from engine.model.packaged import PACKAGED, find_packaged, provenance
from engine.model.structure_file import METADATA_KEY, read_structure, structure_from_state
from engine.plan.measured import StageProfile

STRUCTURE = "structure"
"""Prefix of step 1's tensors."""

DEFAULT = Path(__file__).parents[1] / "models" / "picosdeeuropa.safetensors"
"""The model that comes with the engine: small networks, trained on one photograph of mountains."""

_MANIFEST_KEY = "ourgan"

State = dict[str, Tensor]


class Model:
    """An open model file. Networks are built at first use; stages that share weights share one module."""

    noise_gain: tuple[float, ...] = ()
    """Factors of the steps' noise channels for one render (``engine.model.build.with_louder_noise``); empty without."""

    def __init__(self, path: Path, manifest: Manifest, states: Mapping[str, State]) -> None:
        self.path = path
        self.manifest = manifest
        self._states = states
        self._networks: dict[str, Upscaler] = {}
        self.original = self
        """The model without ``noise_gain``: its networks take the same time and memory."""

    @classmethod
    def with_digest(cls, path: Path, manifest: Manifest, states: Mapping[str, State]) -> Model:
        """A model whose manifest gets the digest of its contents."""
        return cls(path, replace(manifest, digest=_content_digest(manifest, states)), states)

    @property
    def digest(self) -> str:
        """sha256 of everything that decides pixels."""
        return self.manifest.digest

    @property
    def stages(self) -> tuple[SRStage, ...]:
        """Super-resolution stages in the order in which they run."""
        return self.manifest.stages

    @cached_property
    def base_generator(self) -> BaseGenerator | None:
        """Step 1, or None when the file has only super-resolution stages."""
        metadata = self.manifest.structure
        if metadata is None:
            return None
        try:
            return structure_from_state(self._states[STRUCTURE], metadata)
        except ModelError as error:
            raise ModelError(f"{self.path} (step 1): {error}") from error

    @property
    def base_size(self) -> tuple[int, int] | None:
        """(height, width) of the image that step 1 was trained to generate; None without step 1."""
        return self.base_generator.base_size if self.base_generator is not None else None

    def network(self, index: int) -> Upscaler:
        """Network of super-resolution stage ``index`` in fp32 on the CPU, to read or to run; ``new_network`` is for changes.

        Stages that share weights share it.
        """
        weights = self.stages[index].weights
        if weights not in self._networks:
            self._networks[weights] = archs.build(self.state(index), str(self.path))
        return self._networks[weights]

    def new_network(self, index: int) -> Upscaler:
        """A fresh network of super-resolution stage ``index`` that the caller owns.

        Returns:
            A module in fp32 on the CPU, in inference mode and without gradients. Nothing else refers to it: the caller may
            cast it, move it and drop it. Its fp32 parameters share memory with ``state(index)`` until they are cast, so they
            must not be written to in place.
        """
        network = self.network(index)  # checked and built once; a copy of its modules takes a tenth of the time
        tensors = (*network.parameters(), *network.buffers())
        own = {id(t): nn.Parameter(t, t.requires_grad) if isinstance(t, nn.Parameter) else t.detach() for t in tensors}
        return copy.deepcopy(network, own)

    def state(self, index: int) -> State:
        """Tensors of super-resolution stage ``index`` in the stored dtype."""
        return self.tensors(self.stages[index].weights)

    def tensors(self, prefix: str) -> State:
        """Tensors under ``prefix`` in the stored dtype."""
        return self._states[prefix]

    def parameters(self, prefix: str) -> int:
        """Number of values in the tensors under ``prefix``."""
        return sum(t.numel() for t in self._states[prefix].values())

    def weights_digest(self, index: int) -> str:
        """sha256 of the tensors of super-resolution stage ``index``."""
        return state_digest(self.state(index))

    def with_profiles(self, profiles: Sequence[StageProfile | None]) -> Model:
        """The same model with one measured profile per stage; its digest stays."""
        stages = tuple(replace(s, profile=p) for s, p in zip(self.stages, profiles, strict=True))
        return Model(self.path, replace(self.manifest, stages=stages), self._states)

    def with_margin(self, margin: int) -> Model:
        """The same model with another margin, in pixels of step 1; its digest changes, because its images do."""
        return Model.with_digest(self.path, replace(self.manifest, margin=margin), self._states)

    def repeated(self, stages: int) -> Model:
        """A model whose only super-resolution network runs ``stages`` times; its digest is that of such a model."""
        return Model.with_digest(self.path, replace(self.manifest, stages=self.stages * stages), self._states)

    def save(self, path: Path) -> Model:
        """Write the model file atomically; returns the model of that path. Raises InputError when it cannot be written."""
        tensors = {f"{p}.{key}": t.contiguous() for p, state in self._states.items() for key, t in state.items()}
        metadata = {
            _MANIFEST_KEY: self.manifest.to_json(),
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
        return Model(path, self.manifest, self._states)


def load(path: Path | str) -> Model:
    """Open a model file, or a bare super-resolution checkpoint in any format of ``engine.model.checkpoints``.

    ``path`` may be the name of packaged weights (``realsr``, ``x4plus``).

    Raises:
        ModelError: missing, truncated or altered file, missing or misshapen tensors, NaN weights, unknown architecture.
    """
    if str(path) in PACKAGED and not Path(path).exists():
        return _of_one_network(find_packaged(str(path)), *read_network(str(path)))
    path = local_copy(Path(path))
    if not path.is_file():
        problem = "not a file" if path.exists() else "no such file"
        raise ModelError(f"{path}: {problem}; name a model bundle (engine model build makes one) or a checkpoint")
    if is_safetensors(path):
        try:
            with open_tensors(path) as file:
                metadata = file.metadata() or {}
                if _is_structure(metadata):
                    raise ModelError(
                        f"{path}: step 1 alone; make a model of it with engine model build --structure {path.name} "
                        "--sr WEIGHTS --out MODEL.safetensors"
                    )
                if (text := metadata.get(_MANIFEST_KEY)) is not None:
                    return _open_bundle(path, Manifest.from_json(text, path), read_checkpoint(path))
        except SafetensorError as error:
            reason = f"damaged or truncated safetensors file ({error})"
            raise ModelError(f"{path}: {reason}; fetch or build it again") from error
    return _of_one_network(path, *read_network(str(path)))


def is_bundle(path: Path) -> bool:
    """Whether the file has a manifest."""
    return _MANIFEST_KEY in _metadata(path)


def open_structure(path: Path) -> BaseGenerator:
    """Step 1 from a file of its own or from a model file.

    Raises:
        ModelError: no such file, a damaged one, or a model without step 1.
    """
    if _is_structure(_metadata(path)):
        return read_structure(path)
    structure = load(path).base_generator
    if structure is None:
        raise ModelError(f"{path}: holds no step 1; name a model bundle with one, or a file of engine train structure")
    return structure


def read_network(name: str, licence: str | None = None) -> tuple[State, StageOrigin]:
    """Tensors of a bare super-resolution network under our names, and its origin.

    Args:
        name: a packaged checkpoint or the path of a checkpoint file.
        licence: licence of a file, whatever the file says.

    Raises:
        ModelError: no such weights, or a file that is damaged or of an unknown architecture.
    """
    path = find_packaged(name) if name in PACKAGED else Path(name)
    if not path.exists():
        raise ModelError(f"{path}: no such file; name a checkpoint, or packaged weights ({', '.join(PACKAGED)})")
    raw = read_checkpoint(path)
    architecture = archs.identify(raw, str(path))
    state = archs.canonical(architecture, raw, str(path))
    scale = archs.build(state, str(path)).scale
    if name in PACKAGED:
        source, licence = provenance(name)
        return state, StageOrigin(
            architecture=architecture.name, scale=scale, sigma=0.0, source=source, licence=licence
        )
    recorded = read_provenance(path)
    sigma = recorded.get("sigma", 0.0)
    if not isinstance(sigma, int | float) or not 0 <= sigma < math.inf:
        raise ModelError(f"{path}: its sigma, {sigma!r}, is no share of 1.0; the file is damaged, train it again")
    return state, StageOrigin(
        architecture=architecture.name,
        scale=scale,
        sigma=sigma,
        source=str(recorded.get("source") or path.name),
        licence=str(licence or recorded.get("licence") or "not stated"),
        training=recorded or None,
    )


def state_digest(state: State) -> str:
    """sha256 of the names, shapes, dtypes and values of a network's tensors."""
    return _digest({"w": state}, ())


def _open_bundle(path: Path, manifest: Manifest, tensors: State) -> Model:
    """Check everything that can be wrong with a model file, once, before anything is computed."""
    states: dict[str, State] = {}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition(".")
        states.setdefault(prefix, {})[name] = tensor
    prefixes = {s.weights for s in manifest.stages} | ({STRUCTURE} if manifest.structure else set())
    if missing := sorted(prefixes - set(states)):
        raise ModelError(f"{path}: no tensors for {', '.join(missing)}; the file is incomplete, build it again")
    model = Model(path, manifest, states)
    _ = model.base_generator
    for index, stage in enumerate(model.stages):
        if (scale := model.network(index).scale) != stage.scale:
            raise ModelError(f"{path}: stage {index} enlarges {scale} times, its manifest says {stage.scale}: damaged")
    actual = _content_digest(manifest, states)
    if actual != manifest.digest:
        raise ModelError(f"{path}: contents {actual[:12]} do not match the manifest's {manifest.digest[:12]}: damaged")
    return model


def _is_structure(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata is that of a file that holds step 1 alone."""
    return '"kind": "structure"' in metadata.get(METADATA_KEY, "")


def _metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; empty for any other file."""
    try:
        with open_tensors(path) as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise_if_exhausted(error)
        return {}


def _content_digest(manifest: Manifest, states: Mapping[str, State]) -> str:
    return _digest(states, _fields_that_change_pixels(manifest))


def _fields_that_change_pixels(manifest: Manifest) -> tuple[Any, ...]:
    """Fields of the manifest for the digest. Profiles are not among them, because the plan records its halos itself."""
    stages = [(s.weights, s.architecture, s.scale, s.sigma) for s in manifest.stages]
    margin = (manifest.margin,) if manifest.margin else ()  # files older than the margin keep their digest
    return manifest.structure, stages, *margin


def _digest(states: Mapping[str, State], fields: tuple[Any, ...]) -> str:
    sha = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for prefix in sorted(states):
        for key, tensor in sorted(states[prefix].items()):
            sha.update(f"{prefix}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.ndim:  # the array itself is hashed, without a copy
                sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
            else:
                sha.update(str(tensor.item()).encode())
    return sha.hexdigest()


def _of_one_network(path: Path, state: State, origin: StageOrigin) -> Model:
    """The model of a bare super-resolution network."""
    return Model.with_digest(path, Manifest(None, (SRStage.of(origin, weights="sr0"),), ""), {"sr0": state})
