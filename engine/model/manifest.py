"""The manifest of a model file: JSON that describes step 1 and every super-resolution stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec

from engine.errors import ModelError
from engine.model.limits import check_json
from engine.plan.measured import StageProfile

FORMAT = "ourgan-engine/1"


MAX_STAGES = 16
"""Super-resolution stages of a file. The paper has three."""

MAX_MARGIN = 64
"""Largest margin, in pixels of step 1."""


class StageOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a super-resolution network, wherever its weights are stored."""

    architecture: str
    """Name in ``engine.archs``: "esrgan" or "swinir"."""
    scale: Annotated[int, msgspec.Meta(ge=1, le=16)]
    """Enlargement of each side."""
    sigma: int | float
    """Standard deviation of the noise that is added to the input, as a share of 1.0."""
    source: str
    """File, package or author that the weights come from."""
    licence: str
    """Licence of the weights."""
    training: dict[str, Any] | None = None
    """Provenance that ``engine train`` recorded with the weights; None for weights from elsewhere."""
    noise_gain: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Factor by which noise channels are louder than trained; the weights include it."""


class SRStage(StageOrigin, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A super-resolution stage of a model file."""

    weights: str
    """Prefix of the stage's tensors in the file; stages with equal weights share one."""
    profile: StageProfile | None = None
    """Measurements by ``engine probe``, if the file holds them."""

    def __post_init__(self) -> None:
        if self.profile is not None and any(point.halo < 0 for point in self.profile.seam):
            raise ValueError("a halo is negative")
        if self.sigma < 0:
            raise ValueError("sigma is negative")

    @classmethod
    def of(cls, origin: StageOrigin, **changes: Any) -> SRStage:  # noqa: ANN401
        """The stage of a network with this origin; ``changes`` are fields of the stage."""
        return cls(**(msgspec.structs.asdict(origin) | changes))

    @property
    def origin(self) -> StageOrigin:
        """The stage without its place in the file and without its profile."""
        return StageOrigin(**{name: getattr(self, name) for name in StageOrigin.__struct_fields__})


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag=FORMAT):
    """Contents of a model file."""

    structure: dict[str, Any] | None
    """Metadata of step 1; None for a file of super-resolution stages alone."""
    stages: Annotated[tuple[SRStage, ...], msgspec.Meta(max_length=MAX_STAGES)]
    """Super-resolution stages in the order in which they run."""
    digest: str
    """sha256 of everything that decides pixels."""
    colour: str = "sRGB"
    """Colour space of input and output."""
    margin: Annotated[int, msgspec.Meta(ge=0, le=MAX_MARGIN)] = 0
    """Pixels along each side of step 1's image that are context for the stages and are cropped from the result."""

    def to_json(self) -> str:
        """JSON with sorted keys."""
        values = msgspec.to_builtins(self)
        for stage, stored in zip(self.stages, values["stages"], strict=True):
            stored["profile"] = stage.profile and stage.profile.to_json()
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Read the manifest of the file ``path``. Raises ModelError when it is damaged or of another format."""
        try:
            check_json(text)
            if msgspec.json.decode(text, type=_Format).format != FORMAT:
                raise ModelError(
                    f"{path}: not format {FORMAT}; this engine is too old or the file is not a model bundle"
                )
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ModelError(f"{path}: damaged manifest ({error}); build the model again") from error

    @property
    def licences(self) -> list[str]:
        """Every licence in the file with the source that it covers, in order, each once."""
        structure = self.structure or {}
        pairs = [(structure.get("source"), structure.get("licence")), *((s.source, s.licence) for s in self.stages)]
        return list(dict.fromkeys(f"{licence}: {source}" for source, licence in pairs if licence))


class _Format(msgspec.Struct):
    """The one field that manifests of every format have."""

    format: str
