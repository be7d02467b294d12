"""ncnn in tiles of 200 with 10 pixels of padding, as realesrgan-ncnn-vulkan cuts a picture, on the CPU in float32.

With the option ``bytes`` the result is held in 8 bits, as that program does.
"""

import ncnn
import numpy as np
from serve import options, pixels, serve
from tiling import cropped

TILE, PAD = 200, 10

net = ncnn.Net()
net.opt.use_vulkan_compute = False
net.opt.num_threads = options()["threads"]
net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
net.load_param(options()["param"])
net.load_model(options()["bin"])
image = pixels()


def enlarge(tile):
    values = np.ascontiguousarray(tile, np.float32)  # ncnn.Mat keeps no reference to it
    if tile.dtype == np.uint8:
        values /= 255
    with net.create_extractor() as extractor:
        extractor.input("data", ncnn.Mat(values).clone())
        failed, output = extractor.extract("output")
        if failed:
            raise MemoryError(f"ncnn: error {failed}")
        return np.array(output)


dtype = np.uint8 if options().get("bytes") else np.float32
serve(lambda: cropped(enlarge, image, options()["scale"], TILE, PAD, dtype)[None])
