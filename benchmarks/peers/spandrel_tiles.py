"""spandrel in ComfyUI's tiles of 512, which overlap by 32 and are halved where memory is exhausted; PyTorch in float32."""

import torch
from safetensors.torch import load_file
from serve import is_exhausted, options, picture, serve
from tiling import feathered, halved

from engine.archs.foreign import load_spandrel

TILE, OVERLAP, LEAST = 512, 32, 128

torch.set_num_threads(options()["threads"])
model = load_spandrel().ModelLoader().load_from_state_dict(load_file(options()["weights"])).eval()
image = picture()[0]


@torch.inference_mode()
def enlarge(part):
    return model(torch.from_numpy(part)[None]).numpy()[0]


def run():
    first = options().get("tile", TILE)
    result, _ = halved(lambda tile: feathered(enlarge, image, model.scale, tile, OVERLAP), first, LEAST, is_exhausted)
    return result[None]


serve(run)
