"""Building a model: contents of the file, its digest, noise, margin, licences, and refusals."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from support.model_files import PROFILE, contents

from engine.archs.esrgan import RRDBNet
from engine.errors import EngineError, ModelError, UsageError
from engine.model.build import DEFAULT_MARGIN, build, read_stage, with_louder_noise
from engine.model.bundle import load
from engine.model.structure_file import write_structure


@pytest.fixture
def noisy_checkpoint(tmp_path):
    torch.manual_seed(0)
    save_file(RRDBNet(8, 1, 4, noise_channels=5).state_dict(), tmp_path / "noisy.safetensors")
    return tmp_path / "noisy.safetensors"


# Weights


def test_shared_weights_are_stored_once(tmp_path, checkpoint):
    for count in (1, 3):
        build(None, [str(checkpoint)] * count).save(tmp_path / f"{count}.safetensors")
    one, three = (tmp_path / f"{count}.safetensors" for count in (1, 3))
    assert three.stat().st_size - one.stat().st_size < 1024
    assert [stage.weights for stage in load(three).stages] == ["sr0"] * 3
    model = load(three)
    assert model.network(0) is model.network(2)


def test_equal_weights_of_two_files_are_stored_once(tmp_path, checkpoint):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    assert [stage.weights for stage in build(None, [str(checkpoint), str(copy)]).stages] == ["sr0", "sr0"]


def test_different_weights_are_stored_separately(tmp_path, checkpoint, other_checkpoint):
    model = build(None, [str(checkpoint), str(other_checkpoint), str(checkpoint)])
    model.save(tmp_path / "model.safetensors")
    assert [stage.weights for stage in model.stages] == ["sr0", "sr1", "sr0"]
    tensors = sum(tensor.nbytes for tensor in contents(checkpoint)[0].values())
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * tensors
    loaded = load(tmp_path / "model.safetensors")
    difference = loaded.network(1).conv_last.bias - loaded.network(0).conv_last.bias
    assert difference.tolist() == pytest.approx([0.25, 0, 0], abs=1e-6)


def test_digest_covers_weights_order_and_sigma(checkpoint, other_checkpoint):
    name, other = str(checkpoint), str(other_checkpoint)
    arguments = [
        ([name], []),
        ([other], []),
        ([name, name], []),
        ([name, other], []),
        ([other, name], []),
        ([name], [0.1]),
    ]
    digests = [build(None, *pair).digest for pair in arguments]
    assert len(set(digests)) == len(digests)
    assert build(None, [name], [0.1]).digest == digests[-1]
    assert build(None, [name], licence="MIT").digest == digests[0]


def test_digest_covers_step_1(tmp_path, checkpoint, small_structure):
    write_structure(small_structure, tmp_path / "a.safetensors")
    small_structure.sigmas[1] += 0.5
    write_structure(small_structure, tmp_path / "b.safetensors")
    assert len({build(tmp_path / f"{name}.safetensors", [str(checkpoint)]).digest for name in "ab"}) == 2


def test_step_1_from_a_model_or_its_own_file(tmp_path, model_file, small_structure, checkpoint):
    alone = tmp_path / "structure.safetensors"
    write_structure(small_structure, alone)
    from_model, from_file = (build(path, [str(checkpoint)]) for path in (model_file, alone))
    assert from_model.digest == from_file.digest
    with pytest.raises(ModelError, match="holds no step 1"):
        build(checkpoint, [str(checkpoint)])


def test_stages_from_a_model_by_index(tmp_path, checkpoint, other_checkpoint):
    """The last one where there are fewer; with noise, source and licence, and without a profile of other content."""
    path = tmp_path / "model.safetensors"
    whole = build(None, [str(checkpoint), str(other_checkpoint)], [0.05, 0.1], licence="CC0-1.0")
    whole.with_profiles([PROFILE] * 2).save(path)
    again = build(None, [str(path)] * 3)
    assert [s.sigma for s in again.stages] == [0.05, 0.1, 0.1]
    assert [s.source for s in again.stages] == ["net.safetensors", "other.safetensors", "other.safetensors"]
    assert {s.licence for s in again.stages} == {"CC0-1.0"}
    assert [s.profile for s in again.stages] == [None] * 3
    assert [again.weights_digest(i) for i in range(3)] == [whole.weights_digest(i) for i in (0, 1, 1)]


def test_read_stage_gives_the_origin_without_a_place_in_a_file(tmp_path, checkpoint):
    path = tmp_path / "model.safetensors"
    model = build(None, [str(checkpoint)], [0.05], licence="MIT")
    model.save(path)
    state, origin = read_stage(str(path), 3)
    assert state.keys() == model.state(0).keys()
    assert (origin.sigma, origin.licence, origin.source) == (0.05, "MIT", "net.safetensors")
    assert not hasattr(origin, "weights")
    assert read_stage(str(path), licence="BSD")[1].licence == "BSD"
    assert read_stage(str(checkpoint))[1].licence == "not stated"


# Noise, margin, licences


def test_sigma_belongs_to_its_stage(tmp_path, checkpoint):
    build(None, [str(checkpoint)] * 3, [0.0, 0.05]).save(tmp_path / "model.safetensors")
    assert [stage.sigma for stage in load(tmp_path / "model.safetensors").stages] == [0.0, 0.05, 0.0]


def test_noise_gain_scales_noise_channels_alone(tmp_path, noisy_checkpoint):
    names = [str(noisy_checkpoint)] * 2
    build(None, names, noise_gain=[1.0, 1.5]).save(tmp_path / "model.safetensors")
    model, plain = load(tmp_path / "model.safetensors"), build(None, names)
    assert [stage.noise_gain for stage in model.stages] == [1.0, 1.5]
    assert model.digest != plain.digest
    x, noise = torch.rand(1, 3, 9, 7), torch.randn(1, 5, 9, 7)
    assert torch.equal(model.network(0)(torch.cat([x, noise], 1)), plain.network(0)(torch.cat([x, noise], 1)))
    louder, expected = (
        network(torch.cat([x, gain * noise], 1)) for network, gain in ((model.network(1), 1.0), (plain.network(1), 1.5))
    )
    torch.testing.assert_close(louder, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain.network(1)(torch.cat([x, noise], 1)), atol=1e-3)


def test_noise_gains_multiply(tmp_path, noisy_checkpoint, call):
    build(None, [str(noisy_checkpoint)], noise_gain=[1.5]).save(tmp_path / "model.safetensors")
    build(None, [str(tmp_path / "model.safetensors")], noise_gain=[2.0]).save(tmp_path / "again.safetensors")
    assert load(tmp_path / "again.safetensors").stages[0].noise_gain == 3.0
    assert "5 x 3" in call(f"info {tmp_path / 'again.safetensors'}")[1]


def test_noise_gain_of_a_render_gives_the_weights_of_a_file(model_file, noisy_checkpoint):
    """The measured speed of the networks, and the model that a plan names, are those of the model as it is."""
    names = [str(model_file), str(noisy_checkpoint), str(noisy_checkpoint)]
    model = build(model_file, names).with_profiles([PROFILE] * 3)
    for gains, built in (((2.0,), [1.0, 2.0, 2.0]), ((1.0, 1.0, 0.5), [1.0, 1.0, 0.5])):
        louder, expected = with_louder_noise(model, gains), build(model_file, names, noise_gain=built)
        assert louder.digest == expected.digest
        assert [louder.weights_digest(i) for i in range(3)] == [expected.weights_digest(i) for i in range(3)]
        assert (louder.original, list(louder.noise_gain)) == (model, built)
        assert [stage.profile for stage in louder.stages] == [None] * 3
    assert with_louder_noise(model, (1.0, 1.0)) is model
    for gains, words in (
        ((2.0, 1.0, 1.0), "noise_gain='2,1,1': the network of step 2 has no noise channels; give 1 for it"),
        ((1.0, 2.0), "noise_gain='1,2': 2 factors for 3 steps; give one, or one per step"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
            with_louder_noise(model, gains)


def test_margin_is_in_the_digest_and_in_the_file(tmp_path, checkpoint, small_structure, call):
    write_structure(small_structure, tmp_path / "structure.safetensors")
    parts = (tmp_path / "structure.safetensors", [str(checkpoint)])
    models = [build(*parts, margin=margin) for margin in (None, 8, 0, 3)]
    assert [model.manifest.margin for model in models] == [DEFAULT_MARGIN, 8, 0, 3]
    assert len({model.digest for model in models}) == 3
    models[-1].save(tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").manifest.margin == 3
    assert "margin 3 px" in call(f"info {tmp_path / 'model.safetensors'}")[1]
    assert build(None, [str(checkpoint)]).manifest.margin == 0


def test_licences_name_the_photograph_and_the_weights(model_file, checkpoint, other_checkpoint, call):
    assert load(model_file).manifest.licences == ["CC0-1.0: test", "CC0-1.0: sr.safetensors"]
    assert build(None, [str(checkpoint)]).manifest.licences == ["not stated: net.safetensors"]
    two = build(None, [str(checkpoint), str(other_checkpoint)], licence="MIT")
    assert two.manifest.licences == ["MIT: net.safetensors", "MIT: other.safetensors"]
    code, out, _ = call(f"info {model_file}")
    assert code == 0
    assert "licence: CC0-1.0: test\nlicence: CC0-1.0: sr.safetensors\n" in out


# Refusals


def test_refusals_are_one_line(model_file, checkpoint):
    one, nan, inf = [str(checkpoint)], float("nan"), float("inf")
    refusals = [
        (UsageError, {"sr": []}, "sr: a model needs at least one checkpoint; give one, such as realsr"),
        (UsageError, {"sigma": [0.1, 0.2]}, "sigma: more values (2) than steps (1); give one per step"),
        (UsageError, {"noise_gain": [1.0, 1.5]}, "noise_gain: more values (2) than steps (1)"),
        *((UsageError, {"sigma": [s]}, f"sigma {s:g}: must be 0 or more") for s in (-0.1, nan, inf)),
        *((UsageError, {"noise_gain": [g]}, f"noise_gain {g:g}: must be above 0") for g in (0.0, -1.0, nan, inf)),
        (UsageError, {"noise_gain": [1.5]}, "noise_gain 1.5: the network of "),
        *((UsageError, {"margin": m}, f"margin {m}: must be 0 to 64 pixels of step 1") for m in (-1, 65)),
        (
            UsageError,
            {"margin": 8, "structure": None},
            "margin 8: must be 0 to 64 pixels of step 1, in a model that has",
        ),
    ]
    for kind, changes, message in refusals:
        with pytest.raises(EngineError) as caught:
            build(**{"structure": model_file, "sr": one, **changes})
        assert type(caught.value) is kind, changes
        assert message in str(caught.value), changes
        assert "\n" not in str(caught.value)


def test_refusals_name_flags_on_the_command_line(tmp_path, checkpoint, call):
    out = tmp_path / "model.safetensors"
    code, _, err = call(f"model build --sr {checkpoint} --noise-gain 0 --out {out}")
    assert (code, err) == (2, "engine: --noise-gain 0: must be above 0; give 1 to leave noise channels as trained\n")
    assert not out.exists()


def test_manifest_is_json_with_sorted_keys(tmp_path, checkpoint):
    """Other tools read manifests: keys and layout stay."""
    build(None, [str(checkpoint)], [0.25], licence="MIT").with_profiles([PROFILE]).save(tmp_path / "m.safetensors")
    text = contents(tmp_path / "m.safetensors")[1]["ourgan"]
    digest = json.loads(text)["digest"]
    assert text == (
        f'{{"colour": "sRGB", "digest": "{digest}", "format": "ourgan-engine/1", "margin": 0, "stages": '
        '[{"architecture": "esrgan", "licence": "MIT", "noise_gain": 1.0, "profile": {"content": "a test", "erf_abs": '
        '{"0.98": 5}, "erf_square": {"0.98": 3}, "seam": [{"halo": 0, "max": 5.0, "mean": 3.0, "p999": 4.0}, '
        '{"halo": 4, "max": 0.3, "mean": 0.1, "p999": 0.2}]}, "scale": 4, "sigma": 0.25, "source": "net.safetensors", '
        '"training": null, "weights": "sr0"}], "structure": null}'
    )
