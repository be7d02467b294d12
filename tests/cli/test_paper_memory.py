"""The paper's account of memory, from the networks themselves, and ``engine plan --theory``."""

import json

import pytest
import torch

from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.model.bundle import load
from engine.probe.paper_memory import (
    GB,
    PAPER_SUBREGION,
    LayerSize,
    NetworkSize,
    Subregion,
    account_for,
    largest_base_layer,
    largest_layer,
    parameter_count,
)


@pytest.fixture(scope="module")
def swinir():
    with torch.device("meta"):
        return SwinIR()


def test_paper_subregion():
    """Output pixels of a x4 step: 2.849 M, and 2.549 M as the paper evaluates its equation 8."""
    assert 16 * PAPER_SUBREGION.pixels == 16 * 318 * 560 == 2_849_280
    assert 16 * PAPER_SUBREGION.pixels_as_evaluated == 2_548_992
    receptive_field = Subregion(270, 512, 324)
    assert 16 * receptive_field.pixels_as_evaluated == pytest.approx(12.98e6, rel=1e-3)
    assert 16 * receptive_field.pixels == pytest.approx(17.04e6, rel=1e-3)


def test_paper_theoretical_memory(swinir):
    layer = largest_layer(swinir)
    assert layer.floats == 2048 * layer.pixels  # 64 channels in and out, 16 output pixels per input pixel
    network = NetworkSize(3, "swinir", parameter_count(swinir), layer)
    assert network.nbytes(PAPER_SUBREGION.pixels_as_evaluated) / GB == pytest.approx(1.352, abs=5e-4)
    assert network.nbytes(PAPER_SUBREGION.pixels) / GB == pytest.approx(1.506, abs=5e-4)


def test_paper_parameters(swinir):
    assert parameter_count(swinir) == 11_715_559
    assert parameter_count(BaseGenerator(Config(), scale_sizes((2160, 4096)))) == 1_996_140


def test_largest_layer_of_a_real_run(small_swinir):
    """Counted on real tensors of another size."""
    floats = {}

    def hook_for(name):
        def hook(module, inputs, output):
            floats[name] = inputs[0].numel() + output.numel()

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in small_swinir.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.LayerNorm)
    ]
    small_swinir(torch.rand(1, 3, 16, 24))
    for handle in handles:
        handle.remove()
    layer = largest_layer(small_swinir)
    assert max(floats.values()) == layer.nbytes(16 * 24) / 4 == floats[layer.name]


def test_counting_leaves_the_network_unchanged(small_swinir, small_rrdb):
    for network in (small_swinir, small_rrdb):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        largest_layer(network)
        assert not any(module._forward_hooks for module in network.modules())
        for name, tensor in network.state_dict().items():
            assert tensor.device.type == "cpu"
            torch.testing.assert_close(tensor, before[name])
        network(torch.rand(1, 3, 16, 16))


def test_a_layer_of_a_wide_trunk_is_the_largest():
    with torch.device("meta"):
        network = SwinIR(dim=1920, depths=(1,), heads=(2,), hidden=16, features=8)
    layer = largest_layer(network)
    assert layer.name.endswith("qkv")
    assert layer.floats == 4 * 1920 * layer.pixels


def test_base_layer_at_any_size(small_structure):
    layer = largest_base_layer(small_structure)
    assert layer.pixels == 24 * 32
    assert layer.floats == 2 * 8 * 24 * 32
    wide = largest_base_layer(small_structure, (24, 96))
    assert wide.floats == 3 * layer.floats


def test_account_takes_the_largest_network():
    small = NetworkSize(2, "a", 1000, LayerSize("x", 10, 1))
    large = NetworkSize(3, "b", 10, LayerSize("y", 30, 1))
    account = account_for("test", [small, large], [50, 50], 1010)
    assert (account.step, account.features, account.at_work, account.everything) == (3, 6000, 6040, 10_040)
    account = account_for("test", [small, large], [50, 5], 1010)
    assert (account.step, account.features, account.at_work) == (2, 2000, 6000)


@pytest.fixture
def engine(call, tmp_path, monkeypatch, model_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(model_file)
    return call


def test_paper_configuration_as_a_table(engine):
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


def test_account_of_a_model(engine, model_file):
    code, out, _ = engine("plan model.safetensors --theory --json")
    assert code == 0
    output = json.loads(out)
    model = load(model_file)
    shared = model.parameters("sr0")  # both stages have these weights
    assert [stage["parameters"] for stage in output["stages"]] == [shared, shared]
    assert output["parameters"] == shared + output["structure"]["parameters"]
    assert output["structure"]["parameters"] == parameter_count(model.base_generator)
    exact = output["accounts"][0]
    assert exact["everything"] - exact["features"] == 4 * output["parameters"]


@pytest.mark.parametrize("executor", ["tiles", "bands"])
def test_account_next_to_a_run(engine, tmp_path, executor):
    code, _, err = engine(
        "render model.safetensors --out out.zarr --size 256x192 --stages 2 --tile 16 --overlap 4 --report run.json "
        f"--precision fp32 --executor {executor}"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "run.json").read_text())
    code, out, err = engine("plan model.safetensors --theory --report run.json --json")
    assert code == 0, err
    output = json.loads(out)
    assert output["run"]["working_peak"] == report["measured"]["working_peak"]
    account = output["accounts"][-1]
    if executor == "tiles":
        assert output["run"]["pixels"] == [min(24, 12) * min(24, 16), 24 * 24]
    else:
        stage = report["plan"]["stages"][1]
        assert output["run"]["pixels"][1] == stage["band"] * min(24, 64)
    assert account["features"] == largest_layer(load("model.safetensors").network(1)).nbytes(account["pixels"])
    code, out, _ = engine("plan model.safetensors --theory --report run.json")
    assert f"measured in this run, by {executor} in fp32: {report['measured']['working_peak'] / GB:.3f} GB" in out


def test_refusals_are_one_line(engine, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    other = {"plan": {"stages": [], "executor": "tiles", "precision": "fp32", "model_digest": "0123456789abcdef"}}
    (tmp_path / "other.json").write_text(json.dumps({**other, "measured": {"working_peak": 1, "device_peak": 0}}))
    refusals = [
        ("plan --theory --size 64x64", 2, "only --report and --json apply"),
        ("plan --theory --out there.zarr", 2, "only --report and --json apply"),
        ("plan --theory --report empty.json", 2, "needs the model of that run"),
        ("plan model.safetensors --report empty.json", 2, "--report belongs to --theory"),
        ("plan model.safetensors --theory --report nothing.json", 4, "nothing.json: cannot be read (No such file"),
        (
            "plan model.safetensors --theory --report empty.json",
            4,
            "empty.json: not a run report (Object missing required field `plan`)",
        ),
        ("plan model.safetensors --theory --report other.json", 4, "of another model (0123456789ab, "),
        ("plan nothing.safetensors --theory", 4, "nothing.safetensors: no such file"),
    ]
    for line, code, words in refusals:
        exit_code, out, err = engine(line)
        assert (exit_code, out) == (code, ""), line
        assert words in err, err
        assert err.count("\n") == 1
