"""Loop of a peer's process: `serve(run)` answers each line of the standard input with the seconds of one run.

A peer is started as ``python PEER.py OPTIONS``, where OPTIONS is JSON: picture (.npy, float32 [3, H, W] in [0, 1]), weights, out,
threads and what the peer alone needs. It needs numpy and its own runtime. Its last output is saved to ``out`` after each run.
"""

import json
import sys
import time

import numpy as np


def options():
    """The peer's options."""
    return json.loads(sys.argv[1])


def picture():
    """float32 [1, 3, H, W]."""
    return np.load(options()["picture"])[None]


def peak_bytes():
    """Largest resident memory of this process so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def serve(run):
    """Call ``run() -> float32 [1, 3, 4H, 4W]`` once for each line, after one call to warm up."""
    run()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        output = run()
        seconds = time.perf_counter() - start
        np.save(options()["out"], np.asarray(output)[0].astype(np.float32))
        print(json.dumps({"seconds": seconds, "peak": peak_bytes()}), flush=True)
