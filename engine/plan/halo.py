"""Choice of a stage's halo from its measurements. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UsageError, option
from engine.geometry import UNBOUNDED
from engine.plan.measured import MeasuredStage, MissingMeasurement, StageProfile
from engine.plan.stage import StagePlan

SEAM_TOLERANCE = 1.0
"""Default tolerance of the automatic halo: largest seam error, in levels of 255."""

UNMEASURED_HALO = 32
"""Halo of networks whose receptive field is not known, on pictures that are too small to measure it."""

_LEAST = 0.001
"""Smallest error of tiles that is stated for a network that looks at the whole picture: its sums are in another order."""

_NEAR = 1.1
"""Factor within which the error of a network that looks at the whole picture is as small as with any halo."""

ERF_FRACTIONS = ("0.9", "0.95", "0.98", "0.99", "0.999")
"""Shares of the gradient's magnitude for which a radius is measured; the paper takes 0.98."""


@dataclass(frozen=True, slots=True)
class HaloPolicy:
    """Rule for the halo of a stage."""

    policy: str = "auto"
    """``auto`` (smallest halo within the tolerance), ``exact``, ``erf:<fraction>`` or a number of LR pixels."""
    tolerance: float = SEAM_TOLERANCE
    """Largest seam error that ``auto`` accepts, in levels of 255."""

    def __post_init__(self) -> None:
        if self.policy in ("auto", "exact") or self.policy.isdecimal():
            if not self.tolerance > 0:
                raise UsageError(
                    f"{option('seam_tolerance', self.tolerance)}: must be above 0 levels; "
                    f"use {option('overlap', 'exact')} for no error"
                )
            return
        kind, _, fraction = self.policy.partition(":")
        if kind != "erf" or fraction not in ERF_FRACTIONS:
            known = ", ".join(f"erf:{f}" for f in ERF_FRACTIONS)
            raise UsageError(
                f"{option('overlap', self.policy)}: unknown policy; use auto, exact, a number of pixels, or {known}"
            )

    @property
    def needs_profile(self) -> bool:
        """Whether the stage must have been measured."""
        return self.policy == "auto" or self.needs_erf

    @property
    def needs_erf(self) -> bool:
        """Whether the stage's receptive field must have been measured."""
        return self.policy.startswith("erf:")

    def choose(self, profile: StageProfile | None, radius: int, align: int) -> int:
        """Halo in LR pixels.

        Args:
            profile: measurements of the stage.
            radius: theoretical receptive field, one-sided, in LR pixels: the halo never exceeds it.
            align: the halo is a multiple of it.

        Raises:
            MissingMeasurement: the policy needs a profile.
        """
        if radius >= UNBOUNDED:
            return self._choose_measured(profile, align)
        exact = -(-radius // align) * align
        if self.policy == "exact":
            return exact
        if self.policy.isdecimal():
            return -(-int(self.policy) // align) * align
        if profile is None:
            raise MissingMeasurement("profiles")
        if self.policy == "auto":
            point = profile.halo_within(self.tolerance)
            return exact if point is None else min(exact, -(-point.halo // align) * align)
        erf = profile.erf_square.get(self.policy.partition(":")[2])
        return exact if erf is None else min(exact, -(-erf // align) * align)

    def _choose_measured(self, profile: StageProfile | None, align: int) -> int:
        """The halo of a network whose receptive field is not known."""
        if profile is None:
            raise MissingMeasurement("profiles")
        if self.policy.isdecimal():
            return -(-int(self.policy) // align) * align
        if self.policy != "auto":
            raise UsageError(
                f"{option('overlap', self.policy)}: a network by spandrel, whose receptive field is not known; use auto"
            )
        point = profile.halo_within(self.tolerance)
        if point is None and profile.seam and profile.reach != "local":  # its error is measured, and accepted or not
            least = min(p.max for p in profile.seam)
            point = profile.halo_within(_NEAR * least)
        if point is None and profile.seam:
            raise UsageError(
                f"{option('seam_tolerance', self.tolerance)}: no halo that was measured has a smaller error; raise it, or "
                f"give a number of pixels by {option('overlap')}"
            )
        return -(-(UNMEASURED_HALO if point is None else point.halo) // align) * align


def seam_error(cut: StagePlan, measured: MeasuredStage, *, has_inner_edges: bool) -> float | None:
    """Largest seam error of a stage's cut, in levels of 255.

    Returns:
        0.0 when the halo holds the whole receptive field or no tile has an edge inside the image; None when the error at
        this halo was not measured.
    """
    if not has_inner_edges or cut.halo >= measured.radius:
        return 0.0
    point = measured.profile.at(cut.halo) if measured.profile else None
    if measured.reach != "local" and measured.whole_error is not None:
        return max(measured.whole_error.max, point.max if point else 0.0, _LEAST)
    return point.max if point else None


def largest(errors: Sequence[float | None]) -> float | None:
    """Largest of several seam errors; None when one of them is not known."""
    known = [e for e in errors if e is not None]
    return max(known) if len(known) == len(errors) else None
