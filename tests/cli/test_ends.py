"""Ends of a command: signals at any time and streams that are closed, full or without a reader never give a traceback."""

import errno
import signal
import subprocess

import imagecodecs
import pytest
from support.commands import catches, start, wait_for
from support.ends import COMMANDS, DELAYS, SIGNALS, STREAMS, end, fill, lose_stream, numbered, stop
from support.stores import attributes

from engine.errors import InputError, Interrupted


@pytest.fixture
def folder(tmp_path, model_file):
    """Working folder with a model, a store, a checkpoint and a photograph."""
    return fill(tmp_path, model_file)


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
    for index, delay in enumerate(DELAYS):
        stop(folder, numbered(COMMANDS[command], index), SIGNALS[signals], delay)


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


@pytest.mark.parametrize(
    ("command", "stream"),
    [("render", "all closed"), ("info", "stdout closed"), ("export", "stderr full"), ("build", "stdout full")],
)
def test_lost_streams(folder, command, stream):
    lose_stream(folder, command, stream)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_lost_streams_of_every_command(folder, command, stream):
    lose_stream(folder, command, stream)


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
    imagecodecs.DeflateError("libdeflate_alloc_compressor", "NULL"),
    ValueError("encoding error 1"),
    OSError("codec configuration error when writing image file"),
    InputError("o.zarr: cannot be created (Cannot allocate memory); choose another --out"),
]
MEMORY[-1].__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize("error", MEMORY, ids=["python", "torch", "onednn", "deflate", "webp", "png", "file"])
def test_exhausted_memory_is_no_internal_error(call, model_file, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("engine.cli.info.info", broken)
    code, _, err = call(f"info {model_file}")
    assert code == 1
    assert err == "engine: out of memory; end other programs, or allow this one more memory (ulimit -v)\n"
