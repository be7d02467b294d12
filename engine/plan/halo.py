"""How the halo of a stage follows from its measurements. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UsageError
from engine.plan.measured import StageProfile

SEAM_TOLERANCE = 1.0
"""Default tolerance of ``--overlap auto``: the largest seam error, in levels of 255."""


@dataclass(frozen=True, slots=True)
class HaloPolicy:
    """How the halo of a stage is chosen: ``auto``, ``exact``, ``erf:<fraction>`` or a number of LR pixels."""

    policy: str = "auto"
    tolerance: float = SEAM_TOLERANCE

    def __post_init__(self) -> None:
        if self.policy in ("auto", "exact") or self.policy.isdecimal():
            if not self.tolerance > 0:
                raise UsageError(
                    f"seam tolerance {self.tolerance}: needs more than 0 levels; use --overlap exact for none"
                )
            return
        kind, _, fraction = self.policy.partition(":")
        if kind != "erf" or fraction not in ERF_FRACTIONS:
            known = ", ".join(f"erf:{f}" for f in ERF_FRACTIONS)
            raise UsageError(f"overlap '{self.policy}': use auto, exact, a number of pixels, or one of {known}")

    @property
    def needs_profile(self) -> bool:
        return self.policy == "auto" or self.policy.startswith("erf:")

    def choose(self, profile: StageProfile | None, radius: int, align: int) -> int:
        """The halo in LR pixels: a multiple of ``align``; the policies never take more than ``radius`` needs."""
        exact = -(-radius // align) * align
        if self.policy == "exact":
            return exact
        if self.policy.isdecimal():
            return -(-int(self.policy) // align) * align
        if profile is None:
            raise UsageError(f"overlap '{self.policy}' needs a measurement of the stage: run engine probe first")
        if self.policy == "auto":
            point = profile.halo_within(self.tolerance)
            return exact if point is None else min(exact, -(-point.halo // align) * align)
        erf = profile.erf_square.get(self.policy.partition(":")[2])
        return exact if erf is None else min(exact, -(-erf // align) * align)


ERF_FRACTIONS = ("0.9", "0.95", "0.98", "0.99", "0.999")
