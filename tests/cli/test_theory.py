"""The paper's account of memory: its numbers from the networks themselves."""

import json

import pytest
import torch

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.model.bundle import load
from engine.probe.theory import (
    GB,
    PAPER_SUBREGION,
    Account,
    Layer,
    Network,
    Subregion,
    largest_layer,
    largest_structure_layer,
    parameters,
)


@pytest.fixture(scope="module")
def swinir():
    with torch.device("meta"):
        return SwinIR()


def test_pixels_of_the_papers_subregion():
    """Output pixels, four times as many each way: 2.849 M, and 2.549 M as the paper evaluates its equation 8."""
    assert 16 * PAPER_SUBREGION.pixels == 16 * 318 * 560 == 2_849_280
    assert 16 * PAPER_SUBREGION.pixels_as_evaluated == 2_548_992
    receptive_field = Subregion(270, 512, 324)
    assert 16 * receptive_field.pixels_as_evaluated == pytest.approx(12.98e6, rel=1e-3)
    assert 16 * receptive_field.pixels == pytest.approx(17.04e6, rel=1e-3)


def test_the_papers_theoretical_memory(swinir):
    layer = largest_layer(swinir)
    assert layer.floats == 2048 * layer.pixels  # 64 channels in and out at 16 output pixels for each input pixel
    network = Network(3, "swinir", parameters(swinir), layer)
    assert network.nbytes(PAPER_SUBREGION.pixels_as_evaluated) / GB == pytest.approx(1.352, abs=5e-4)
    assert network.nbytes(PAPER_SUBREGION.pixels) / GB == pytest.approx(1.506, abs=5e-4)


def test_parameters_of_the_papers_networks(swinir):
    assert parameters(swinir) == 11_715_559
    assert parameters(BaseGenerator(Config(), scale_sizes((2160, 4096)))) == 1_996_140


def test_the_largest_layer_is_what_a_real_run_has(small_swinir):
    """Measured once more on values instead of shapes, on another size."""
    seen = {}

    def watch(name):
        def look(module, inputs, output):
            seen[name] = inputs[0].numel() + output.numel()

        return look

    for name, module in small_swinir.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(watch(name))
    small_swinir(torch.rand(1, 3, 16, 24))
    real = dict(seen)
    layer = largest_layer(small_swinir)
    assert max(real.values()) == layer.nbytes(16 * 24) / 4 == real[layer.name]


@pytest.mark.parametrize("make", [SwinIR, RRDBNet], ids=["swinir", "rrdb"])
def test_counting_leaves_the_network_as_it_is(make, small_swinir, small_rrdb):
    network = small_swinir if make is SwinIR else small_rrdb
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    largest_layer(network)
    assert not any(module._forward_hooks for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, before[name])
    network(torch.rand(1, 3, 16, 16))


def test_a_wide_trunk_can_be_the_largest():
    """Not a rule of thumb about the last layers: features of the trunk win where it has many channels."""
    with torch.device("meta"):
        network = SwinIR(dim=1920, depths=(1,), heads=(2,), hidden=16, features=8)
    layer = largest_layer(network)
    assert layer.name.endswith("qkv")
    assert layer.floats == 4 * 1920 * layer.pixels


def test_step_one_is_counted_at_any_size(small_structure):
    layer = largest_structure_layer(small_structure)
    assert layer.pixels == 24 * 32
    assert layer.floats == 2 * 8 * 24 * 32
    wide = largest_structure_layer(small_structure, (24, 96))
    assert wide.floats == 3 * layer.floats


def test_an_account_takes_the_network_that_needs_most():
    small = Network(2, "a", 1000, Layer("x", 10, 1))
    large = Network(3, "b", 10, Layer("y", 30, 1))
    found = Account.of("test", [small, large], [50, 50], 1010)
    assert (found.step, found.features, found.at_work, found.everything) == (3, 6000, 6040, 10_040)
    found = Account.of("test", [small, large], [50, 5], 1010)
    assert (found.step, found.features, found.at_work) == (2, 2000, 6000)


@pytest.fixture
def engine(call, tmp_path, monkeypatch, model_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(model_file)
    return call


def test_the_papers_configuration_as_a_table(engine):
    code, out, _ = engine("plan --theory")
    assert code == 0
    lines = out.splitlines()
    assert any("1,996,140" in line for line in lines)
    assert sum("11,715,559" in line for line in lines) == 4
    assert "23,431,118; 35,146,677" in out
    printed, exact, evaluated = (
        next(line for line in lines if line.startswith(start)).split()
        for start in ("Table 2 of", "the paper's sub", "as the paper ev")
    )
    assert printed[-1] == "1.35"
    assert exact[-3:] == ["1.459", "1.506", "1.561"]
    assert evaluated[-3:] == ["1.305", "1.352", "1.407"]


def test_of_a_model(engine, model_file):
    code, out, _ = engine("plan model.safetensors --theory --json")
    assert code == 0
    found = json.loads(out)
    model = load(model_file)
    shared = model.parameters("sr0")  # both stages have these weights
    assert [stage["parameters"] for stage in found["stages"]] == [shared, shared]
    assert found["parameters"] == shared + found["structure"]["parameters"]
    assert found["structure"]["parameters"] == parameters(model.base_generator)
    exact = found["accounts"][0]
    assert exact["everything"] - exact["features"] == 4 * found["parameters"]


@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_a_run_beside_the_account(engine, tmp_path, executor):
    code, _, err = engine(
        "render model.safetensors --out out.zarr --size 256x192 --stages 2 --tile 16 --overlap 4 --report run.json "
        f"--executor {executor}"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "run.json").read_text())
    code, out, err = engine("plan model.safetensors --theory --report run.json --json")
    assert code == 0, err
    found = json.loads(out)
    assert found["run"]["working_peak"] == report["measured"]["working_peak"]
    account = found["accounts"][-1]
    if executor == "tiles":
        assert found["run"]["pixels"] == [min(24, 12) * min(24, 16), 24 * 24]
    else:
        stage = report["plan"]["stages"][1]
        assert found["run"]["pixels"][1] == stage["band"] * min(24, 64)
    assert account["features"] == largest_layer(load("model.safetensors").network(1)).nbytes(account["pixels"])
    code, out, _ = engine("plan model.safetensors --theory --report run.json")
    assert f"measured in this run, by {executor} in fp32: {report['measured']['working_peak'] / GB:.3f} GB" in out


def test_what_does_not_go_together_is_refused(engine, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    other = {"plan": {"stages": [], "executor": "tiles", "precision": "fp32", "model_digest": "0123456789abcdef"}}
    (tmp_path / "other.json").write_text(json.dumps({**other, "measured": {"working_peak": 1, "device_peak": 0}}))
    refusals = [
        ("plan --theory --size 64x64", 2, "only --report and --json apply"),
        ("plan --theory --out there.zarr", 2, "only --report and --json apply"),
        ("plan --theory --report empty.json", 2, "needs the model of that run"),
        ("plan model.safetensors --report empty.json", 2, "--report belongs to --theory"),
        ("plan model.safetensors --theory --report nothing.json", 4, "nothing.json: cannot be read (No such file"),
        ("plan model.safetensors --theory --report empty.json", 4, "empty.json: not a run report (KeyError('plan'))"),
        ("plan model.safetensors --theory --report other.json", 4, "of the model 0123456789ab, but"),
        ("plan nothing.safetensors --theory", 4, "nothing.safetensors: no such file"),
    ]
    for line, code, words in refusals:
        found, out, err = engine(line)
        assert (found, out) == (code, ""), line
        assert words in err, err
        assert err.count("\n") == 1
