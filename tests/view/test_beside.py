"""The viewer in a process beside a render."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest
from support.growing import new_store, write

pytest.importorskip("uvicorn")

from engine.view.beside import viewer_beside

pytestmark = pytest.mark.slow
SIZE = (300, 700)


def state(address):
    with urllib.request.urlopen(f"{address}api/view.json", timeout=60) as answer:
        return json.load(answer)["sources"][0]["state"]


def test_it_shows_progress_and_ends_with_the_block(tmp_path):
    sink, pixels = new_store(tmp_path / "a.zarr", SIZE)
    write(sink, pixels, count=1)
    with viewer_beside(tmp_path / "a.zarr", opens_browser=False) as (viewer, address):
        assert state(address)["share"] == pytest.approx(256 * 256 / (300 * 700), abs=1e-4)
        viewer.tell(0.5, 30.0)
        while (seen := state(address))["share"] != 0.5:
            time.sleep(0.05)
        assert 0 < seen["secondsLeft"] <= 30
        write(sink, pixels)
        while not state(address)["complete"]:
            time.sleep(0.05)
        assert viewer.is_running
    assert not viewer.is_running


def test_it_ends_with_a_render_that_is_killed(tmp_path):
    new_store(tmp_path / "a.zarr", SIZE)
    code = (
        "import sys, pathlib; from engine.view.beside import viewer_beside\n"
        "with viewer_beside(pathlib.Path(sys.argv[1]), opens_browser=False) as (viewer, address):\n"
        "    print(viewer._process.pid, address, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.zarr")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as render:
        address = render.stdout.readline().split()[1]
        assert state(address)["complete"] is False
        render.kill()
    assert any(not is_answered(address) for _ in range(1200))


def is_answered(address):
    time.sleep(0.05)
    try:
        state(address)
    except OSError:
        return False
    return True
