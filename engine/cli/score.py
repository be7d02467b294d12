"""engine score."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.cli import report
from engine.cli.progress import Meter, log, meter
from engine.cli.tables import print_table
from engine.device.choose import choose_device
from engine.device.heap import fix_malloc_thresholds, malloc_trim
from engine.device.memory import PeakMemory
from engine.errors import BudgetError, InputError, Interrupted, UsageError
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

AVAILABLE, FREE, ALL = "available", "free", "all"
TRAINED = tuple(weights.NEEDED)

_PAPER = (
    ("OUR-GAN with ESRGAN, paper, ST4K", "1.36/1.48", ".43"),
    ("OUR-GAN with SwinIR, paper, ST4K", ".94/1.26", ".41"),
    ("OUR-GAN with ESRGAN, paper, RAISE", "1.22/1.50", ".40"),
    ("OUR-GAN with SwinIR, paper, RAISE", ".97/1.48", ".38"),
)
"""Rows of Table 4: means over 25 and 50 photographs."""


def check(
    images: Sequence[Path], real: Path | None, reference: Path | None, model: Path | None,
    samples: int, keep: Path | None, request: Request,
) -> None:  # fmt: skip
    """Raise UsageError unless the options describe one of the three things that can be scored."""
    if (real is None) == (reference is None):
        raise UsageError("engine score needs either --real PHOTOGRAPH (or --against) or --reference PICTURE")
    if model is not None and (images or reference is not None):
        raise UsageError("--model renders its own samples for --against: leave the images and --reference out")
    if model is None and not images:
        raise UsageError("engine score needs images, stores or folders of them; or --model to render samples")
    if model is None and keep is not None:
        raise UsageError(f"--keep {keep}: keeps rendered samples, which only --model makes")
    if model is None and replace(request, device=None) != Request():
        raise UsageError("options of a render apply to --model only; for images that are there, leave them out")
    if samples < 1:
        raise UsageError(f"--samples {samples}: must be at least 1")
    if request.init is not None or request.roi is not None:
        raise UsageError("--init and --roi: samples are whole images that begin with step 1; leave these options out")


def reference(images: Sequence[Path], reference_path: Path, as_json: bool) -> None:
    """PSNR and SSIM of every image against the reference."""
    wanted = open_image(reference_path)
    samples = [open_image(path) for path in expand(images)]
    with meter("scoring", len(samples) * wanted.size[0]) as bar:
        found = [(s.name, compare(s.source, wanted.source, bar.advance, s.name)) for s in samples]
    if as_json:
        images_json = [{"name": name, **fidelity.to_json()} for name, fidelity in found]
        report.print_json({"reference": wanted.name, "images": images_json})
    else:
        head = ("image", "PSNR RGB", "PSNR Y", "SSIM RGB", "SSIM Y")
        print_table(head, [(name, *_fidelity_row(fidelity)) for name, fidelity in found])


def _fidelity_row(fidelity: Fidelity) -> Iterator[str]:
    for psnr in (fidelity.psnr_rgb, fidelity.psnr_y):
        yield f"{psnr:.2f} dB" if math.isfinite(psnr) else "equal"
    for ssim in (fidelity.ssim_rgb, fidelity.ssim_y):
        yield f"{ssim:.4f}"


@dataclass(frozen=True, slots=True)
class Rendering:
    """Samples that are made to be scored. ``keep``: where they stay; else they are deleted."""

    model: Path
    samples: int
    request: Request
    keep: Path | None


def against(
    photograph: Path,
    images: Sequence[Path],
    rendering: Rendering | None,
    metrics: str,
    weights_folder: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Score images, or samples that are rendered first, against a photograph."""
    asked, notes = choose_metrics(metrics, weights_folder)
    for note in notes:
        log(note)
    fix_malloc_thresholds()
    where = choose_device(device)
    inception = weights.load_inception(weights_folder, where) if "sifid" in asked else None
    lpips = weights.load_lpips(weights_folder, where) if "lpips" in asked else None
    real = open_image(photograph)
    with _stoppable(rendering), _samples(images, rendering) as paths:
        samples = [open_image(path) for path in paths]
        if lpips is not None and len(samples) < 2:
            raise UsageError("LPIPS is the mean over pairs, and there is 1 sample; give more, or --metrics sifid")
        real = _at_height(real, samples)
        total = rows_to_read(real, samples, lpips is not None)
        with PeakMemory(where) as peak, meter("scoring", total) as bar:
            scores = score_samples(real, samples, inception, lpips, bar.advance)
    if as_json:
        report.print_json({**scores.to_json(), "missing": notes, "host_peak": peak.host, "device_peak": peak.device})
    else:
        _print(scores, rendering.model.name if rendering else "these samples")
        report.line(f"peak memory {readable(peak.host)}")


def choose_metrics(text: str, folder: Path | None) -> tuple[tuple[str, ...], list[str]]:
    """The metrics to compute with trained weights, and a line for each file that keeps one from being computed.

    Raises InputError when a metric was asked for by name and a file of it is missing.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    if text in (AVAILABLE, ALL):
        names = TRAINED
    elif text == FREE:
        names = ()
    if unknown := [name for name in names if name not in TRAINED]:
        raise UsageError(
            f"--metrics {unknown[0]}: use {AVAILABLE}, {FREE}, {ALL}, or {', '.join(TRAINED)} with commas between"
        )
    absent = {name: lines for name in names if (lines := weights.missing(name, folder))}
    notes = [f"{name.upper()} is left out: {line}" for name, lines in absent.items() for line in lines]
    if absent and text != AVAILABLE:
        raise InputError("; ".join(line for lines in absent.values() for line in lines))
    return tuple(name for name in names if name not in absent), notes


def _at_height(photograph: Sample, samples: Sequence[Sample]) -> Sample:
    """The photograph at the samples' height: textures can be compared only at one scale."""
    height, width = photograph.size
    wanted = samples[0].size[0] if samples else height
    if height == wanted or not isinstance(photograph.source, PictureSource):
        return photograph
    size = (wanted, max(1, round(width * wanted / height)))
    log(f"{photograph.name}: resampled from {width}x{height} to {size[1]}x{size[0]}, the samples' height")
    return Sample(photograph.name, photograph.source.resampled(size))


@contextmanager
def _stoppable(rendering: Rendering | None) -> Iterator[None]:
    """After Ctrl-C, says what is left."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            f"the same command goes on with what {rendering.keep} holds"
            if rendering and rendering.keep
            else "nothing is kept"
        )
        raise Interrupted(f"stopped; {kept}") from None


@contextmanager
def _samples(images: Sequence[Path], rendering: Rendering | None) -> Iterator[list[Path]]:
    """What is scored. Rendered samples all lie there at once, because LPIPS needs every pair: a store takes a tenth of
    what the features of one picture would."""
    if rendering is None:
        yield expand(images)
    elif rendering.keep is not None:
        yield _rendered(rendering, rendering.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="engine-score-") as folder:
            yield _rendered(rendering, Path(folder))


def _rendered(rendering: Rendering, folder: Path) -> list[Path]:
    """The samples' stores; what a kept folder already holds is not rendered again."""
    folder.mkdir(parents=True, exist_ok=True)
    request = rendering.request
    seeds = range(request.seed, request.seed + rendering.samples)
    replace(request, seed=seeds[-1])  # refused now, not after the other renders
    paths = [folder / f"sample-{seed}.zarr" for seed in seeds]
    model = load(rendering.model)
    with meter("rendering", rendering.samples) as bar:
        for seed, path in zip(seeds, paths, strict=True):
            job = Job.prepare(model, replace(request, seed=seed), path, log)
            _check_disk(job, [p for p in paths if not p.exists()])
            _render(job, bar)
    malloc_trim()
    return paths


def _check_disk(job: Job, missing: Sequence[Path]) -> None:
    """All samples that are still to come must fit beside each other."""
    needed = len(missing) * job.projection.disk + job.projection.scratch
    if needed > job.measured.budget.disk:
        raise BudgetError(
            f"{len(missing)} samples may take {readable(needed)}, the disk of {job.out.parent} has "
            f"{readable(job.measured.budget.disk)} free; use fewer --samples, a smaller --size, or --keep on another disk"
        )


def _render(job: Job, bar: Meter) -> None:
    sink = job.open_sink(resume=True, overwrite=False)
    total = sum(job.projection.lr_pixels)
    for _ in job.run(sink, lambda stage, pixels: bar.advance(pixels / total, job.out.name)):
        pass
    if not total:
        bar.advance(1, job.out.name)  # it was there


def _print(scores: Scores, name: str) -> None:
    (height, width), (base_height, base_width) = scores.size, scores.base
    report.line(
        f"{len(scores.samples)} samples of {width}x{height} against {scores.photograph}; "
        f"layout looked at in {base_width}x{base_height}"
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
        report.line("as a row of the paper's Table 4, whose own are means over many photographs:")
        print_table(("model", "SIFID 5th/13th", "LPIPS"), (ours, *_PAPER))


def _rows(scores: Scores) -> Iterator[tuple[str, str, str, str]]:
    """Measure, samples, the photograph's own value or the least that could be expected, unit."""
    for layer, value in (scores.sifid or {}).items():
        yield f"SIFID, layer {layer}", f"{value:.3f}", "0", "lower is nearer"
    if scores.diversity is not None:
        for given, value in (scores.diversity.lpips or {}).items():
            yield f"LPIPS over pairs, input in {given}", f"{value:.3f}", "", "higher is more varied"
        yield "diversity (std over samples / std of the photograph)", f"{scores.diversity.pixels:.3f}", "", "of 1"
        yield "RMS difference of two samples", f"{scores.diversity.rms:.2f}", "", "levels"
    yield "colour of rows, top to bottom", f"{scores.colour_profile:.2f}", "0", "levels"
    for index, (value, floor) in enumerate(zip(scores.patches, scores.patch_floor, strict=False)):
        yield f"patches at 1/{PATCH_STEP**index}", f"{value:.2f}", f"{floor:.2f}", "levels"
    for side, value in asdict(scores.border).items():
        yield f"border, {side}", f"{value:+.2f}", f"{getattr(scores.photograph_border, side):+.2f}", "levels"
