"""Plain PyTorch in float32: the whole picture, or RealESRGANer's tiles of 512 with 10 pixels of padding."""

import numpy as np
import torch
from safetensors.torch import load_file
from serve import options, picture, serve

from engine import archs

PAD, SCALE = 10, 4

torch.set_num_threads(options()["threads"])
network = archs.build(load_file(options()["weights"]))
image, tile = torch.from_numpy(picture()), options()["tile"]


@torch.inference_mode()
def run():
    if not tile:
        return network(image).numpy()
    _, _, height, width = image.shape
    result = np.empty((1, 3, height * SCALE, width * SCALE), np.float32)
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            top, left = max(0, y - PAD), max(0, x - PAD)
            bottom, right = min(y + tile, height), min(x + tile, width)
            part = network(image[:, :, top : min(bottom + PAD, height), left : min(right + PAD, width)]).numpy()
            rows = slice((y - top) * SCALE, (bottom - top) * SCALE)
            columns = slice((x - left) * SCALE, (right - left) * SCALE)
            result[:, :, y * SCALE : bottom * SCALE, x * SCALE : right * SCALE] = part[:, :, rows, columns]
    return result


serve(run)
