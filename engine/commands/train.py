"""engine train structure."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine import report
from engine.archs.hpvaegan import Config
from engine.progress import clock, meter, tell
from engine.stages import choose_device
from engine.training.hpvaegan import train_structure
from engine.training.log import CheckpointSaved, Event, IterationDone, ScaleFinished, ScaleStarted


def structure(
    photo: Path,
    out: Path,
    iterations: list[int] | None,
    device: str,
    precision: Literal["bf16", "fp16", "fp32"],
    seed: int,
    resume: bool,
    padding: str | None,
    coordinates: bool,
    licence: str,
    source: str,
) -> None:
    """Train step 1 with progress and an ETA, and say what was written."""
    options: dict[str, object] = {"coordinates": coordinates}
    if padding is not None:
        options["padding"] = padding
    given: dict[str, int | list[int]] = {}
    if iterations:
        given["iterations"] = iterations[0] if len(iterations) == 1 else iterations
    with meter("training", 1.0) as bar:
        show = _Shown(bar.advance)
        train_structure(
            photo, out, device=str(choose_device(device)), precision=precision, seed=seed, resume=resume,
            config=Config(**options), licence=licence, source=source, on_event=show, **given,  # type: ignore[arg-type]
        )  # fmt: skip
    report.line(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB; put a model together with engine model build --structure {out}"
    )


class _Shown:
    """Turns training events into words and progress; the bar's unit is the share of estimated time."""

    def __init__(self, advance) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._advance = advance
        self._share = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case ScaleStarted():
                height, width = event.size
                tell(f"scale {event.scale + 1} of {event.scales}: {width}x{height}, {event.kind}")
            case IterationDone():
                share = event.seconds / max(event.seconds + event.eta, 1e-9)
                self._advance(
                    max(0.0, share - self._share), f"{event.iteration}/{event.total}, {clock(event.eta)} left"
                )
                self._share = max(self._share, share)
            case ScaleFinished():
                tell(f"scale {event.scale + 1} done in {clock(event.seconds)}, samples in {event.sample}")
            case CheckpointSaved():
                pass
