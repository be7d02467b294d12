"""Row streams of networks, and the picture that a stream yields."""

import torch
from torch.nn import functional as F

from engine.bands.graph import read_graph
from engine.bands.stream import RowStream, StreamPlan


def noise_channels(network):
    return getattr(network, "noise_channels", 0)


def plan(network, band, width, tail_band=None, block=None):
    return StreamPlan(
        read_graph(network, getattr(network, "align", 1), 3 + noise_channels(network)), band, width, tail_band, block
    )


def stream(network, band, width, tail_band=None, block=None):
    return RowStream(plan(network, band, width, tail_band, block))


def bands(picture, band, low=0):
    """Endless bands [1, C, band, W] from row ``low`` on; zero below the picture."""
    for top in range(low, 10**6, band):
        part = picture[:, top : top + band]
        yield F.pad(part, (0, 0, 0, band - part.shape[1]))[None]


def pour(rows, picture, low=0, before_push=lambda: None):
    """Output [3, H, W] of a stream for the picture from row ``low`` on; its rows must come in order, each once."""
    scale, height = rows.plan.scale, picture.shape[1]
    rows.start(low, height)
    parts, next_row = [], low * scale
    for band in bands(picture, rows.plan.band, low):
        if next_row == height * scale:
            break
        before_push()
        for first, part in rows.push(band):
            assert first == next_row
            assert part.shape[0] > 0
            assert part.shape[1] == picture.shape[2] * scale
            next_row += part.shape[0]
            parts.append(part.clone())
        assert next_row <= height * scale
    return torch.cat(parts).permute(2, 0, 1)


def pour_rows(rows, picture, first, last):
    """Rows [first, last) of a stream's output, from a picture that is NaN in all rows but those that they follow from."""
    height, band = picture.shape[1], rows.plan.band
    top, bottom = rows.plan.rows_read((first, last), height)
    picture = picture.clone()
    picture[:, :top] = picture[:, bottom:] = torch.nan
    low, parts = top // band * band, []
    rows.start(low, height, (first, last))
    for x in bands(picture, band, low):
        for y, part in rows.push(x):
            parts.append(part[max(0, first - y) : max(0, last - y)].clone())
        if sum(map(len, parts)) == last - first:
            return torch.cat(parts).permute(2, 0, 1)
        assert low < height + rows.plan.delay
        low += band
    raise AssertionError


@torch.inference_mode()
def whole(network, picture):
    return network(picture[None])[0]
