"""Accelerators as the engine sees them: always with an index, asked in one module, each by what it can do."""

import ast
import re
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch
from support.accelerator import GIB, MIB, TYPE, pretend_accelerator

import engine
from engine.device import runtime
from engine.device.choose import check_half, choose_device, fast_half, usable_devices
from engine.device.memory import device_bytes, device_limit, free_device
from engine.device.queue import CudaDeviceQueue, DeviceQueue, device_queue, synchronize
from engine.errors import UsageError
from engine.job import Job
from engine.kernels import launch
from engine.model.bundle import load
from engine.plan.request import Request
from engine.probe import footprint

PACKAGE = Path(engine.__file__).parent


@pytest.fixture
def accelerator():
    with pretend_accelerator() as board:
        yield board


@cache
def _trees():
    return list(_parsed())


def _parsed():
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())
    for folder in ("kernels", "exporters"):  # links, which rglob does not follow
        for path in (PACKAGE / folder).glob("*.py"):
            yield f"{folder}/{path.name}", ast.parse(path.read_text())


def test_accelerators_are_asked_in_one_module():
    """But for the type of an event, in annotations."""
    asked = re.compile(r"torch\.((cuda|xpu|mps|accelerator)\.(?!Event$)\w+|get_device_module)$")
    users = {
        name
        for name, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and asked.match(ast.unparse(node))
    }
    assert users == {"device/runtime.py"}


def test_no_device_is_named_without_an_index():
    """``torch.device("cuda")`` is the current device for most of PyTorch, and refused by the rest."""
    bare = [
        (name, ast.unparse(node))
        for name, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device" and len(node.args) == 1
        if isinstance(node.args[0], ast.Constant) and node.args[0].value not in ("cpu", "meta")
    ]
    assert bare == []


def test_devices_have_an_index(accelerator):
    assert choose_device(None) == choose_device(TYPE) == torch.device(TYPE, 0)
    assert usable_devices() == ["cpu", f"{TYPE}:0", f"{TYPE}:1"]
    accelerator.current = 1
    assert choose_device(None) == choose_device(TYPE) == torch.device(TYPE, 1)
    assert choose_device(f"{TYPE}:0") == torch.device(TYPE, 0)
    with pytest.raises(UsageError, match=rf"{TYPE}:7.*: not a device of this machine; use cpu or {TYPE}:0 or {TYPE}:1"):
        choose_device(f"{TYPE}:7")


def test_cuda_as_the_user_writes_it_is_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    opened = []
    monkeypatch.setattr("engine.device.choose.open_device", opened.append)
    assert choose_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == torch.device("cuda", 1)
    assert opened == [torch.device("cuda", 1)] * 2


def test_device_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr(runtime, "default_device", lambda: torch.device("cuda", 0))
    with pytest.raises(UsageError) as refused:
        choose_device(None)
    assert refused.value.for_command_line().startswith("GPU: does not answer (")
    assert refused.value.for_command_line().endswith("use --device cpu")
    assert "\n" not in str(refused.value)


def test_work_of_another_device_than_the_current_one_is_waited_for(accelerator):
    second = torch.device(TYPE, 1)
    host = torch.empty(4, pin_memory=True)
    host.copy_(torch.ones(4, device=second), non_blocking=True)
    synchronize(torch.device(TYPE, 0))
    assert host.isnan().all()
    synchronize(second)
    assert host.tolist() == [1.0] * 4


def test_queue_follows_what_a_device_can_do(accelerator, monkeypatch):
    """XPU and MPS have no recorded launches: they run in program order."""
    assert type(device_queue(torch.device(TYPE, 0))) is CudaDeviceQueue
    assert type(device_queue(torch.device("cpu"))) is DeviceQueue
    for kind in runtime.OTHER_TYPES:
        assert type(device_queue(torch.device(kind, 0))) is DeviceQueue


def test_half_precision_is_one_that_the_device_computes(monkeypatch):
    with pretend_accelerator(capability=(7, 5)):
        old = torch.device(TYPE, 0)
        assert fast_half(old) == "fp16"
        with pytest.raises(UsageError, match=r"bf16.*: Pretend A has no instructions for it; use fp16 or fp32"):
            check_half(["fp32", "bf16"], old)
        check_half(["fp16", "fp32"], old)
    with pretend_accelerator(capability=(8, 0)):
        check_half(["bf16"], torch.device(TYPE, 0))
    check_half(["bf16"], torch.device("cpu"))
    check_half(["bf16"], torch.device("mps", 0))


@pytest.mark.parametrize("kind", runtime.OTHER_TYPES)
def test_a_device_that_nobody_has_tried_says_so(kind, model_file, tmp_path, monkeypatch):
    """In one line, before the render."""
    note = runtime.untested(torch.device(kind, 0))
    assert note.startswith(f"{kind}: never tested")
    monkeypatch.setattr("engine.job.untested", lambda device: runtime.untested(torch.device(kind, 0)))
    lines = []
    Job.prepare(load(model_file), Request(size=(64, 48), stages=1, precision="fp32"), tmp_path / "o.zarr", lines.append)
    assert lines.count(note) == 1
    assert runtime.untested(torch.device("cuda", 0)) is None


# Memory


@pytest.mark.parametrize("lists_processes", [True, False])
@pytest.mark.parametrize("others", [0, 1331 * MIB])
def test_memory_of_other_processes_is_not_ours(lists_processes, others):
    """A desktop holds a GiB: a budget of 1.25 GiB is room for this process all the same, on Windows too."""
    device = torch.device(TYPE, 0)
    with pretend_accelerator(lists_processes=lists_processes, others=others):
        choose_device(TYPE)
        held = device_bytes(device)
        assert 300 * MIB <= held <= 602 * MIB
        assert free_device(device) == pytest.approx(8 * GIB - others, abs=302 * MIB)
        with device_limit(device, 1280 * MIB):
            torch.empty(600 * MIB, dtype=torch.uint8, device=device)
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(1000 * MIB, dtype=torch.uint8, device=device)


def test_context_is_what_the_card_holds_more_once_it_is_open():
    """With NVML's totals, but without its list of processes, as in a container."""
    device = torch.device(TYPE, 0)
    with pretend_accelerator(lists_processes=False, others=2 * GIB, reads_totals=True):
        choose_device(TYPE)
        assert device_bytes(device) == pytest.approx(300 * MIB, abs=2 * MIB)


def test_memory_that_is_taken_later_outside_pytorch_is_ours():
    device = torch.device(TYPE, 0)
    with pretend_accelerator(lists_processes=False) as board:
        choose_device(TYPE)
        before = device_bytes(device)
        board.memory[0].context += 50 * MIB  # libraries and recorded graphs
        assert device_bytes(device) == before + 50 * MIB


# Measurements


def test_footprints_belong_to_the_device_that_was_measured(accelerator, monkeypatch):
    """Not to the first one: another card has other speed, and another version of its libraries other memory."""
    first, second = (torch.device(TYPE, index) for index in (0, 1))
    keys = {footprint._machine_key(("sr",), device) for device in (first, second, torch.device("cpu"))}
    assert len(keys) == 3
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1)
    monkeypatch.setattr(footprint, "library_versions", lambda device: ["cudnn 2"])
    assert footprint._machine_key(("sr",), first) not in keys


# Kernels


def test_triton_needs_a_compiler_and_the_header_of_python(monkeypatch, tmp_path):
    """Without either, the definitions in torch run."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc")

    def compiles():
        launch._can_compile_for.cache_clear()
        return launch._can_compile_for(device)

    assert compiles()
    (tmp_path / "Python.h").unlink()
    assert not compiles()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles()
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not compiles()
    launch._can_compile_for.cache_clear()
