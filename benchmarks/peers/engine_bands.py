"""This engine in bands, in float32 or bfloat16, without writing a store."""

import torch
from safetensors.torch import load_file
from serve import options, picture, serve

from engine import archs
from engine.bands.stream import RowStream
from engine.run.stage import Stage

torch.set_num_threads(options()["threads"])
image = torch.from_numpy(picture()).contiguous(memory_format=torch.channels_last)
height, width = image.shape[2:]
stage = Stage(archs.build(load_file(options()["weights"])), torch.device("cpu"), options()["precision"])
plan = stage.stream_plan(width)
stream = RowStream(plan)


def run():
    result = torch.empty(1, 3, height * stage.scale, width * stage.scale)
    stream.start(0, height)
    row, done = 0, 0
    while done < height * stage.scale:
        band = torch.zeros(1, 3, plan.band, width).contiguous(memory_format=torch.channels_last)
        part = image[:, :, row : row + plan.band]
        band[:, :, : part.shape[2]] = part
        row += plan.band
        for first, rows in stage.push(stream, band):
            result[:, :, first : first + rows.shape[2]] = rows
            done = first + rows.shape[2]
    return result.numpy()


serve(run)
