"""ncnn in tiles of 200 with 10 pixels of padding, as realsr-ncnn-vulkan cuts a picture, on the CPU in float32."""

import ncnn
import numpy as np
from serve import options, picture, serve

TILE, PAD, SCALE = 200, 10, 4

net = ncnn.Net()
net.opt.use_vulkan_compute = False
net.opt.num_threads = options()["threads"]
net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
net.load_param(options()["param"])
net.load_model(options()["bin"])
image = picture()[0]


def one(tile):
    pixels = np.ascontiguousarray(tile)  # ncnn.Mat keeps no reference to it
    with net.create_extractor() as extractor:
        extractor.input("data", ncnn.Mat(pixels).clone())
        _, output = extractor.extract("output")
        return np.array(output)


def run():
    _, height, width = image.shape
    result = np.empty((3, height * SCALE, width * SCALE), np.float32)
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            top, left = max(0, y - PAD), max(0, x - PAD)
            bottom, right = min(y + TILE, height), min(x + TILE, width)
            part = one(image[:, top : min(bottom + PAD, height), left : min(right + PAD, width)])
            rows = slice((y - top) * SCALE, (bottom - top) * SCALE)
            columns = slice((x - left) * SCALE, (right - left) * SCALE)
            result[:, y * SCALE : bottom * SCALE, x * SCALE : right * SCALE] = part[:, rows, columns]
    return result[None]


serve(run)
