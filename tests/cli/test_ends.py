"""Ends of a command: signals at any time and streams that are closed, full or without a reader never give a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.stores import attributes, render
from support.training import tiny_preset

from engine.errors import Interrupted
from engine.model.bundle import load
from engine.plan.request import Request

REQUEST = Request(size=(64, 48), stages=2, tile=8, overlap="4", precision="fp32", executor="bands")
RENDER = "render model.safetensors --size 256x192 --stages 2 --tile 16 --overlap 4 --precision fp32 --executor bands"
COMMANDS = {
    "render": f"{RENDER} --out o.zarr",
    "picture": f"{RENDER} --out o.png",
    "plan": "plan model.safetensors --size 256x192 --precision fp32",
    "info": "info model.safetensors",
    "export": "export s.zarr o.tif",
    "probe": "probe model.safetensors",
    "build": "model build --sr start.safetensors --out o.safetensors",
    "train": "train sr photo.png --out o.safetensors --start start.safetensors --config tiny.toml "
    "--iterations 100000 --device cpu --precision fp32",
}
QUICK = ("info", "export", "build")
"""Commands that end within a second or two."""

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def folder(tmp_path, model_file, large_photo, start_file):
    """Working folder with a model, a store, a checkpoint and a photograph."""
    (tmp_path / "model.safetensors").symlink_to(model_file)
    large_photo.rename(tmp_path / "photo.png")
    (tmp_path / "tiny.toml").write_text(tiny_preset().replace("checkpoint_every = 1", "checkpoint_every = 1000"))
    render(load(model_file), REQUEST, tmp_path / "s.zarr")
    return tmp_path


def start(folder, words, **streams):
    """The command in a process of its own."""
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    # Under nohup the engine ignores SIGHUP, as it should; these tests may run under it.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": _default_hangup, **streams}
    command = [sys.executable, "-m", "engine", *words.split()]
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def _default_hangup():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def catches(process, number):
    """Whether the process handles a signal: from the engine's first line on. What comes before is Python's own start."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")), 0)
    return bool(caught >> (number - 1) & 1)


def end(process):
    _, err = process.communicate(timeout=120)
    err = err.decode(errors="replace")
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    assert "internal error" not in err, err
    return process.returncode, [line for line in err.splitlines() if line.startswith("engine: ")]


def stop(folder, words, numbers, delay, *, gap=0.01):
    """Start a command, send signals after a delay, and check how it ends."""
    process = start(folder, words)
    wait_for(lambda: catches(process, signal.SIGTERM), process)
    time.sleep(delay)
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)
        time.sleep(gap)
    code, lines = end(process)
    assert code in (0, Interrupted.exit_code) or -code in numbers, (code, lines)  # the last: while Python shuts down
    if code == Interrupted.exit_code:
        (line,) = lines
        assert any(word in line for word in ("interrupted", "stopped")), line
    assert not [path.name for path in folder.rglob("*") if path.name.endswith(".part")]
    return code


SIGNALS = {
    "INT": [signal.SIGINT],
    "TERM": [signal.SIGTERM],
    "HUP": [signal.SIGHUP],
    "INT-INT-INT": [signal.SIGINT] * 3,
    "all": [*STOP, *STOP],
}


@pytest.mark.parametrize(
    ("command", "signals", "delay"),
    [("info", "INT", 0.0), ("render", "INT-INT-INT", 0.3), ("export", "all", 0.8), ("train", "HUP", 1.5)],
)
def test_signals_give_no_traceback(folder, command, signals, delay):
    stop(folder, COMMANDS[command], SIGNALS[signals], delay)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_signals_at_many_times(folder, command, signals):
    for index, delay in enumerate((0.0, 0.1, 0.4, 0.8, 1.2, 1.6, 2.0, 3.0)):
        words = COMMANDS[command]
        for name in ("o.zarr", "o.png", "o.tif", "o.safetensors"):
            words = words.replace(f" {name}", f" {index}{name}")
        stop(folder, words, SIGNALS[signals], delay)


def test_ignored_hangup_stays_ignored(folder):
    """As by nohup."""
    process = start(folder, COMMANDS["export"], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: catches(process, signal.SIGTERM), process)
    process.send_signal(signal.SIGHUP)
    assert end(process) == (0, [])
    assert (folder / "o.tif").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_training_writes_its_checkpoint(folder, number):
    """SIGTERM is what Slurm, systemd and Kubernetes send."""
    process = start(folder, COMMANDS["train"])
    log, saved = folder / "o.safetensors.log.jsonl", folder / "o.safetensors.checkpoint"
    wait_for(lambda: saved.exists() and '"iteration": 20' in log.read_text(), process)
    before = saved.stat().st_mtime_ns
    process.send_signal(number)
    code, (line,) = end(process)
    assert code == Interrupted.exit_code
    assert "training: stopped at iteration" in line
    assert saved.stat().st_mtime_ns > before
    assert not (folder / "o.safetensors.checkpoint.part").exists()


# Streams


def closed(*numbers):
    def close():
        for number in numbers:
            os.close(number)

    return {"preexec_fn": close}


def full(number):
    def fill():
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    return {"preexec_fn": fill}


STREAMS = {
    "stdin closed": lambda: closed(0),
    "stdout closed": lambda: closed(1),
    "stderr closed": lambda: closed(2),
    "all closed": lambda: closed(0, 1, 2),
    "stdout full": lambda: full(1),
    "stderr full": lambda: full(2),
}
LOST = {"stdout closed": "it is closed", "stdout full": "No space left on device", "all closed": None}
"""Ends with lost results, and words of their message."""


def check_stream(folder, command, stream):
    process = start(folder, COMMANDS[command], **STREAMS[stream]())
    _, err = process.communicate(timeout=120)
    err = (err or b"").decode()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert process.returncode == (1 if stream in LOST else 0), err
    if words := LOST.get(stream):
        assert f"engine: standard output: cannot be written ({words})" in err
    if command == "render":
        assert attributes(folder / "o.zarr")["complete"]


@pytest.mark.parametrize(
    ("command", "stream"),
    [("render", "all closed"), ("info", "stdout closed"), ("export", "stderr full"), ("build", "stdout full")],
)
def test_lost_streams(folder, command, stream):
    check_stream(folder, command, stream)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_lost_streams_of_every_command(folder, command, stream):
    check_stream(folder, command, stream)


def test_gone_reader_does_not_stop_a_render(folder):
    """As by ``2>&1 | head``: the reader of progress has gone."""
    process = start(folder, COMMANDS["render"], stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(120) == 1
    assert attributes(folder / "o.zarr")["complete"]


# Errors


def test_unexpected_error_is_one_line(call, model_file, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("engine.cli.info.info", broken)
    code, out, err = call(f"info {model_file}")
    assert (code, out) == (1, "")
    assert err == (
        "engine: internal error: ZeroDivisionError: first second; ENGINE_TRACEBACK=1 shows where; please report it\n"
    )
    monkeypatch.setenv("ENGINE_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in call(f"info {model_file}")[2]


MEMORY = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."
    ),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.parametrize("error", MEMORY, ids=["python", "torch", "onednn"])
def test_exhausted_memory_is_no_internal_error(call, model_file, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("engine.cli.info.info", broken)
    code, _, err = call(f"info {model_file}")
    assert code == 1
    assert err == "engine: out of memory; end other programs, or allow this one more memory (ulimit -v)\n"
