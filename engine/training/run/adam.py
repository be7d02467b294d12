"""Adam (Kingma and Ba 2015) by PyTorch's own function, without the imports of its optimiser class.

``torch.optim.Adam`` imports the compiler when it is constructed: 900 modules, 144 MiB and nearly two seconds for a process
that compiles nothing (decision 0019). The function that it calls in the end imports none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

EPS = 1e-8


class Adam:
    """Same state and bit-identical results as ``torch.optim.Adam``; ``torch.amp.GradScaler`` can drive it.

    Args:
        groups: weights and the learning rate of each group; ``param_groups[i]["lr"]`` may change between steps.
        betas: decay of the two moments.
    """

    def __init__(self, groups: Sequence[tuple[Iterable[Tensor], float]], betas: tuple[float, float]) -> None:
        self.betas = betas
        self.param_groups: list[dict[str, Any]] = [{"params": list(weights), "lr": rate} for weights, rate in groups]
        self.state: dict[int, dict[str, Tensor]] = {}  # by the weight's number, once it has had a gradient

    @property
    def weights(self) -> list[Tensor]:
        """Weights of all groups."""
        return [weight for group in self.param_groups for weight in group["params"]]

    def zero_grad(self) -> None:
        """Delete all gradients."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        first = 0
        for group in self.param_groups:
            numbered = [(n, w) for n, w in enumerate(group["params"], first) if w.grad is not None]
            first += len(group["params"])
            if not numbered:
                continue
            states = [self._state(number, weight) for number, weight in numbered]
            adam(
                [weight for _, weight in numbered],
                [weight.grad for _, weight in numbered],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=EPS,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, without the learning rates."""
        return {"state": self.state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a copy of ``saved``."""
        weights = self.weights
        self.state = {
            number: {
                # PyTorch counts the steps on the CPU.
                name: value.clone() if name == "step" else value.to(weights[number], copy=True)
                for name, value in state.items()
            }
            for number, state in saved["state"].items()
        }

    def _state(self, number: int, weight: Tensor) -> dict[str, Tensor]:
        if number not in self.state:
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.state[number] = {"step": torch.tensor(0.0), **moments}
        return self.state[number]
