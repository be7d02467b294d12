"""Model files: round trips, bare checkpoints, networks, and refusal of every damaged file in one line."""

import os

import pytest
import torch
from safetensors.torch import save_file
from support.model_files import PROFILE, contents, rewritten

import engine
from engine.cli.app import main
from engine.errors import ModelError, printable
from engine.model.build import build
from engine.model.bundle import load
from engine.model.structure_file import write_structure
from engine.plan.measured import StageProfile
from engine.probe.profiles import known_profiles, remember


def refusal(path, capsys, *command):
    """The command line's message about a file: one line, with exit code 4."""
    with pytest.raises(SystemExit) as caught:
        main([*(command or ("info",)), str(path)])
    output = capsys.readouterr()
    assert caught.value.code == 4
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("engine: ")
    return line


def test_round_trip(tmp_path, model_file, small_structure):
    model = load(model_file)
    model.save(tmp_path / "again.safetensors")
    again = load(tmp_path / "again.safetensors")
    assert again.manifest == model.manifest
    assert again.base_size == small_structure.base_size == (24, 32)
    x = torch.rand(1, 3, 9, 7)
    assert torch.equal(again.network(1)(x), model.network(1)(x))
    assert not list(tmp_path.glob("*.part"))


def test_profiles_are_stored_outside_the_digest(tmp_path, model_file):
    model = load(model_file)
    assert [stage.profile for stage in model.stages] == [None, None]
    model.with_profiles([PROFILE, None]).save(tmp_path / "measured.safetensors")
    measured = load(tmp_path / "measured.safetensors")
    assert [stage.profile for stage in measured.stages] == [PROFILE, None]
    assert measured.digest == model.digest


def test_profiles_of_a_file_come_before_the_cache(model_file):
    model = load(model_file)
    cached = StageProfile("cached", {}, {}, PROFILE.seam)
    remember(model, [cached, cached])
    assert known_profiles(model) == [cached, cached]
    assert known_profiles(model.with_profiles([PROFILE, PROFILE])) == [PROFILE, PROFILE]


def test_a_file_older_than_the_margin_has_none(tmp_path, model_file):
    """It keeps the digest that it was written with."""
    old = rewritten(model_file, tmp_path / "old.safetensors", lambda tensors, manifest: manifest.pop("margin"))
    assert load(old).manifest == load(model_file).manifest


def test_a_new_network_belongs_to_its_caller(model_file):
    model = load(model_file)
    fresh = model.new_network(0)
    assert fresh is not model.new_network(0)
    fresh.to_mixed(torch.bfloat16)
    assert {parameter.dtype for parameter in model.new_network(0).parameters()} == {torch.float32}


def test_files_follow_the_umask(tmp_path, checkpoint):
    mask = os.umask(0o027)
    try:
        build(None, [str(checkpoint)]).save(tmp_path / "model.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


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


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
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


def change_tensors(change):
    return lambda source, path: rewritten(source, path, lambda tensors, _: change(tensors))


def change_manifest(**fields):
    return lambda source, path: rewritten(source, path, lambda _, manifest: manifest.update(fields))


def change_stage(**fields):
    return lambda source, path: rewritten(source, path, lambda _, manifest: manifest["stages"][0].update(fields))


def pop_tensor(tensors):
    del tensors["sr0.conv_hr.bias"]


def pop_stage(tensors):
    for key in [key for key in tensors if key.startswith("sr0.")]:
        del tensors[key]


def pop_structure_tensor(tensors):
    del tensors["structure.decoder.tail.weight"]


def misshape(tensors):
    tensors["sr0.conv_hr.weight"] = tensors["sr0.conv_hr.weight"][:-1]


def poison(tensors):
    tensors["sr0.conv_hr.weight"][0, 0, 0, 0] = torch.nan


def poison_structure(tensors):
    tensors["structure.decoder.tail.weight"].view(-1)[3] = torch.inf


def rename_all(tensors):
    for key in [key for key in tensors if key.startswith("sr0.")]:
        tensors[key.replace("sr0.", "sr0.layer_of_")] = tensors.pop(key)


def add_tensor(tensors):
    tensors["sr0.attention.weight"] = torch.zeros(3)


def exchange(tensors):
    name, other = "sr0.body.0.rdb1.conv1.weight", "sr0.body.1.rdb1.conv1.weight"
    tensors[name], tensors[other] = tensors[other], tensors[name]


def pop_stages(source, path):
    rewritten(source, path, lambda _, manifest: manifest.pop("stages"))


def pop_format(source, path):
    rewritten(source, path, lambda _, manifest: manifest.pop("format"))


NEGATIVE_HALO = {**PROFILE.to_json(), "seam": [{"halo": -1, "mean": 0.0, "p999": 0.0, "max": 0.0}]}

DAMAGE_TO_TENSORS = {
    "empty": (lambda source, path: path.write_bytes(b""), "damaged"),
    "garbage": (lambda source, path: path.write_bytes(bytes(range(256)) * 30), "damaged"),
    "a text": (lambda source, path: path.write_text("not a model\n" * 99), "damaged"),
    "cut in the header": (cut(0.01), "damaged"),
    "cut in the middle": (cut(0.5), "damaged"),
    "cut at the end": (cut(0.9999), "damaged"),
    "one bit": (flip_last_byte, "do not match the manifest"),
    "tensor missing": (change_tensors(pop_tensor), "1 tensor (conv_hr.bias) missing"),
    "stage missing": (change_tensors(pop_stage), "no tensors for sr0"),
    "structure tensor missing": (change_tensors(pop_structure_tensor), "tensor decoder.tail.weight is missing"),
    "misshapen": (change_tensors(misshape), "misshapen; conv_hr.weight is [15, 16, 3, 3], expected [16, 16, 3, 3]"),
    "NaN": (change_tensors(poison), "conv_hr.weight holds 1 NaN"),
    "infinity in the structure": (change_tensors(poison_structure), "decoder.tail.weight holds NaN or infinity"),
    "unknown architecture": (change_tensors(rename_all), "unknown architecture"),
    "unknown tensor": (change_tensors(add_tensor), "attention.weight"),
    "tensors exchanged": (change_tensors(exchange), "do not match the manifest"),
}

DAMAGE_TO_MANIFEST = {
    "sigma altered": (change_stage(sigma=0.5), "do not match the manifest"),
    "margin altered": (change_manifest(margin=5), "do not match the manifest"),
    "structure altered": (
        lambda source, path: rewritten(source, path, lambda _, manifest: manifest["structure"].update(L=0)),
        "do not match the manifest",
    ),
    "other format": (change_manifest(format="ourgan-engine/99"), "not format ourgan-engine/1"),
    "no format": (pop_format, "damaged manifest"),
    "no stages": (pop_stages, "damaged manifest"),
    "unknown field": (change_manifest(colours=3), "damaged manifest (Object contains unknown field `colours`)"),
    "unknown field of a stage": (change_stage(blur=3), "damaged manifest (Object contains unknown field `blur`"),
    "digest of a wrong type": (change_manifest(digest=3), "damaged manifest"),
    "structure of a wrong type": (change_manifest(structure="yes"), "damaged manifest"),
    "stage of a wrong type": (change_manifest(stages=["sr0"]), "damaged manifest"),
    "weights of a wrong type": (change_stage(weights=[]), "damaged manifest"),
    "profile of a wrong type": (change_stage(profile={"seam": 3}), "damaged manifest"),
    "negative halo": (change_stage(profile=NEGATIVE_HALO), "damaged manifest (a halo is negative"),
    **{f"margin {m!r}": (change_manifest(margin=m), "damaged manifest") for m in (-1, "8", 8.0, None, True)},
    **{
        f"noise gain {g!r}": (change_stage(noise_gain=g), "damaged manifest")
        for g in ("1.5", None, float("nan"), float("inf"), 0.0)
    },
}


@pytest.mark.parametrize("table", [DAMAGE_TO_TENSORS, DAMAGE_TO_MANIFEST], ids=["tensors", "manifest"])
def test_damaged_files_are_refused_in_one_line(tmp_path, model_file, capsys, table):
    for number, (name, (damage, reason)) in enumerate(table.items()):
        path = tmp_path / f"{number}.safetensors"
        damage(model_file, path)
        with pytest.raises(ModelError) as caught:
            load(path)
        assert reason in str(caught.value), name
        assert refusal(path, capsys) == f"engine: {printable(str(caught.value))}", name


def test_a_manifest_that_is_none_is_refused(tmp_path, model_file, capsys):
    tensors, metadata = contents(model_file)
    for text in ("", "{", "[]", "3", "null", '{"format": "ourgan-engine/1"}', '"text"'):
        save_file(tensors, tmp_path / "model.safetensors", {**metadata, "ourgan": text})
        assert "damaged manifest" in refusal(tmp_path / "model.safetensors", capsys), text


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


def test_files_that_are_no_model_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    for command in (("info",), ("plan",), ("render", "--out", "out.zarr"), ("probe",)):
        for name in ("absent.safetensors", "absent.pth", "folder.safetensors", "picture.png", "absent"):
            assert name in refusal(name, capsys, *command), command


def test_step_1_alone_is_refused_with_a_command(tmp_path, small_structure):
    write_structure(small_structure, tmp_path / "structure.safetensors")
    with pytest.raises(ModelError, match=r"step 1 alone; .*engine model build --structure structure.safetensors --sr"):
        load(tmp_path / "structure.safetensors")


def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for out in ("file/model.safetensors", "/proc/model.safetensors"):
        line = refusal(out, capsys, "model", "build", "--sr", str(checkpoint), "--out")
        assert f"{out}: cannot be written" in line


def test_an_existing_file_is_kept_until_the_new_one_is_whole(tmp_path, monkeypatch, model_file):
    path = tmp_path / "model.safetensors"
    path.write_text("the old one")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.io.tensors.save_file", fail)
    with pytest.raises(engine.errors.InputError, match="No space left"):
        load(model_file).save(path)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
