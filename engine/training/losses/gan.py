"""The adversarial losses, which see only a discriminator's scores."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UsageError
from engine.training.run.precision import at_least_fp32

Adversarial = Literal["ragan", "vanilla", "hinge"]


def discriminator_loss(kind: Adversarial, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the discriminator minimises, of scores (any shape) without a sigmoid -> scalar, fp32.

    "ragan": the relativistic average loss (Jolicoeur-Martineau 2019, as in ESRGAN): real ones should score above the mean
    of the fakes, fakes below the mean of the real ones; half the sum. The means run over all scores of the batch.
    "vanilla": binary cross-entropy (Goodfellow et al. 2014), the sum of both. "hinge": Miyato et al. 2018, the sum.
    """
    real, fake = at_least_fp32(real_scores), at_least_fp32(fake_scores)
    match kind:
        case "ragan":
            return (_entropy(real - fake.mean(), 1) + _entropy(fake - real.mean(), 0)) / 2
        case "vanilla":
            return _entropy(real, 1) + _entropy(fake, 0)
        case "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    raise _unknown(kind)


def generator_loss(kind: Adversarial, real_scores: Tensor | None, fake_scores: Tensor) -> Tensor:
    """What the generator minimises, of scores (any shape) without a sigmoid -> scalar, fp32.

    "ragan" wants the fakes above the mean of the real ones and the real ones below the mean of the fakes; the other two
    do not look at `real_scores`, which may be None. "vanilla" is the non-saturating form.
    """
    fake = at_least_fp32(fake_scores)
    match kind:
        case "ragan":
            if real_scores is None:
                raise UsageError("the relativistic loss compares with the scores of real crops, but there are none")
            real = at_least_fp32(real_scores)
            return (_entropy(real - fake.mean(), 0) + _entropy(fake - real.mean(), 1)) / 2
        case "vanilla":
            return _entropy(fake, 1)
        case "hinge":
            return -fake.mean()
    raise _unknown(kind)


def _entropy(scores: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))


def _unknown(kind: str) -> UsageError:
    return UsageError(f"no adversarial loss is called {kind!r}; there are ragan, vanilla, hinge")
