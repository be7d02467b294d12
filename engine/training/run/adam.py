"""Adam (Kingma and Ba 2015) by PyTorch's own arithmetic, without what its optimiser objects import.

`torch.optim.Adam` loads the compiler as soon as it is made: nine hundred modules, 144 MiB resident, nearly two seconds, for a
process that compiles nothing (docs/decisions/0019). The function that it calls in the end needs none of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

EPS = 1e-8


class Adam:
    """Moves weights against their gradients. What it holds and is asked for is as of `torch.optim.Adam`, whose results are its own
    to the last bit, so that `torch.amp.GradScaler` drives it too.

    `groups`: weights and the learning rate of each; `param_groups[i]["lr"]` may be changed between steps.
    """

    def __init__(self, groups: Sequence[tuple[Iterable[Tensor], float]], betas: tuple[float, float]) -> None:
        self.betas = betas
        self.param_groups: list[dict[str, Any]] = [{"params": list(weights), "lr": rate} for weights, rate in groups]
        self.state: dict[int, dict[str, Tensor]] = {}  # of each weight that ever had a gradient, by its number

    @property
    def weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
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
        """What a checkpoint needs; the rates are the caller's."""
        return {"state": self.state}

    def load_state_dict(self, kept: Mapping[str, Any]) -> None:
        weights = self.weights
        self.state = {
            number: {
                # How often it was moved is counted on the CPU, as PyTorch does.
                name: value.clone() if name == "step" else value.to(weights[number], copy=True)
                for name, value in state.items()
            }
            for number, state in kept["state"].items()
        }

    def _state(self, number: int, weight: Tensor) -> dict[str, Tensor]:
        if number not in self.state:
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.state[number] = {"step": torch.tensor(0.0), **moments}
        return self.state[number]
