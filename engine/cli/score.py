"""``engine score``: scores of images, or of samples rendered first, against a photograph or a reference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli import report
from engine.cli.progress import Meter, log, meter
from engine.cli.tables import print_table
from engine.device.choose import choose_device
from engine.device.heap import fix_malloc_thresholds, malloc_trim
from engine.device.memory import PeakMemory
from engine.errors import InputError, Interrupted, UsageError, counted, option
from engine.interrupt import deferred_interrupt
from engine.io.photo import PictureSource
from engine.job import Job
from engine.metrics import weights
from engine.metrics.fidelity import Fidelity, compare
from engine.metrics.images import Sample, expand, open_image
from engine.metrics.lpips import RANGES
from engine.metrics.patches import STEP as PATCH_STEP
from engine.metrics.score import Scores, rows_to_read
from engine.metrics.score import score as score_samples
from engine.model.bundle import load
from engine.plan.cost import readable
from engine.plan.request import Request

if TYPE_CHECKING:
    from engine.cli.workers import Workers  # which needs the extra dask

AVAILABLE, FREE, ALL = "available", "free", "all"
TRAINED = tuple(weights.FILES)
"""Metrics with trained weights."""

_PAPER = (
    ("OUR-GAN with ESRGAN, paper, ST4K", "1.36/1.48", ".43"),
    ("OUR-GAN with SwinIR, paper, ST4K", ".94/1.26", ".41"),
    ("OUR-GAN with ESRGAN, paper, RAISE", "1.22/1.50", ".40"),
    ("OUR-GAN with SwinIR, paper, RAISE", ".97/1.48", ".38"),
)
"""Model, SIFID and LPIPS from the paper's Table 4: means over 25 and 50 photographs."""


def check(
    images: Sequence[Path], real: Path | None, reference: Path | None, model: Path | None,
    samples: int, keep: Path | None, request: Request,
) -> None:  # fmt: skip
    """Raise UsageError unless the options describe one of the three ways to score."""
    if (real is None) == (reference is None):
        raise UsageError(f"engine score: give either {option('real')} PHOTOGRAPH or {option('reference')} PICTURE")
    if model is not None and (images or reference is not None):
        raise UsageError(
            f"{option('model')}: renders its own samples for {option('real')}; leave the images and {option('reference')} out"
        )
    if model is None and not images:
        raise UsageError(f"engine score: no images; name pictures, stores or folders, or {option('model')} to render")
    if model is None and keep is not None:
        raise UsageError(f"{option('keep', keep)}: there are no rendered samples to keep; add {option('model')}")
    if model is None and replace(request, device=None) != Request():
        raise UsageError(f"options of a render need {option('model')}; leave them out for existing images")
    if samples < 1:
        raise UsageError(f"{option('samples', samples)}: must be at least 1")
    if request.init is not None or request.roi is not None:
        raise UsageError(
            f"{option('init')} and {option('roi')}: samples are whole images that begin with step 1; leave these options out"
        )


def reference(images: Sequence[Path], reference_path: Path, as_json: bool) -> None:
    """Print PSNR and SSIM of every image against the reference."""
    truth = _open(reference_path)
    samples = [_open(path) for path in expand(images)]
    with meter("scoring", len(samples) * truth.size[0]) as bar:
        results = [(s.name, compare(s.source, truth.source, bar.advance, s.name)) for s in samples]
    if as_json:
        images_json = [{"name": name, **fidelity.to_json()} for name, fidelity in results]
        report.print_json({"reference": truth.name, "images": images_json})
    else:
        head = ("image", "PSNR RGB", "PSNR Y", "SSIM RGB", "SSIM Y")
        print_table(head, [(name, *_fidelity_row(fidelity)) for name, fidelity in results])


def _fidelity_row(fidelity: Fidelity) -> Iterator[str]:
    for psnr in (fidelity.psnr_rgb, fidelity.psnr_y):
        yield f"{psnr:.2f} dB" if math.isfinite(psnr) else "equal"
    for ssim in (fidelity.ssim_rgb, fidelity.ssim_y):
        yield f"{ssim:.4f}"


@dataclass(frozen=True, slots=True)
class Rendering:
    """Samples to render before scoring."""

    model: Path

    samples: int
    """Number of samples, of consecutive seeds."""

    request: Request

    keep: Path | None
    """Folder for the samples' stores; None to delete them."""

    workers: Workers | None = None
    """Workers that render the samples; None: this process."""


def against(
    photograph: Path,
    images: Sequence[Path],
    rendering: Rendering | None,
    metrics: str,
    weights_folder: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Score images, or samples that are rendered first, against a photograph, and print the scores."""
    available, notes = choose_metrics(metrics, weights_folder)
    for note in notes:
        log(note)
    fix_malloc_thresholds()
    chosen_device = choose_device(device)
    inception = weights.load_inception(weights_folder, chosen_device) if "sifid" in available else None
    lpips = weights.load_lpips(weights_folder, chosen_device) if "lpips" in available else None
    real = _open(photograph)
    with _interruptible(rendering), _samples(images, rendering) as paths:
        samples = [_open(path) for path in paths]
        if lpips is not None and len(samples) < 2:
            raise UsageError(
                f"LPIPS: needs at least 2 samples, there is 1; add samples, or use {option('metrics', 'sifid')}"
            )
        real = _at_height(real, samples)
        total = rows_to_read(real, samples, lpips=lpips is not None)
        with PeakMemory(chosen_device) as peak, meter("scoring", total) as bar:
            scores = score_samples(real, samples, inception, lpips, bar.advance)
    if as_json:
        report.print_json({**scores.to_json(), "missing": notes, "host_peak": peak.host, "device_peak": peak.device})
    else:
        _print(scores, rendering.model.name if rendering else "these samples")
        report.line(f"peak memory {readable(peak.host)}")


def choose_metrics(text: str, folder: Path | None) -> tuple[tuple[str, ...], list[str]]:
    """Choose the metrics with trained weights.

    Args:
        text: ``available``, ``free``, ``all``, or names separated by commas.
        folder: searched for weights before PyTorch's cache.

    Returns:
        Names of the metrics to compute, and a line for each file whose absence prevents one.

    Raises:
        UsageError: a name is unknown.
        InputError: a metric other than by ``available`` lacks a file.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    if text in (AVAILABLE, ALL):
        names = TRAINED
    elif text == FREE:
        names = ()
    if unknown := [name for name in names if name not in TRAINED]:
        raise UsageError(
            f"{option('metrics', unknown[0])}: unknown; use {AVAILABLE}, {FREE}, {ALL}, or {', '.join(TRAINED)} "
            "separated by commas"
        )
    missing = {name: lines for name in names if (lines := weights.missing(name, folder))}
    if missing and text != AVAILABLE:
        problems = "; ".join(line for lines in missing.values() for line in lines)
        raise InputError(f"{problems}; or name the folder with {option('weights_dir')}")
    notes = [
        f"{name.upper()} is left out: {line}, or name the folder with --weights-dir"
        for name, lines in missing.items()
        for line in lines
    ]
    return tuple(name for name in names if name not in missing), notes


def _open(path: Path) -> Sample:
    sample = open_image(path)
    for note in sample.notes:
        log(f"{path}: {note}")
    return sample


def _at_height(photograph: Sample, samples: Sequence[Sample]) -> Sample:
    """The photograph resampled to the samples' height: textures are comparable at one scale only."""
    height, width = photograph.size
    sample_height = samples[0].size[0] if samples else height
    if height == sample_height or not isinstance(photograph.source, PictureSource):
        return photograph
    size = (sample_height, max(1, round(width * sample_height / height)))
    log(f"{photograph.name}: resampled from {width}x{height} to {size[1]}x{size[0]}, the samples' height")
    return Sample(photograph.name, photograph.source.resampled(size))


@contextmanager
def _interruptible(rendering: Rendering | None) -> Iterator[None]:
    """Turn Ctrl-C into an error that says which samples remain."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted):  # the second one is that of workers
        if rendering is None or rendering.keep is None:
            raise Interrupted("stopped: nothing is kept") from None
        raise Interrupted(f"stopped: {rendering.keep} keeps the samples; repeat the command to continue") from None


@contextmanager
def _samples(images: Sequence[Path], rendering: Rendering | None) -> Iterator[list[Path]]:
    """Paths of the images to score.

    All rendered samples exist at once, because LPIPS needs every pair; a store is a tenth of the size of its features.
    """
    if rendering is None:
        yield expand(images)
    elif rendering.keep is not None:
        yield _rendered(rendering, rendering.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="engine-score-") as folder:
            yield _rendered(rendering, Path(folder))


def _rendered(rendering: Rendering, folder: Path) -> list[Path]:
    """Render the samples that the folder does not hold yet; returns the paths of all stores."""
    folder.mkdir(parents=True, exist_ok=True)
    request = rendering.request
    seeds = range(request.seed, request.seed + rendering.samples)
    replace(request, seed=seeds[-1])  # refuse the last seed now, not after all other renders
    paths = [folder / f"sample-{seed}.zarr" for seed in seeds]
    if rendering.workers is not None:
        _render_by_workers(rendering.workers, rendering.model, [replace(request, seed=seed) for seed in seeds], paths)
        return paths
    model = load(rendering.model)
    with meter("rendering", rendering.samples) as bar:
        for seed, path in zip(seeds, paths, strict=True):
            job = Job.prepare(model, replace(request, seed=seed), path, log)
            job.check_room(sum(not p.exists() for p in paths))
            _render(job, bar)
    malloc_trim()
    return paths


def _render_by_workers(workers: Workers, model: Path, requests: Sequence[Request], paths: Sequence[Path]) -> None:
    """Let workers render the samples, one each at a time; those that are complete are left."""
    from engine.workers.conduct import Work
    from engine.workers.tasks import order_of, render_sample

    shares = [0.0] * len(paths)
    memory, device = requests[0].memory, requests[0].device
    with (
        deferred_interrupt(lambda: log("stopping after the shards that are being written")) as stop,
        workers.conductor(memory) as conductor,
        meter("rendering", len(paths)) as bar,
    ):

        def advance(index: int, share: float) -> None:
            more, shares[index] = max(0.0, share - shares[index]), max(share, shares[index])
            bar.advance(more, paths[index].name)

        works = [
            Work("render-sample", render_sample, (order_of(model, request, path, conductor.topic), tuple(paths)))
            for request, path in zip(requests, paths, strict=True)
        ]
        conductor.run(works, on_share=advance, cancelled=stop.is_set, device=device)


def _render(job: Job, bar: Meter) -> None:
    sink = job.open_sink(resume=True, overwrite=False)
    total = sum(job.projection.lr_pixels)
    for _ in job.run(sink, lambda stage, pixels: bar.advance(pixels / total, job.out.name)):
        pass
    if not total:
        bar.advance(1, job.out.name)  # the store was complete before


def _print(scores: Scores, name: str) -> None:
    (height, width), (base_height, base_width) = scores.size, scores.base
    report.line(
        f"{counted(len(scores.samples), 'sample')} of {width}x{height} against {scores.photograph}; "
        f"layout compared at {base_width}x{base_height}"
    )
    print_table(("measure", "samples", "photograph itself", "unit"), _rows(scores))
    lpips = scores.diversity.lpips if scores.diversity else None
    sifid = scores.sifid
    if sifid or lpips:
        ours = (
            name,
            "/".join(f"{v:.2f}" for v in sifid.values()) if sifid else "-",
            f"{lpips[RANGES[0]]:.2f}" if lpips else "-",
        )
        report.line("as a row of the paper's Table 4, whose rows are means over many photographs:")
        print_table(("model", "SIFID 5th/13th", "LPIPS"), (ours, *_PAPER))


def _rows(scores: Scores) -> Iterator[tuple[str, str, str, str]]:
    """Measure, value of the samples, value of the photograph itself (or the best possible one), unit."""
    for layer, value in (scores.sifid or {}).items():
        yield f"SIFID, layer {layer}", f"{value:.3f}", "0", "lower is nearer"
    if scores.diversity is not None:
        for input_range, value in (scores.diversity.lpips or {}).items():
            yield f"LPIPS over pairs, input in {input_range}", f"{value:.3f}", "", "higher is more varied"
        yield "diversity (std over samples / std of the photograph)", f"{scores.diversity.pixels:.3f}", "", "of 1"
        yield "RMS difference of two samples", f"{scores.diversity.rms:.2f}", "", "levels"
    yield "colour of rows, top to bottom", f"{scores.colour_profile:.2f}", "0", "levels"
    for index, (value, floor) in enumerate(zip(scores.patches, scores.patch_floor, strict=False)):
        yield f"patches at 1/{PATCH_STEP**index}", f"{value:.2f}", f"{floor:.2f}", "levels"
    for side, value in asdict(scores.border).items():
        yield f"border, {side}", f"{value:+.2f}", f"{getattr(scores.photograph_border, side):+.2f}", "levels"
