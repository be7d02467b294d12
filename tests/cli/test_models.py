"""``engine models``: what is at hand, and how it runs."""

import json
import shutil

from safetensors.torch import save_file
from support.community import mosr, rcan, state_of


def test_models_of_a_folder(call, tmp_path, model_file, swin_model_file):
    """A network, a model, a network of windows, two by spandrel, and files that are none: each has its line."""
    shutil.copy(model_file.parent / "sr.safetensors", tmp_path / "net.pth")
    shutil.copy(model_file, tmp_path / "model.safetensors")
    shutil.copy(swin_model_file.parent / "sr.safetensors", tmp_path / "swin.safetensors")
    save_file(state_of(mosr()), tmp_path / "mosr.safetensors")
    save_file(state_of(rcan()), tmp_path / "rcan.safetensors")
    (tmp_path / "broken.pth").write_text("a text")
    (tmp_path / "readme.md").write_text("a text")
    code, out, _ = call(f"models {tmp_path} --json --quiet")
    assert code == 0
    entries = {entry["name"].removeprefix(f"{tmp_path}/"): entry for entry in json.loads(out)}
    net, model, swin, broken = (
        entries[name] for name in ("net.pth", "model.safetensors", "swin.safetensors", "broken.pth")
    )
    assert (net["scales"], net["architectures"], net["step_1"]) == ([4], ["esrgan"], False)
    assert (model["scales"], model["step_1"], model["licences"]) == ([4, 4], True, ["CC0-1.0"])
    assert net["runs"] == ["bands", "tiles"]
    assert (swin["architectures"], "tiles" in swin["runs"]) == (["swinir"], True)
    assert net["halo"] == model["halo"] > 0
    by_others = [entries[f"{name}.safetensors"] for name in ("mosr", "rcan")]
    assert [(entry["runs"], entry["halo"]) for entry in by_others] == [(["bands", "tiles"], 14), (["tiles"], None)]
    assert "not a checkpoint" in broken["problem"]
    assert "readme.md" not in entries
    assert {"(default)", "realsr", "x4plus"} <= set(entries)
    _, out, _ = call(f"models {tmp_path}")
    assert len(out.splitlines()) == 1 + len(entries)


def test_refusals(call, tmp_path):
    code, _, err = call(f"models {tmp_path}")
    assert (code, "no checkpoint in this folder" in err) == (4, True)
    assert call(f"models {tmp_path / 'missing'}")[0] == 4
