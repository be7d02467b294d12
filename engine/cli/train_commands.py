"""The commands of ``engine train``. The docstring of a command is its help; torch is imported only inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from engine.cli.flags import Licence, QuietFlag, Source, VggPath, set_output
from engine.cli.options import BYTES
from engine.cli.options import Options as TrainingOptions

train_app = App(name="train")

Wrap = Annotated[
    Literal["x", "y", "both"] | None,
    Parameter(help="Axes along which the sample images of step 1 repeat; training and the model are the same."),
]


@train_app.command
def structure(
    photo: Path,
    /,
    *,
    out: Path,
    preset: Literal["quick", "quick-vgg", "paper"] | None = None,
    config: Path | None = None,
    iterations: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    padding: str | None = None,
    coordinates: Annotated[bool | None, Parameter(negative_bool="no-")] = None,
    ema: float | None = None,
    vgg: VggPath = None,
    device: str | None = None,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    memory: Annotated[int | None, BYTES] = None,
    vram: Annotated[int | None, BYTES] = None,
    seed: int = 0,
    wrap: Wrap = None,
    resume: bool = False,
    overwrite: bool = False,
    licence: Licence = "",
    source: Source = "",
    quiet: QuietFlag = False,
) -> None:
    """Train step 1 (HP-VAE-GAN with vertical coordinates) on one photograph.

    Args:
        photo: Photograph to train on.
        out: File of step 1 to write.
        preset: Preset: quick, quick-vgg or paper, see engine train preset; default: quick-vgg if VGG weights are found,
            otherwise quick.
        config: Edited preset as a TOML file, in place of --preset.
        iterations: Iterations per scale, one number for all or one for each; default: the preset's.
        padding: Padding of the convolutions: zeros (the paper), reflect, replicate, or circular for a photograph that
            repeats; default: the preset's.
        coordinates: Vertical coordinate convolution; without it, the vanilla baseline; default: the preset's.
        ema: Decay of the moving average (EMA) of the weights, which is saved; 0 saves the last weights (the paper);
            default: the preset's.
        device: Device: cpu, cuda, cuda:1, ...; default: a GPU if there is one.
        precision: Precision of the convolutions.
        memory: Memory that an iteration on the CPU may take, such as 2GiB; default: most of the free memory.
        vram: GPU memory that an iteration may take; default: most of the free memory.
        seed: Seed of the weights and the noise.
        resume: Continue from the last checkpoint, if there is one.
        overwrite: Replace an existing file.
    """
    from engine.cli.train import structure as run

    set_output(quiet)
    run(
        photo=photo,
        out=out,
        preset=preset,
        config=config,
        vgg=vgg,
        device=device,
        precision=precision,
        memory=memory,
        vram=vram,
        seed=seed,
        wrap=wrap,
        resume=resume,
        overwrite=overwrite,
        licence=licence,
        source=source,
        iterations=iterations,
        padding=padding,
        coordinates=coordinates,
        ema=ema,
    )


@train_app.default
def train(
    photo: Path,
    /,
    *,
    out: Path,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    wrap: Wrap = None,
    vgg: VggPath = None,
    licence: Licence = "",
    source: Source = "",
    quiet: QuietFlag = False,
) -> None:
    """Train step 1 and every super-resolution step on one photograph, and build the model file.

    Args:
        photo: Photograph to train on.
        out: Model file to write; work files go to NAME.training beside it.
    """
    from engine.cli.train import whole as run

    set_output(quiet)
    run(photo=photo, out=out, options=options, wrap=wrap, vgg=vgg, licence=licence, source=source)


@train_app.command
def sr(
    photo: Path,
    /,
    *,
    out: Path,
    step: Literal[2, 3, 4] = 2,
    size: int | None = None,
    sigma: float | None = None,
    structure: Path | None = None,
    previous: list[Path] | None = None,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    vgg: VggPath = None,
    licence: Licence = "",
    source: Source = "",
    quiet: QuietFlag = False,
) -> None:
    """Fine-tune the network of one super-resolution step on one photograph.

    Args:
        photo: Photograph to train on.
        out: Weights file to write (.safetensors, with the community's tensor names).
        step: Step to train: 2 (to 1K), 3 (to 4K) or 4 (to 16K).
        size: Width of the photograph in training, in pixels; default: the step's output, or the photograph's own if that is
            much smaller.
        sigma: Standard deviation of the input noise in training and rendering, relative to a value range of 0 to 1; default:
            the preset's.
        structure: File of step 1, whose images, enlarged by --previous, are trained on as well.
        previous: Weights of an earlier step, or a model that has them, once per step from step 2 on.
    """
    from engine.cli.train import sr as run

    set_output(quiet)
    run(
        photo=photo,
        out=out,
        options=options,
        sigma=sigma,
        step=step,
        width=size,
        structure=structure,
        previous=tuple(previous or ()),
        vgg=vgg,
        licence=licence,
        source=source,
    )


@train_app.command
def distil(
    *photos: Path,
    out: Path,
    teacher: str = "realsr",
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    quiet: QuietFlag = False,
) -> None:
    """Train a smaller network to reproduce a larger one, on photographs or folders of them.

    Args:
        photos: Photographs, or folders of them.
        out: Weights file to write (.safetensors, with the community's tensor names).
        teacher: Network to reproduce: realsr, x4plus or a checkpoint file.
    """
    from engine.cli.train import distil as run

    set_output(quiet)
    run(photos=photos, out=out, options=options, teacher=teacher)


@train_app.command
def preset(name: str = "quick", /) -> None:
    """Print a preset as TOML, to be edited and given to --config.

    Args:
        name: Preset: quick, quick-vgg, paper-esrgan, paper-swinir or distil.
    """
    from engine.cli.train import preset as run

    run(name)
