"""Signals at moments that no clock meets: within an import, and after a command has told how it ended."""

import subprocess
import sys

IMPORT = """
import pathlib, sys, time
from engine import interrupt
interrupt._PATIENCE = 0.0  # any import is too long
pathlib.Path("slow.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)")
sys.path.insert(0, "")
try:
    with interrupt.interruptible():
        import slow
        time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up")
"""
END = """
import os, signal, time
from engine.interrupt import exit_at_once, handle
handle(exit_at_once)
from engine.cli.app import main
try:
    main(["info", "none.safetensors"])
except SystemExit:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def run(script, folder):
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_long_import_is_cleaned_up_after(tmp_path):
    done = run(IMPORT, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")


def test_signal_after_the_last_line_adds_none(tmp_path):
    done = run(END, tmp_path)
    assert done.returncode == 130
    assert [line[:24] for line in done.stderr.splitlines()] == ["engine: none.safetensors"]
