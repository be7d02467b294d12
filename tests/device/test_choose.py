"""Choice of the device and of precisions."""

import pytest
import torch

from engine.device.choose import check_precisions, choose_device, fast_half, usable_devices
from engine.errors import UsageError


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "meta", "cuda:99", "mps", "xpu", "cpu:gpu", ""):
        if name not in usable_devices():
            with pytest.raises(UsageError) as refused:
                choose_device(name)
            message = refused.value.for_command_line()
            assert message.startswith(f"--device {name}: not ")
            assert message.endswith(f"; use {' or '.join(usable_devices())}")
            assert message.count("\n") == 0
    assert usable_devices()[0] == "cpu"
    assert all(choose_device(name) for name in usable_devices())


def test_fast_half(monkeypatch):
    assert fast_half(torch.device("cuda")) == "fp16"
    for supported in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: supported, raising=False)  # noqa: B023
        assert fast_half(torch.device("cpu")) == ("bf16" if supported else None)


def test_check_precisions():
    check_precisions(("fp32",), 1)
    check_precisions(("fp32", "bf16"), 2)
    refusals = [
        (("x", "x"), 2, "precision='x': unknown; use auto, one of fp32, bf16, fp16, or 2 of them with commas"),
        (("fp32", "x"), 2, "precision='fp32,x': unknown; use"),
        (("fp32", "fp16"), 3, "precision='fp32,fp16': 2 for 3 steps; use"),
        (("x",), 1, "precision='x': unknown; use auto, one of fp32, bf16, fp16"),
    ]
    for names, stages, words in refusals:
        with pytest.raises(UsageError) as refused:
            check_precisions(names, stages)
        assert str(refused.value).startswith(words)
