"""Adam is bit-identical to PyTorch's and does not import the compiler."""

import subprocess
import sys

import torch

from engine.training.run.adam import Adam


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_(True) for shape in ((3, 4), (5,), (2, 2, 2), ())]


def loss_of(parameters, iteration):
    """Loss of all weights but the third, which has no gradient before the second iteration."""
    used = [p for i, p in enumerate(parameters) if i != 2 or iteration > 1]
    return sum(((p - i) ** 4).sum() for i, p in enumerate(used))


def pair(betas=(0.5, 0.99)):
    ours, theirs = weights(), weights()
    groups = [(slice(0, 2), 0.03), (slice(2, 4), 0.1)]
    by_torch = [{"params": theirs[part], "lr": rate} for part, rate in groups]
    return (
        ours,
        theirs,
        Adam([(ours[part], rate) for part, rate in groups], betas),
        torch.optim.Adam(by_torch, betas=betas),
    )


def run(parameters, optimiser, iterations, first=0):
    for iteration in range(first, first + iterations):
        for group in optimiser.param_groups:
            group["lr"] *= 0.9
        optimiser.zero_grad()
        loss_of(parameters, iteration).backward()
        optimiser.step()


def test_equals_pytorch():
    for betas in ((0.5, 0.99), (0.9, 0.999)):
        ours, theirs, mine, other = pair(betas)
        start = [p.clone() for p in ours]
        run(ours, mine, 7)
        run(theirs, other, 7)
        for before, a, b in zip(start, ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, before)


def test_resumes_from_a_state(tmp_path):
    ours, whole = weights(), weights()
    rates = [(slice(0, 4), 0.05)]
    first, other = (Adam([(p[part], rate) for part, rate in rates], (0.5, 0.99)) for p in (ours, whole))
    run(ours, first, 3)
    torch.save(first.state_dict(), tmp_path / "state")
    again = Adam([(ours, first.param_groups[0]["lr"])], (0.5, 0.99))
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    run(ours, again, 3, first=3)
    run(whole, other, 6)
    assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


def test_loaded_state_is_a_copy():
    ours = weights()
    first = Adam([(ours, 0.05)], (0.5, 0.99))
    run(ours, first, 3)
    second = Adam([(ours, 0.05)], (0.5, 0.99))
    second.load_state_dict(first.state_dict())
    before = {name: value.clone() for name, value in first.state[0].items()}
    run(ours, second, 1, first=3)
    assert all(torch.equal(first.state[0][name], value) for name, value in before.items())
    assert second.state[0]["step"] == 4


def test_gradient_scaler_skips_overflows():
    ours, theirs, mine, other = pair()
    for parameters, optimiser in ((ours, mine), (theirs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for iteration in range(4):
            optimiser.zero_grad()
            overflow = 1e38 if iteration == 1 else 1.0
            scaler.scale(loss_of(parameters, 5) * overflow).backward()
            scaler.unscale_(optimiser)
            scaler.step(optimiser)
            scaler.update()
        assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert mine.state[0]["step"] == 3


def test_compiler_is_not_imported():
    code = (
        "import sys, torch\n"
        "from engine.training.run.adam import Adam\n"
        "w = torch.zeros(3, requires_grad=True)\n"
        "adam = Adam([([w], 0.1)], (0.5, 0.99))\n"
        "(w - 1).square().sum().backward()\n"
        "adam.step()\n"
        "assert w[0] > 0\n"
        "print(*(name for name in ('torch._dynamo', 'sympy') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
