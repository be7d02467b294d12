"""Losses against closed forms, hand-computed numbers and independent definitions; gradients by finite differences."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from engine.errors import InputError, UsageError
from engine.training.losses import SlicedWasserstein, VGG19Perceptual, discriminator_loss, find_vgg19, generator_loss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(sigma, *shape, seed=0, dtype=torch.float32):
    return 0.5 + sigma * torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def mean_absolute_sum(values):
    """E |sum of the components| of a random direction in this many dimensions."""
    logs = math.lgamma(values / 2) - math.lgamma((values + 1) / 2)
    return math.sqrt(values / math.pi) * math.exp(logs)


# The sliced Wasserstein distance


def test_equal_distributions_have_no_distance():
    x = torch.rand(3, 3, 20, 24)
    assert SlicedWasserstein()(x, x.clone(), seeded()) == 0
    assert SlicedWasserstein()(x, x.flip(0), seeded()) == 0  # pooled, the order of the pictures does not matter
    assert SlicedWasserstein(per_image=True)(x, x.clone(), seeded()) == 0
    assert SlicedWasserstein(per_image=True, phases=4)(x, x.clone(), seeded()) == 0
    assert SlicedWasserstein(per_image=True)(x, x.flip(0), seeded()) > 1e-3


@pytest.mark.parametrize("scales", [1, 2])
def test_two_constants(scales):
    """All patches are equal, so a direction's distance is the difference times the sum of its components."""
    loss = SlicedWasserstein(patch=4, projections=20_000, scales=scales)
    a, b = torch.full((1, 3, 8, 8), 0.7), torch.full((2, 3, 9, 8), 0.4)
    assert loss(a, b, seeded()).item() == pytest.approx(0.3 * mean_absolute_sum(48), rel=0.02)


@pytest.mark.parametrize("remove_mean", [False, True])
def test_noise_of_two_strengths(remove_mean):
    """A projection of white noise is normal with its sigma, and E |normal| is sqrt(2 / pi); halving halves the sigma."""
    a, b = noise(0.10, 4, 3, 96, 96, seed=1), noise(0.04, 4, 3, 96, 96, seed=2)
    expected = (0.10 - 0.04) * math.sqrt(2 / math.pi)
    one = SlicedWasserstein(scales=1, remove_mean=remove_mean)(a, b, seeded())
    two = SlicedWasserstein(scales=2, remove_mean=remove_mean)(a, b, seeded())
    assert one.item() == pytest.approx(expected, rel=0.03)
    assert two.item() == pytest.approx(expected * (1 + 1 / 2) / 2, rel=0.03)


def test_a_grid_has_the_patches_of_its_shifts_together_and_not_at_one_phase():
    pattern = torch.rand(1, 3, 4, 4, generator=seeded())
    shifts = [pattern.roll((y, x), (2, 3)) for y in range(4) for x in range(4)]
    grid, real = (torch.cat(tiles).tile(1, 1, 8, 8)[:, :, :30, :30] for tiles in ([pattern] * 16, shifts))
    assert SlicedWasserstein(scales=1)(grid, real, seeded()) < 1e-6
    assert SlicedWasserstein(scales=1, phases=4)(grid, real, seeded()) > 0.05
    assert SlicedWasserstein(scales=1, phases=4)(real, real, seeded()) == 0


@pytest.mark.parametrize("size", [7, 9, 14])
def test_a_phase_never_leaves_too_little_for_a_patch(size):
    x = torch.rand(2, 3, size, size)
    assert SlicedWasserstein(scales=1, phases=4, per_image=True)(x, x.flip(0), seeded()) > 0


def test_without_the_mean_only_texture_counts():
    x = noise(0.1, 1, 3, 40, 40)
    tinted = x + torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    assert SlicedWasserstein()(x, tinted, seeded()) > 0.02
    assert SlicedWasserstein(remove_mean=True)(x, tinted, seeded()) < 1e-6
    assert SlicedWasserstein(remove_mean=True)(x, 0.5 * (x - 0.5) + 0.5, seeded()) > 0.02


@pytest.mark.parametrize("per_image", [False, True])
def test_against_unfolded_patches(per_image):
    """The same directions, applied to patches that are cut out one by one."""
    fake, real = torch.rand(2, 3, 9, 11), torch.rand(2, 3, 9, 11)
    loss = SlicedWasserstein(patch=3, projections=5, scales=1, per_image=per_image)(fake, real, seeded(4))
    directions = torch.randn(5, 3, 3, 3, generator=seeded(4)).flatten(1).double().numpy()
    directions /= np.sqrt((directions**2).sum(1, keepdims=True))

    def patches(x):
        x = x.double().numpy()
        return [[x[n, :, i : i + 3, j : j + 3].ravel() for i in range(7) for j in range(9)] for n in range(2)]

    def distance(a, b):
        a, b = np.sort(np.array(a) @ directions.T, axis=0), np.sort(np.array(b) @ directions.T, axis=0)
        return np.abs(a - b).mean()

    a, b = patches(fake), patches(real)
    expected = (distance(a[0], b[0]) + distance(a[1], b[1])) / 2 if per_image else distance(sum(a, []), sum(b, []))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_different_numbers_of_patches():
    """Two even ramps are one distribution, however many steps they have; one that is moved is as far as it is moved."""
    loss = SlicedWasserstein(patch=1, projections=2000, scales=1)

    def ramp(height, width):
        steps = (torch.arange(height * width) + 0.5) / (height * width)
        return steps.view(1, 1, height, width).expand(1, 3, -1, -1)

    coarse, fine = ramp(20, 30), ramp(40, 50)
    assert loss(coarse, fine, seeded()) < 1e-5
    assert loss(fine, coarse, seeded()) < 1e-5
    for a, b in ((coarse, fine + 0.1), (fine, coarse - 0.1)):
        assert loss(a, b, seeded()).item() == pytest.approx(0.1 * mean_absolute_sum(3), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"per_image": True}, {"remove_mean": True}])
@pytest.mark.parametrize("size", [(9, 8), (7, 11)])
def test_gradient_of_the_distance(options, size):
    loss = SlicedWasserstein(patch=3, projections=4, **options)
    fake = noise(0.2, 2, 3, 9, 8, seed=1, dtype=torch.float64).requires_grad_()
    real = noise(0.1, 2, 3, *size, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, real, seeded()), (fake,), eps=1e-7)


def test_directions_come_from_the_generator():
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    loss, generator = SlicedWasserstein(), seeded(3)
    before = torch.random.get_rng_state()
    first, second = loss(a, b, generator), loss(a, b, generator)
    assert first != second
    assert loss(a, b, seeded(3)) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_autocast_does_not_reach_the_distance():
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    plain = SlicedWasserstein()(a, b, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert SlicedWasserstein()(a, b, seeded()) == plain
        assert SlicedWasserstein()(a.bfloat16(), b, seeded()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "fake", "real", "message"),
    [
        ({}, (1, 3, 14, 13), (1, 3, 14, 14), "fake is 14 x 13 pixels.*at least 14 x 14"),
        ({"scales": 3}, (1, 3, 32, 32), (1, 3, 32, 27), "real is 32 x 27 pixels.*at least 28 x 28"),
        ({"per_image": True}, (2, 3, 16, 16), (3, 3, 16, 16), "2 pictures cannot be compared one by one with 3"),
        ({}, (1, 1, 16, 16), (1, 3, 16, 16), r"fake has the shape \(1, 1, 16, 16\)"),
        ({}, (1, 3, 16, 16), (3, 16, 16), r"real has the shape \(3, 16, 16\)"),
        ({}, (0, 3, 16, 16), (1, 3, 16, 16), r"fake has the shape \(0, 3, 16, 16\)"),
        ({"patch": 0}, (1, 3, 16, 16), (1, 3, 16, 16), "patch = 0: at least 1"),
        ({"patch": 1, "remove_mean": True}, (1, 3, 16, 16), (1, 3, 16, 16), "patch = 1: at least 2"),
        ({"scales": 0}, (1, 3, 16, 16), (1, 3, 16, 16), "scales = 0"),
        ({"projections": 0}, (1, 3, 16, 16), (1, 3, 16, 16), "projections = 0"),
    ],
)
def test_distance_refuses(options, fake, real, message):
    with pytest.raises(UsageError, match=message) as error:
        SlicedWasserstein(**options)(torch.zeros(fake), torch.zeros(real), seeded())
    assert "\n" not in str(error.value)


# VGG19

CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]  # torchvision's numbers
BEFORE_POOLING = [2, 7, 16, 25]
WIDTHS = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8


@pytest.fixture(scope="module")
def state():
    """VGG19's convolutions, random, under torchvision's names."""
    generator, inputs, tensors = seeded(), 3, {}
    for index, width in zip(CONVOLUTIONS, WIDTHS, strict=True):
        gain = math.sqrt(2 / (9 * inputs))
        tensors[f"features.{index}.weight"] = gain * torch.randn(width, inputs, 3, 3, generator=generator)
        tensors[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        inputs = width
    return tensors


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg19-random.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(4, 4)}, path)
    return path


def features(state, x):
    """The convolutions' outputs before their ReLU, by torchvision's number."""
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    found = {}
    for index in CONVOLUTIONS:
        x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        found[index] = x
        x = x.relu()
        if index in BEFORE_POOLING:
            x = F.max_pool2d(x, 2)
    return found


@pytest.mark.parametrize(("layers", "wanted"), [("esrgan", {34: 1}), ("swinir", {2: 0.1, 7: 0.1, 16: 1, 25: 1, 34: 1})])
def test_perceptual_loss(weights, state, layers, wanted):
    loss = VGG19Perceptual(weights, layers)
    fake, real = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    ours, theirs = features(state, fake), features(state, real)
    expected = sum(weight * (ours[index] - theirs[index]).abs().mean() for index, weight in wanted.items())
    assert loss(fake, real).item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss(fake, fake) == 0


def test_perceptual_loss_is_frozen_and_leads_to_the_picture(weights):
    loss = VGG19Perceptual(weights, "esrgan")
    fake, real = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16, requires_grad=True)
    value = loss(fake, real)
    value.backward()
    assert real.grad is None
    assert not any(p.requires_grad for p in loss.parameters())
    with torch.no_grad():
        assert loss(fake - 0.05 * fake.grad / fake.grad.abs().max(), real) < value


def test_half_precision_safetensors_are_read(state, tmp_path):
    path = tmp_path / "vgg19.safetensors"
    save_file({key: value.half() for key, value in state.items()}, path)
    loss = VGG19Perceptual(find_vgg19(path), "esrgan")
    assert loss(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).dtype == torch.float32
    torch.testing.assert_close(loss.features[34].bias.data, state["features.34.bias"].half().float())


def test_weights_are_found_in_the_hub_folder(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_vgg19(None) is None
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg19_bn-c79401a0.pth").touch()
    (folder / "vgg16-397923af.pth").touch()
    assert find_vgg19(None) is None
    (folder / "vgg19-dcbb9e9d.pth").symlink_to(weights)
    assert find_vgg19(None) == folder / "vgg19-dcbb9e9d.pth"
    assert find_vgg19(weights) == weights


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "features.16.weight"), "not VGG19: it has no features.16.weight"),  # VGG16 pools there
        (lambda s: s | {"features.0.weight": torch.zeros(64, 3, 5, 5)}, r"features.0.weight.*\(64, 3, 5, 5\)"),
        (lambda s: s | {"features.37.weight": torch.zeros(1)}, "not VGG19, which has no features.37.weight"),
    ],
)
def test_other_networks_are_refused(state, tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    # Only the names and shapes matter here, so the file need not hold 80 MB.
    save_file(change({key: value[:1].expand_as(value).half().contiguous() for key, value in state.items()}), path)
    for use in (find_vgg19, lambda path: VGG19Perceptual(path, "esrgan")):
        with pytest.raises(InputError, match=message) as error:
            use(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path, weights):
    with pytest.raises(InputError, match="no such file"):
        find_vgg19(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="damaged"):
        find_vgg19(tmp_path / "text.pth")
    with pytest.raises(UsageError, match="'alexnet'; there are esrgan, swinir"):
        VGG19Perceptual(weights, "alexnet")
    loss = VGG19Perceptual(weights, "esrgan")
    for a, b in (((1, 3, 16, 16), (2, 3, 16, 16)), ((1, 3, 12, 16), (1, 3, 12, 16))):
        with pytest.raises(UsageError, match="at least 16 x 16"):
            loss(torch.zeros(a), torch.zeros(b))


# Adversarial losses

REAL, FAKE = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [-1.0]])


@pytest.mark.parametrize(
    ("kind", "discriminator", "generator"),
    [
        # With s(x) = log(1 + exp x): s(-1.5), s(-3.5) | s(-2), s(-3); and s(1.5), s(3.5) | s(2), s(3).
        ("ragan", 0.101669, 2.601669),
        ("vanilla", 0.180924 + 0.503204, 1.003204),  # s(-1), s(-3) | s(0), s(-1); and s(0), s(1)
        ("hinge", 0.0 + 0.5, 0.5),  # max(0, 0), max(0, -2) | max(0, 1), max(0, 0); and -(0 - 1) / 2
    ],
)
def test_adversarial_losses_by_hand(kind, discriminator, generator):
    assert discriminator_loss(kind, REAL, FAKE).item() == pytest.approx(discriminator, abs=2e-6)
    assert generator_loss(kind, REAL, FAKE).item() == pytest.approx(generator, abs=2e-6)


@pytest.mark.parametrize("kind", ["ragan", "vanilla", "hinge"])
def test_gradients_of_adversarial_losses(kind):
    real = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(kind, r, f), (real, fake))
    assert torch.autograd.gradcheck(lambda r, f: generator_loss(kind, r, f), (real, fake))


@pytest.mark.parametrize("kind", ["ragan", "vanilla", "hinge"])
def test_adversarial_losses_pull_in_the_right_direction(kind):
    """The discriminator wants the real ones up and the fakes down, the generator the fakes up; large scores are safe."""
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    discriminator_loss(kind, real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake = torch.zeros(2, requires_grad=True)
    generator_loss(kind, real.detach(), fake).backward()
    assert (fake.grad < 0).all()
    assert discriminator_loss(kind, torch.full((2,), -1e4), torch.full((2,), 1e4)).isfinite()


def test_scores_in_half_precision_are_compared_in_full():
    real, fake = torch.full((4,), 300.0).bfloat16(), torch.full((4,), 299.0).bfloat16()
    loss = discriminator_loss("ragan", real, fake)
    assert loss.dtype == torch.float32
    gap = real[0].item() - fake[0].item()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-5)


def test_adversarial_losses_refuse():
    with pytest.raises(UsageError, match="'wgan'; there are ragan, vanilla, hinge"):
        discriminator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match="'wgan'"):
        generator_loss("wgan", REAL, FAKE)
    with pytest.raises(UsageError, match="scores of real crops"):
        generator_loss("ragan", None, FAKE)
    assert generator_loss("hinge", None, FAKE) == 0.5
