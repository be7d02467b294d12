"""Signals to commands at any time, and streams that are closed, full or without a reader."""

import os
import signal
import time

import torch
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.errors import Interrupted
from engine.model.bundle import load
from engine.plan.request import Request
from support.commands import catches, finish, start, wait_for
from support.small import photograph
from support.stores import attributes, render
from support.training import tiny_preset

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
OUTPUTS = "o.zarr", "o.png", "o.tif", "o.safetensors"

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALS = {
    "INT": [signal.SIGINT],
    "TERM": [signal.SIGTERM],
    "HUP": [signal.SIGHUP],
    "INT-INT-INT": [signal.SIGINT] * 3,
    "all": [*STOP, *STOP],
}
DELAYS = 0.0, 0.1, 0.4, 0.8, 1.2, 1.6, 2.0, 3.0
"""Seconds after the engine's first line."""


def fill(folder, model_file):
    """Put a model, a store, a checkpoint and a photograph into a folder."""
    (folder / "model.safetensors").symlink_to(model_file)
    photograph(folder / "photo.png", 120, 160)
    (folder / "tiny.toml").write_text(tiny_preset(checkpoint_every=1000))
    torch.manual_seed(5)
    save_file(RRDBNet(channels=8, blocks=2, growth=4).state_dict(), folder / "start.safetensors")
    render(load(model_file), REQUEST, folder / "s.zarr")
    return folder


def end(process):
    """Exit code, and the lines of errors, of a command that may print no traceback."""
    code, err = finish(process)
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    assert "internal error" not in err, err
    return code, [line for line in err.splitlines() if line.startswith("engine: ")]


def stop(folder, words, numbers, delay, *, gap=0.01):
    """Start a command, send signals after a delay, and check how it ends; returns the exit code."""
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
        assert len(lines) == 1, lines
        (line,) = lines
        assert any(word in line for word in ("interrupted", "stopped")), line
    assert not [path.name for path in folder.rglob("*") if path.name.endswith(".part")]
    return code


def numbered(words, number):
    """The command with outputs of its own."""
    for name in OUTPUTS:
        words = words.replace(f" {name}", f" {number}{name}")
    return words


def _closed(*numbers):
    def close():
        for number in numbers:
            os.close(number)

    return {"preexec_fn": close}


def _full(number):
    def fill():
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    return {"preexec_fn": fill}


STREAMS = {
    "stdin closed": lambda: _closed(0),
    "stdout closed": lambda: _closed(1),
    "stderr closed": lambda: _closed(2),
    "all closed": lambda: _closed(0, 1, 2),
    "stdout full": lambda: _full(1),
    "stderr full": lambda: _full(2),
}
LOST = {"stdout closed": "it is closed", "stdout full": "No space left on device", "all closed": None}
"""Ends with lost results, and words of their message."""


def lose_stream(folder, command, stream):
    """Run a command with a lost stream, and check how it ends."""
    code, err = finish(start(folder, COMMANDS[command], **STREAMS[stream]()))
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert code == (1 if stream in LOST else 0), err
    if words := LOST.get(stream):
        assert f"engine: standard output: cannot be written ({words})" in err
    if command == "render":
        assert attributes(folder / "o.zarr")["complete"]
