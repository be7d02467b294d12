"""One step of optimisation: Adam, the loss scaler of fp16 and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from engine.device.precision import Precision
from engine.training.run.adam import Adam


def make_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Loss scaler for fp16; with the other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class Optimisation:
    """Descent of the weights of one network on sums of losses.

    Args:
        groups: weights and the learning rate of each group.
        betas: decay of Adam's two moments.
        scaler: loss scaler; it may outlive the optimisation.
        clip: largest norm of all gradients together; None: no clipping.
        compute_copy: weights of the copy that computes the losses, in the order of the groups' master weights; empty:
            the groups' own weights compute.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Iterable[Tensor], float]],
        betas: tuple[float, float],
        scaler: torch.amp.GradScaler,
        *,
        clip: float | None = None,
        compute_copy: Iterable[Tensor] = (),
    ) -> None:
        self.adam, self.scaler, self.clip = Adam(groups, betas), scaler, clip
        self._compute_copy = list(compute_copy)

    def set_rate(self, rate: float) -> None:
        """Use one learning rate for all groups from the next step on."""
        for group in self.adam.param_groups:
            group["lr"] = rate

    def descend(self, losses: Iterable[Tensor]) -> bool:
        """Make one step down the sum of ``losses``.

        Losses are taken and differentiated one by one, so an iterator need not keep all their graphs alive together.

        Returns:
            False if a loss is NaN or infinite; all weights are unchanged then.
        """
        self._clear_gradients()
        for loss in losses:
            if not math.isfinite(loss.item()):
                return False
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._compute_copy:
            self._take_gradients_of_copy()
        if self.clip is not None:
            self.scaler.unscale_(self.adam)  # type: ignore[arg-type]
            nn.utils.clip_grad_norm_(self.adam.weights, self.clip)
        self.scaler.step(self.adam)  # type: ignore[arg-type]
        self.scaler.update()
        return True

    def _clear_gradients(self) -> None:
        self.adam.zero_grad()
        for weight in self._compute_copy:
            weight.grad = None

    def _take_gradients_of_copy(self) -> None:
        for master, copy in zip(self.adam.weights, self._compute_copy, strict=True):
            master.grad = None if copy.grad is None else copy.grad.to(master.dtype)
