"""The ceiling: one 3x3 convolution of a dense block, 96 channels to 32, at the size of a band, again and again.

The output is its speed in GFLOP/s, in every element.
"""

import time

import numpy as np
import torch
from serve import options, picture, serve
from torch.nn import functional as F

INPUTS, OUTPUTS, ROWS, CALLS = 96, 32, 16, 200

torch.set_num_threads(options()["threads"])
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options()["precision"]]
width = picture().shape[3]
x = torch.rand(1, INPUTS, ROWS, width).to(dtype).contiguous(memory_format=torch.channels_last)
weight = (torch.randn(OUTPUTS, INPUTS, 3, 3) * 0.02).to(dtype).contiguous(memory_format=torch.channels_last)
bias = torch.zeros(OUTPUTS, dtype=dtype)


@torch.inference_mode()
def run():
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        F.conv2d(x, weight, bias, padding=1)
        seconds.append(time.perf_counter() - start)
    speed = 2 * 9 * INPUTS * OUTPUTS * ROWS * width / sorted(seconds)[CALLS // 2] / 1e9
    return np.full((1, 1, 1, 1), speed, np.float32)


serve(run)
