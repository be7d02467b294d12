"""Rules by which other programs cut a picture into tiles and join the results, for any network. Needs numpy alone.

``cropped`` is the rule of Real-ESRGAN 0.3.0 (RealESRGANer: ``tile`` and ``tile_pad``) and of realesrgan-ncnn-vulkan 0.2.0
(``tilesize`` and ``prepadding``): a tile is read with pixels around it, and what they become is cut off. At the picture's
border nothing is added, so that the network's own padding acts there as it does for the whole picture.
``feathered`` is the rule of ComfyUI 0.38.1 (ImageUpscaleWithModel): neighbouring tiles overlap, and the mean of both is
weighted by ramps.

Whole results are held in memory, as these programs do, in the fewest buffers that a rule needs; the programs hold more.
"""

import numpy as np

RGB = 3


def cropped(enlarge, image, scale, tile, pad, dtype=np.float32):
    """Enlarge a picture in tiles with ``pad`` pixels around each.

    Args:
        enlarge: network, float32 or uint8 [3, h, w] -> float32 [3, h * scale, w * scale].
        image: picture, [3, height, width].
        dtype: of the result: float32, or uint8, as realesrgan-ncnn-vulkan holds it.
    """
    _, height, width = image.shape
    result = np.empty((RGB, height * scale, width * scale), dtype)
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            top, left = max(0, y - pad), max(0, x - pad)
            bottom, right = min(y + tile, height), min(x + tile, width)
            part = enlarge(image[:, top : min(bottom + pad, height), left : min(right + pad, width)])
            rows = slice((y - top) * scale, (bottom - top) * scale)
            columns = slice((x - left) * scale, (right - left) * scale)
            part = part[:, rows, columns]
            if dtype == np.uint8:
                part = np.clip(part, 0, 1) * 255 + 0.5
            result[:, y * scale : bottom * scale, x * scale : right * scale] = part.astype(dtype)
    return result


def feathered(enlarge, image, scale, tile, overlap):
    """Enlarge a picture in tiles that overlap, with weights that fall linearly to the ends of a tile. Arguments as above."""
    _, height, width = image.shape
    if max(height, width) <= tile:
        return enlarge(image)
    result = np.zeros((RGB, height * scale, width * scale), np.float32)
    weights = np.zeros(result.shape[1:], np.float32)
    for y in starts(height, tile, overlap):
        for x in starts(width, tile, overlap):
            part = enlarge(image[:, y : y + tile, x : x + tile])
            weight = np.outer(*(_ramps(side, overlap * scale) for side in part.shape[1:]))
            rows = slice(y * scale, y * scale + part.shape[1])
            columns = slice(x * scale, x * scale + part.shape[2])
            result[:, rows, columns] += part * weight
            weights[rows, columns] += weight
    result /= weights
    return result


def starts(length, tile, overlap):
    """First pixels of tiles that overlap."""
    return list(range(0, length - overlap, tile - overlap)) if length > tile else [0]


def _ramps(length, ramp):
    """Weights of a tile's rows or columns: 1 in the middle, to 1 / ramp at both ends; 1 where the tile is no longer than that."""
    weights = np.ones(length, np.float32)
    if ramp < length:
        rising = np.arange(1, ramp + 1, dtype=np.float32) / ramp
        weights[:ramp] *= rising
        weights[length - ramp :] *= rising[::-1]
    return weights


def halved(enlarge_by, tile, least, exhausted):
    """``enlarge_by(tile)`` with the tile halved as long as memory is exhausted, as ComfyUI does: (result, tile).

    Args:
        enlarge_by: tile -> result.
        tile: side of the first try.
        least: smallest side that is tried.
        exhausted: whether an error says that memory is exhausted.
    """
    while True:
        try:
            return enlarge_by(tile), tile
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error) or tile // 2 < least:
                raise
        tile //= 2
