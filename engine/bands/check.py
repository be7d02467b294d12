"""Row graphs of networks that others wrote: derived from a trace, and believed after a run.

A trace does not show everything: two names may share a tensor that one of them changes, or a size may follow from the picture's
in a way that the trace has as a number. So bands are compared with the whole of a picture of another shape than the trace's.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.bands.graph import RowGraph, read_graph
from engine.bands.stream import RowStream, StreamPlan
from engine.causes import raise_if_exhausted
from engine.errors import UsageError, option

TOLERANCE = 0.01
"""Largest difference from the whole picture, in levels of 255: what float32 sums in another order make."""

_INSIDE = 0.05
"""Smallest share of the output within the range: values that are cut off to it hide differences."""


def checked_graph(network: nn.Module, align: int, inputs: int, *, packs: bool = False) -> RowGraph:
    """``read_graph`` of a network in float32 by others, whose bands were compared with the whole of a random picture.

    Args:
        network, align, inputs, packs: as for ``read_graph``. The network yields values in [0, 1].

    Raises:
        UsageError: the network cannot be traced, an operation has no rule, or the two differ by more than ``TOLERANCE``.
    """
    try:
        graph = read_graph(network, align, inputs, packs=packs)
        difference, inside = _compared(network, graph, max(8, align) // align * align, inputs)
    except UsageError:
        raise
    except Exception as error:  # whatever code of others raises where it meets a stand-in for a tensor
        raise_if_exhausted(error)
        reason = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
        raise _refusal(f"{type(error).__name__}: {reason}") from error
    if inside < _INSIDE:
        raise _refusal("a random picture leads to black and white alone, which does not show that they are exact")
    if not difference <= TOLERANCE:  # or NaN
        raise _refusal(f"they differ from the whole picture by {difference:.3g} levels of 255")
    return graph


@torch.inference_mode()
def _compared(network: nn.Module, graph: RowGraph, unit: int, inputs: int) -> tuple[float, float]:
    """(largest difference in levels of 255, share of the output within the range) on a picture of 3 x 5 units."""
    device = next(network.parameters()).device
    picture = torch.rand(1, inputs, 5 * unit, 3 * unit, generator=torch.Generator().manual_seed(0)).to(device)
    expected = network(picture.contiguous(memory_format=torch.channels_last))
    plan = StreamPlan(graph, 2 * unit, 3 * unit)
    stream = RowStream(plan, device)
    stream.start(0, 5 * unit)
    rows = torch.full_like(expected[0].permute(1, 2, 0), torch.nan)
    for top in range(0, 5 * unit + plan.delay, 2 * unit):
        band = picture[:, :, top : top + 2 * unit]
        for first, part in stream.push(nn.functional.pad(band, (0, 0, 0, 2 * unit - band.shape[2]))):
            rows[first : first + len(part)] = part
    difference = (rows.permute(2, 0, 1) - expected[0]).abs().amax() * 255
    return float(difference), float(((expected > 0) & (expected < 1)).float().mean())


def _refusal(reason: str) -> UsageError:
    return UsageError(
        f"a network by spandrel: cannot be streamed in bands ({reason}); use {option('executor', 'tiles')}"
    )
