"""The manifest of a model file: JSON that describes every stage."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.plan.measured import StageProfile

FORMAT = "ourgan-engine/1"


@dataclass(frozen=True, slots=True)
class SRStage:
    """One super-resolution step as the manifest tells it. ``sigma``: standard deviation of its input noise, of 1.0;
    ``training``: what its training noted, if it was ours; ``noise_gain``: how many times as loud as trained its noise channels
    are, in the weights.
    """

    weights: str
    architecture: str
    scale: int
    sigma: float
    source: str
    licence: str
    profile: StageProfile | None = None
    training: dict[str, Any] | None = None
    noise_gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the file holds. ``structure``: metadata of step 1, if any; ``digest``: sha256 of what decides pixels;
    ``margin``: so many pixels along the sides of step 1's image are context for what follows and not enlarged to the end.
    """

    structure: dict[str, Any] | None
    stages: tuple[SRStage, ...]
    digest: str
    colour: str = "sRGB"
    margin: int = 0

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ModelError(
                    f"{path}: not format {FORMAT}; this engine is too old or the file is not a model bundle"
                )
            profiles = [s.pop("profile") for s in data["stages"]]
            stages = tuple(
                SRStage(**s, profile=StageProfile.from_json(p) if p else None)
                for s, p in zip(data.pop("stages"), profiles, strict=True)
            )
            manifest = cls(stages=stages, **data)
            manifest._check_types()
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: damaged manifest ({error}); build the model again") from error

    def _check_types(self) -> None:
        """The digest tells whether contents are right, but only of a manifest that can be read that far."""
        texts = [self.digest, *(t for s in self.stages for t in (s.weights, s.architecture, s.source, s.licence))]
        if wrong := [t for t in texts if not isinstance(t, str)]:
            raise TypeError(f"{wrong[0]!r} stands where a text is expected")
        if type(self.margin) is not int or self.margin < 0:
            raise TypeError(f"'margin' is {self.margin!r}")
        for gain in (s.noise_gain for s in self.stages):
            if not (isinstance(gain, float) and 0 < gain < math.inf):
                raise TypeError(f"'noise_gain' is {gain!r}")
        if not isinstance(self.structure, dict | None):
            raise TypeError(f"'structure' is {self.structure!r}")

    @property
    def licences(self) -> list[str]:
        """Every licence in the file with what it covers, in order, each once."""
        structure = self.structure or {}
        pairs = [(structure.get("source"), structure.get("licence")), *((s.source, s.licence) for s in self.stages)]
        return list(dict.fromkeys(f"{licence}: {source}" for source, licence in pairs if licence))
