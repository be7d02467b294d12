"""Loop of a peer's process: `serve(run)` answers each line of the standard input with the seconds of one run.

A peer is started as ``python PEER.py OPTIONS``, where OPTIONS is JSON: picture (.npy, [3, H, W], float32 in [0, 1] or uint8),
weights, out, threads and what the peer alone needs. It needs numpy and its own runtime. Its last output is saved to ``out``
after each run. With ``once`` it runs once without a line, and ends.
"""

import json
import sys
import time

import numpy as np


def options():
    """The peer's options."""
    return json.loads(sys.argv[1])


def pixels():
    """[3, H, W] as saved."""
    return np.load(options()["picture"])


def picture():
    """float32 [1, 3, H, W]."""
    image = pixels()
    return (image if image.dtype == np.float32 else image / np.float32(255))[None]


def peak_bytes():
    """Largest resident memory of this process so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def is_exhausted(error):
    """Whether an error of numpy, PyTorch or ncnn says that there is no memory."""
    return isinstance(error, MemoryError) or "memory" in str(error)


def serve(run):
    """Call ``run() -> float32 or uint8 [1, 3, H * scale, W * scale]`` once for each line, after one call to warm up."""
    if options().get("once"):
        _save(run())
        return
    run()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        output = run()
        seconds = time.perf_counter() - start
        _save(output)
        print(json.dumps({"seconds": seconds, "peak": peak_bytes()}), flush=True)


def _save(output):
    np.save(options()["out"], np.asarray(output)[0])
