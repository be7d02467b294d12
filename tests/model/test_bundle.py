"""The model file: what is stored once, what the digest covers, and that every damaged file is refused in one line."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import engine
from engine.cli.app import main
from engine.errors import ModelError, UsageError
from engine.model.bundle import MARGIN, build, load
from engine.model.structure_file import write_structure
from engine.plan.measured import SeamPoint, StageProfile
from engine.probe.profiles import profiles_of, remember

PROFILE = StageProfile("a test", {"0.98": 5}, {"0.98": 3}, (SeamPoint(0, 3.0, 4.0, 5.0), SeamPoint(4, 0.1, 0.2, 0.3)))


@pytest.fixture
def checkpoint(tmp_path, small_rrdb):
    save_file(small_rrdb.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def other_checkpoint(tmp_path, small_rrdb):
    """The same network but for one weight."""
    state = {name: tensor.clone() for name, tensor in small_rrdb.state_dict().items()}
    state["conv_last.bias"][0] += 0.25
    save_file(state, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def contents(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def rewritten(path, to, change):
    """A copy whose tensors and manifest ``change(tensors, manifest)`` has altered."""
    tensors, metadata = contents(path)
    manifest = json.loads(metadata["ourgan"])
    change(tensors, manifest)
    save_file(tensors, to, {**metadata, "ourgan": json.dumps(manifest)})
    return to


def refusal(path, capsys, *command):
    """What the command line says of the file; it is one line and exit code 4."""
    with pytest.raises(SystemExit) as caught:
        main([*(command or ("info",)), str(path)])
    said = capsys.readouterr()
    assert caught.value.code == 4
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("engine: ")
    return line


def test_weights_that_stages_share_are_stored_once(tmp_path, checkpoint):
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


def test_different_weights_are_stored_each(tmp_path, checkpoint, other_checkpoint):
    model = build(None, [str(checkpoint), str(other_checkpoint), str(checkpoint)])
    model.save(tmp_path / "model.safetensors")
    assert [stage.weights for stage in model.stages] == ["sr0", "sr1", "sr0"]
    tensors = sum(tensor.nbytes for tensor in contents(checkpoint)[0].values())
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * tensors
    loaded = load(tmp_path / "model.safetensors")
    difference = loaded.network(1).conv_last.bias - loaded.network(0).conv_last.bias
    assert difference.tolist() == pytest.approx([0.25, 0, 0], abs=1e-6)


def test_what_is_loaded_is_what_was_built(tmp_path, model_file, small_structure):
    model = load(model_file)
    model.save(tmp_path / "again.safetensors")
    again = load(tmp_path / "again.safetensors")
    assert again.manifest == model.manifest
    assert again.base_size == small_structure.base_size == (24, 32)
    x = torch.rand(1, 3, 9, 7)
    assert torch.equal(again.network(1)(x), model.network(1)(x))
    assert not list(tmp_path.glob("*.part"))


def test_profiles_travel_with_the_file_and_leave_the_digest_alone(tmp_path, model_file):
    model = load(model_file)
    assert [stage.profile for stage in model.stages] == [None, None]
    model.with_profiles([PROFILE, None]).save(tmp_path / "measured.safetensors")
    measured = load(tmp_path / "measured.safetensors")
    assert [stage.profile for stage in measured.stages] == [PROFILE, None]
    assert measured.digest == model.digest


def test_profiles_of_a_file_are_taken_before_the_cache(tmp_path, model_file):
    model = load(model_file)
    cached = StageProfile("cached", {}, {}, PROFILE.seam)
    remember(model, [cached, cached])
    assert profiles_of(model) == [cached, cached]
    assert profiles_of(model.with_profiles([PROFILE, PROFILE])) == [PROFILE, PROFILE]


def test_every_weight_and_what_else_decides_pixels_is_in_the_digest(checkpoint, other_checkpoint):
    name, other = str(checkpoint), str(other_checkpoint)
    builds = [
        ([name], []),
        ([other], []),
        ([name, name], []),
        ([name, other], []),
        ([other, name], []),
        ([name], [0.1]),
    ]
    digests = [build(None, names, sigmas).digest for names, sigmas in builds]
    assert len(set(digests)) == len(digests)
    assert build(None, [name], [0.1]).digest == digests[-1]
    assert build(None, [name], licence="MIT").digest == digests[0]


def test_the_structure_is_in_the_digest(tmp_path, checkpoint, small_structure):
    write_structure(small_structure, tmp_path / "a.safetensors")
    small_structure.sigmas[1] += 0.5
    write_structure(small_structure, tmp_path / "b.safetensors")
    digests = {
        build(path, [str(checkpoint)]).digest for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    }
    assert len(digests) == 2


def test_the_margin_is_in_the_digest_and_in_the_file(tmp_path, checkpoint, small_structure, call):
    write_structure(small_structure, tmp_path / "structure.safetensors")
    parts = (tmp_path / "structure.safetensors", [str(checkpoint)])
    models = [build(*parts, margin=margin) for margin in (None, 8, 0, 3)]
    assert [model.manifest.margin for model in models] == [MARGIN, 8, 0, 3]
    assert len({model.digest for model in models}) == 3
    models[-1].save(tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").manifest.margin == 3
    assert "margin 3 px" in call(f"info {tmp_path / 'model.safetensors'}")[1]
    assert build(None, [str(checkpoint)]).manifest.margin == 0


def test_a_file_that_knows_of_no_margin_has_none(tmp_path, model_file):
    """And keeps the digest that it was written with."""
    old = rewritten(model_file, tmp_path / "old.safetensors", lambda tensors, manifest: manifest.pop("margin"))
    assert load(old).manifest == load(model_file).manifest


@pytest.mark.parametrize("gain", ["1.5", None, float("nan"), 0.0])
def test_a_damaged_noise_gain_is_refused(tmp_path, model_file, capsys, gain):
    def change(_, manifest):
        manifest["stages"][0]["noise_gain"] = gain

    assert "damaged manifest" in refusal(rewritten(model_file, tmp_path / "m.safetensors", change), capsys)


@pytest.mark.parametrize("margin", [-1, 65])
def test_an_absurd_margin_is_refused(model_file, checkpoint, margin):
    with pytest.raises(UsageError, match=f"--margin {margin}: must be 0 to 64 pixels of step 1"):
        build(model_file, [str(checkpoint)], margin=margin)
    with pytest.raises(UsageError, match="--margin 8: must be 0 to 64 pixels of step 1, which a model with one has"):
        build(None, [str(checkpoint)], margin=8)


@pytest.mark.parametrize("margin", [-1, "8", 8.0, None])
def test_a_damaged_margin_is_refused(tmp_path, model_file, capsys, margin):
    damaged = rewritten(model_file, tmp_path / "m.safetensors", lambda _, manifest: manifest.update(margin=margin))
    assert "damaged manifest" in refusal(damaged, capsys)


def test_sigma_belongs_to_its_stage(tmp_path, checkpoint):
    build(None, [str(checkpoint)] * 3, [0.0, 0.05]).save(tmp_path / "model.safetensors")
    assert [stage.sigma for stage in load(tmp_path / "model.safetensors").stages] == [0.0, 0.05, 0.0]


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_a_sigma_that_is_no_deviation_is_refused(checkpoint, sigma):
    with pytest.raises(UsageError, match=f"sigma {sigma:g}: must be 0 or more"):
        build(None, [str(checkpoint)], [sigma])


def test_a_model_of_no_stages_or_of_too_many_sigmas_is_refused(checkpoint):
    with pytest.raises(ModelError, match="--sr"):
        build(None, [])
    with pytest.raises(ModelError, match="2 values of sigma for 1 stages"):
        build(None, [str(checkpoint)], [0.1, 0.2])


def test_licences_name_the_photograph_and_the_weights(tmp_path, model_file, checkpoint, other_checkpoint):
    assert load(model_file).manifest.licences == ["CC0-1.0: test", "CC0-1.0: sr.safetensors"]
    assert build(None, [str(checkpoint)]).manifest.licences == ["not stated: net.safetensors"]
    two = build(None, [str(checkpoint), str(other_checkpoint)], licence="MIT")
    assert two.manifest.licences == ["MIT: net.safetensors", "MIT: other.safetensors"]


def test_info_prints_the_licences(model_file, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["info", str(model_file)])
    assert caught.value.code == 0
    assert "licence: CC0-1.0: test\nlicence: CC0-1.0: sr.safetensors\n" in capsys.readouterr().out


def test_each_precision_has_a_network_of_its_own(model_file):
    """Casting is in place: a render in bf16 must not change what a later one in fp32 runs."""
    model = load(model_file)
    model.network(0, "bf16").to_mixed(torch.bfloat16)
    assert {parameter.dtype for parameter in model.network(0).parameters()} == {torch.float32}
    assert model.network(0, "bf16") is model.network(1, "bf16")


# Bare checkpoints


@pytest.mark.parametrize("kind", ["safetensors", "pth", "params_ema"])
def test_a_bare_checkpoint_is_a_model_of_one_stage(tmp_path, small_rrdb, checkpoint, kind):
    path = checkpoint if kind == "safetensors" else tmp_path / "net.pth"
    if kind == "pth":
        torch.save(small_rrdb.state_dict(), path)
    if kind == "params_ema":
        raw = {name: torch.zeros_like(tensor) for name, tensor in small_rrdb.state_dict().items()}
        torch.save({"params": raw, "params_ema": small_rrdb.state_dict()}, path)
    model = load(path)
    assert model.base_generator is None
    assert model.base_size is None
    (stage,) = model.stages
    assert (stage.architecture, stage.scale, stage.sigma, stage.licence) == ("esrgan", 4, 0.0, "not stated")
    assert stage.source == path.name
    x = torch.rand(1, 3, 9, 7)
    assert torch.equal(model.network(0)(x), small_rrdb(x))
    assert model.digest == load(checkpoint).digest


def test_a_window_network_keeps_its_alignment(swin_model_file, small_swinir):
    model = load(swin_model_file)
    assert {stage.architecture for stage in model.stages} == {"swinir"}
    assert model.network(0).align == small_swinir.align == 8


class RunsCode:
    """Pickles to a call, as an attacker's file does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_asks_to_run_code_is_refused_and_runs_none(tmp_path, capsys):
    torch.save({"params": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pth")
    line = refusal(tmp_path / "evil.pth", capsys)
    assert "would run code" in line
    assert "safetensors" in line
    assert not (tmp_path / "ran").exists()


# Damaged files


def cut(share):
    def damage(source, path):
        content = source.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def flip_last_byte(source, path):
    """The least significant bits of one weight: only the digest sees it."""
    content = bytearray(source.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def with_change(change):
    return lambda source, path: rewritten(source, path, change)


def pop_tensor(tensors, _):
    del tensors["sr0.conv_hr.bias"]


def pop_stage(tensors, _):
    for key in [key for key in tensors if key.startswith("sr0.")]:
        del tensors[key]


def pop_structure_tensor(tensors, _):
    del tensors["structure.decoder.tail.weight"]


def misshape(tensors, _):
    tensors["sr0.conv_hr.weight"] = tensors["sr0.conv_hr.weight"][:-1]


def poison(tensors, _):
    tensors["sr0.conv_hr.weight"][0, 0, 0, 0] = torch.nan


def poison_structure(tensors, _):
    tensors["structure.decoder.tail.weight"].view(-1)[3] = torch.inf


def rename_all(tensors, _):
    for key in [key for key in tensors if key.startswith("sr0.")]:
        tensors[key.replace("sr0.", "sr0.layer_of_")] = tensors.pop(key)


def add_tensor(tensors, _):
    tensors["sr0.attention.weight"] = torch.zeros(3)


def exchange(tensors, _):
    name, other = "sr0.body.0.rdb1.conv1.weight", "sr0.body.1.rdb1.conv1.weight"
    tensors[name], tensors[other] = tensors[other], tensors[name]


DAMAGED = {
    "empty": (lambda source, path: path.write_bytes(b""), "damaged"),
    "garbage": (lambda source, path: path.write_bytes(bytes(range(256)) * 30), "damaged"),
    "a text": (lambda source, path: path.write_text("not a model\n" * 99), "damaged"),
    "cut in the header": (cut(0.01), "damaged"),
    "cut in the middle": (cut(0.5), "damaged"),
    "cut at the end": (cut(0.9999), "damaged"),
    "one bit": (flip_last_byte, "do not match the manifest"),
    "tensor missing": (with_change(pop_tensor), r"1 tensor \(conv_hr.bias\) missing"),
    "stage missing": (with_change(pop_stage), "no tensors for sr0"),
    "structure tensor missing": (with_change(pop_structure_tensor), "tensor decoder.tail.weight is missing"),
    "misshapen": (with_change(misshape), r"misshapen; conv_hr.weight is \[15, 16, 3, 3\], expected \[16, 16, 3, 3\]"),
    "NaN": (with_change(poison), "conv_hr.weight holds 1 NaN"),
    "infinity in the structure": (with_change(poison_structure), "decoder.tail.weight holds NaN or infinity"),
    "unknown architecture": (with_change(rename_all), "unknown architecture"),
    "unknown tensor": (with_change(add_tensor), "attention.weight"),
    "tensors exchanged": (with_change(exchange), "do not match the manifest"),
    "sigma altered": (with_change(lambda _, m: m["stages"][0].update(sigma=0.5)), "do not match the manifest"),
    "structure altered": (with_change(lambda _, m: m["structure"].update(L=0)), "do not match the manifest"),
    "other format": (with_change(lambda _, m: m.update(format="ourgan-engine/99")), "not format ourgan-engine/1"),
    "manifest without stages": (with_change(lambda _, m: m.pop("stages")), "damaged manifest"),
    "manifest with more": (with_change(lambda _, m: m.update(colours=3)), "damaged manifest"),
    "digest of a wrong type": (with_change(lambda _, m: m.update(digest=3)), "damaged manifest"),
    "weights of a wrong type": (with_change(lambda _, m: m["stages"][0].update(weights=[])), "damaged manifest"),
    "structure of a wrong type": (with_change(lambda _, m: m.update(structure="yes")), "damaged manifest"),
    "stage of a wrong type": (with_change(lambda _, m: m.update(stages=["sr0"])), "damaged manifest"),
    "profile of a wrong type": (
        with_change(lambda _, m: m["stages"][0].update(profile={"seam": 3})),
        "damaged manifest",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path, model_file, capsys, damage):
    path = tmp_path / "damaged.safetensors"
    inflict, reason = DAMAGED[damage]
    inflict(model_file, path)
    with pytest.raises(ModelError, match=reason) as caught:
        load(path)
    assert refusal(path, capsys) == f"engine: {caught.value}"
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format": "ourgan-engine/1"}', '"text"'])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, model_file, capsys, text):
    tensors, metadata = contents(model_file)
    save_file(tensors, tmp_path / "model.safetensors", {**metadata, "ourgan": text})
    assert "damaged manifest" in refusal(tmp_path / "model.safetensors", capsys)


def test_a_profile_of_wrong_types_is_refused(tmp_path, model_file):
    """Profiles are not in the digest, so their types are checked one by one."""
    model = load(model_file).with_profiles([PROFILE, PROFILE])
    model.save(tmp_path / "measured.safetensors")
    for key, value in [("seam", 3), ("seam", [{"halo": 0}]), ("erf_abs", [1]), ("erf_square", {"0.9": None})]:
        path = rewritten(
            tmp_path / "measured.safetensors",
            tmp_path / "damaged.safetensors",
            lambda _, m, key=key, value=value: m["stages"][1]["profile"].update({key: value}),
        )
        with pytest.raises(ModelError, match="damaged manifest"):
            load(path)


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth", "folder.safetensors", "picture.png", "absent"])
@pytest.mark.parametrize("command", [("info",), ("plan",), ("render", "--out", "out.zarr"), ("probe",)], ids=" ".join)
def test_what_is_no_file_of_a_model_is_refused(tmp_path, monkeypatch, capsys, name, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert name in refusal(name, capsys, *command)


def test_step_1_alone_is_refused_with_what_makes_a_model_of_it(tmp_path, small_structure):
    write_structure(small_structure, tmp_path / "structure.safetensors")
    with pytest.raises(ModelError, match="step 1 alone; engine model build --structure structure.safetensors --sr"):
        load(tmp_path / "structure.safetensors")


@pytest.mark.parametrize("out", ["file/model.safetensors", "/proc/model.safetensors"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys, checkpoint, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    line = refusal(out, capsys, "model", "build", "--sr", str(checkpoint), "--out")
    assert f"{out}: cannot be written" in line


def test_a_file_in_the_way_is_kept_until_the_new_one_is_whole(tmp_path, monkeypatch, model_file):
    path = tmp_path / "model.safetensors"
    path.write_text("the old one")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.io.tensors.save_file", fail)
    with pytest.raises(engine.errors.InputError, match="No space left"):
        load(model_file).save(path)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_step_1_is_taken_from_a_model_as_from_its_own_file(tmp_path, model_file, small_structure, checkpoint):
    alone = tmp_path / "structure.safetensors"
    write_structure(small_structure, alone)
    taken, own = (build(path, [str(checkpoint)]) for path in (model_file, alone))
    assert taken.digest == own.digest
    with pytest.raises(ModelError, match="holds no step 1"):
        build(checkpoint, [str(checkpoint)])


def test_a_stage_is_taken_from_a_model_by_its_place(tmp_path, checkpoint, other_checkpoint):
    """The last one where there are fewer; with its noise, source and licence, and without a profile of other content."""
    path = tmp_path / "model.safetensors"
    whole = build(None, [str(checkpoint), str(other_checkpoint)], [0.05, 0.1], licence="CC0-1.0")
    whole.with_profiles([PROFILE] * 2).save(path)
    again = build(None, [str(path)] * 3)
    assert [s.sigma for s in again.stages] == [0.05, 0.1, 0.1]
    assert [s.source for s in again.stages] == ["net.safetensors", "other.safetensors", "other.safetensors"]
    assert {s.licence for s in again.stages} == {"CC0-1.0"}
    assert [s.profile for s in again.stages] == [None] * 3
    assert [again.weights_digest(i) for i in range(3)] == [whole.weights_digest(i) for i in (0, 1, 1)]


def test_others_may_read_a_model(tmp_path, checkpoint):
    """As any file: by the umask."""
    mask = os.umask(0o027)
    try:
        build(None, [str(checkpoint)]).save(tmp_path / "model.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
