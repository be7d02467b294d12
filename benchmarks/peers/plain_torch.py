"""Plain PyTorch in float32: the whole picture, or RealESRGANer's tiles with 10 pixels of padding."""

import torch
from safetensors.torch import load_file
from serve import options, picture, serve
from tiling import cropped

from engine import archs

PAD = 10

torch.set_num_threads(options()["threads"])
network = archs.build(load_file(options()["weights"])).eval()
image, tile = picture()[0], options()["tile"]


@torch.inference_mode()
def enlarge(part):
    return network(torch.from_numpy(part)[None]).numpy()[0]


serve(lambda: (cropped(enlarge, image, network.scale, tile, PAD) if tile else enlarge(image))[None])
