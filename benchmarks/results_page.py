"""Write docs/results.md, docs/memory.png and docs/peers.png from the committed rows of benchmarks/results.

    python benchmarks/results_page.py

Each table shows the last row of each case and names the command that measures it again. Measures nothing.
"""

from __future__ import annotations

import csv
import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
PLOT = ROOT / "docs" / "memory.png"
PEERS_PLOT = ROOT / "docs" / "peers.png"

WIDTH = 100
RUNS = 6
"""Number of runs whose median stands for the speed of training."""

NAMES = {"realsr": "RealSR-DF2K", "x4plus": "Real-ESRGAN x4plus"}
"""Names of weights as people know them."""

Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """All committed rows of one CSV file, oldest first."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def latest(name: str, *keys: str) -> list[Row]:
    """Last row of each combination of ``keys``, in the order of first appearance."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows(name):
        last[tuple(row[key] for key in keys)] = row
    return list(last.values())


def machines() -> str:
    """All machines and versions of torch that the rows name."""
    tables = [path.stem for path in sorted(RESULTS.glob("*.csv"))]
    return "; ".join(sorted({f"{row['machine']}, torch {row['torch']}" for name in tables for row in rows(name)}))


def paragraph(text: str) -> str:
    """Text wrapped at the page's width; words and links stay whole."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def source(command: str, name: str, shown: Sequence[Row]) -> str:
    """Lines under a table: the command that measures it, its rows and their dates."""
    dates = sorted({row["date"] for row in shown})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"Measure again: `python benchmarks/{command}`.\nRows: [{name}.csv](../benchmarks/results/{name}.csv), {when}."
    )


def count(value: str) -> str:
    return f"{float(value):,.0f}"


def zero(value: str) -> str:
    return "0" if float(value) == 0 else value


def percent(ratio: float) -> str:
    return f"{ratio * 100:.1f} %"


def seamless() -> list[str]:
    bands = latest("bands_exact", "network", "case")
    work = latest("bands_work", "network", "rows")
    tiles = latest("exact", "network", "core")
    rounding = latest("rounding", "precision", "other")
    halos = latest("seams", "weights", "halo")
    return [
        "## Seamless",
        "### Bands equal the whole image",
        paragraph(
            "Bands stream a network row by row: every convolution keeps its last rows, so there are no tiles and no "
            "seams. The table compares bands with a run on the whole image, in float32. RRDBNet has the RealSR-DF2K "
            "weights; SwinIR-M has amplified random weights. [Decision 0006](decisions/0006-bands.md) explains how "
            "bands are derived from the `torch.fx` trace. On a CPU convolutions sum in another order than the plain network "
            "([0030](decisions/0030-bands-on-a-cpu.md)), so values differ by float32's rounding; bands of any height, and any "
            "number of threads, give the same bits. Some CPUs order the sums of a matrix product by its width: on one "
            "of them, SwinIR-M in strips differed by 6e-8, one rounding of float32, and in no 8-bit value."
        ),
        table(
            ("network", "image and case", "values", "largest difference", "8-bit values that differ"),
            [
                (row["network"], row["case"], count(row["values"]), zero(row["max_difference"]), row["differing_8bit"])
                for row in bands
            ],
        ),
        source("bench_bands.py exact", "bands_exact", bands),
        paragraph(
            "Multiply-adds that bands execute for a 16384x8640 frame, divided by those of the whole image: "
            + ", ".join(f"{float(row['ratio']):.4f} ({row['network']})" for row in work)
            + "."
        ),
        source("bench_bands.py work", "bands_work", work),
        "### Tiles with the exact halo equal the whole image",
        paragraph(
            "`--overlap exact` uses the theoretical receptive field as halo. Float32, same networks as above; "
            "`tile` and `halo` are in low-resolution pixels."
        ),
        table(
            ("network", "image", "tile", "halo", "tiles", "largest difference"),
            [
                (*(row[key] for key in ("network", "size", "core", "halo", "tiles")), zero(row["max_difference"]))
                for row in tiles
            ],
        ),
        source("bench_exact.py", "exact", tiles),
        paragraph(
            "At other sizes a convolution may run by another algorithm, with another order of sums, and a value near the "
            "middle between two levels becomes the other one. The promise is therefore: at most one level, in fewer than 1 "
            "value of 10,000. [Reliability](reliability.md#rounding) measures it at random sizes."
        ),
        "### Other processors and threads",
        paragraph(
            "The same plan with other instructions or another number of threads: the default model in bands at 1024x768, "
            "against one thread with all instructions. A store records both, and a resume under others needs "
            "`--accept-backend`."
        ),
        table(
            ("precision", "other", "values", "values that differ", "largest difference in levels"),
            [
                (row["precision"], row["other"], count(row["values"]), count(row["differing"]), row["max_levels"])
                for row in rounding
            ],
        ),
        source("bench_rounding.py threads", "rounding", rounding),
        "### Smaller halos: error in levels of 255",
        paragraph(
            "`engine probe` measures this curve for each stage, and `--overlap auto` takes the smallest halo whose "
            "largest error is at most one level (`--seam-tolerance`). Real-ESRGAN's own script pads tiles by 10 pixels "
            "for every network. The paper takes the radius that holds 98 % of the squared gradient: "
            + ", ".join(f"{row['r98_square']} px for {NAMES[row['weights']]}" for row in halos if row["halo"] == "0")
            + ". Both networks are RRDBNet 64x23. Content: two photograph crops, float32."
        ),
        _halo_table(halos),
        source("bench_seams.py", "seams", halos),
    ]


def _halo_table(halos: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["weights"] for row in halos))
    points = {(row["weights"], int(row["halo"])): row for row in halos}
    header = ["halo (px)", *(f"{NAMES[name]}: {part}" for name in names for part in ("mean", "99.9 %", "max"))]
    body = []
    for halo in sorted({halo for _, halo in points}):
        cells = [str(halo)]
        for name in names:
            row = points.get((name, halo))
            cells += [f"{float(row[key]):.2f}" for key in ("mean", "p999", "max")] if row else ["< 0.02"] * 3
        body.append(cells)
    return table(header, body)


def bounded() -> list[str]:
    tiles = by_size("memory")
    bands = by_size("bands_memory")
    peaks = [float(row["measured"]) for row in tiles]
    errors = [float(row["projected"]) / float(row["measured"]) - 1 for row in bands]
    first = tiles[0]
    return [
        "## Bounded",
        paragraph(
            "The plan projects memory before the run and refuses a render that exceeds `--memory`. All sizes below are "
            "MiB above the idle process."
        ),
        "### Tiles: memory does not grow with the image",
        paragraph(
            f"A small network of the default architecture (16 channels, 1 block), tile {first['tile']}, "
            f"`--memory {first['budget']}`. The measured peaks differ by {percent(max(peaks) / min(peaks) - 1)} from "
            "4K to half a gigapixel. Step 1 cannot be tiled: it takes 2 KB for each pixel of the base image, which has "
            "1/4096 of the output's pixels."
        ),
        _memory_table(tiles),
        source("bench_memory.py tiles", "memory", tiles),
        "![Peak memory against image size](memory.png)",
        "### Bands: memory grows with the width only",
        paragraph(
            "64 channels, 1 block, two stages, from a picture of noise, which compresses worst. The projection lies "
            f"between {min(errors) * 100:+.1f} % and {max(errors) * 100:+.1f} % of the measured peak."
        ),
        _memory_table(bands),
        source("bench_memory.py bands", "bands_memory", bands),
    ]


def by_size(name: str) -> list[Row]:
    """Last row of each size, by width and then height."""
    return sorted(latest(name, "size"), key=lambda row: [int(n) for n in row["size"].split("x")])


def _peers() -> list[str]:
    """Runtimes on a CPU, in turns within one run."""
    shown = latest("peers", "size", "busy", "peer")
    body = [
        (
            row["peer"], f"{row['size']}{', busy' if row['busy'] == '1' else ''}", row["seconds"] or "-",
            count(row["gflop_s"]), row["peak_mib"], *(row[key] or "-" for key in ("mean", "p999", "max")),
        )
        for row in shown
    ]  # fmt: skip
    return [
        "### Beside other runtimes on a CPU",
        paragraph(
            f"RRDBNet 64x23 with RealSR-DF2K weights, {shown[0]['threads']} threads, in turns within one run, medians. Errors "
            "are levels of 255 against the whole picture in fp32. The ceiling is one 3x3 convolution of a dense block. "
            "*Busy*: beside a process that takes one core."
        ),
        table(("runtime", "input", "seconds", "GFLOP/s", "peak MiB", "mean", "99.9 %", "worst"), body),
        "![Speed of each runtime](peers.png)",
        source("bench_peers.py", "peers", shown),
    ]


def _memory_table(shown: Sequence[Row]) -> str:
    return table(
        ("image", "megapixels", "measured (MiB)", "projected (MiB)", "seconds"),
        [
            (row["size"], row["megapixels"], *(count(row[key]) for key in ("measured", "projected", "seconds")))
            for row in shown
        ],
    )


def fast() -> list[str]:
    (overhead,) = latest("overhead")
    time = latest("bands_time", "way")
    beside = {row["way"]: row for row in latest("bands_beside", "way")}
    return [
        "## Fast",
        paragraph(
            f"A render by tiles takes {float(overhead['ratio']):.3f} times as long as the bare network on the same "
            f"tiles (median of {overhead['repeats']} runs, {float(overhead['min']):.3f} to "
            f"{float(overhead['max']):.3f})."
        ),
        source("bench_overhead.py", "overhead", [overhead]),
        "### A 16384x8640 frame from 4096x2160",
        paragraph(
            "RRDBNet 64x23 with RealSR-DF2K weights, two threads. Times are extrapolated from measured bands and tiles "
            "of one run. The halo of the engine's tiles is chosen so that the worst pixel stays within one level. The "
            "last way is Real-ESRGAN's loop, whose worst pixel is off by "
            f"{_customary_error():.1f} levels (halo 10 in the table above)."
        ),
        table(
            ("way", "seconds", "relative to bands in bf16"),
            [(row["way"], count(row["seconds"]), f"{float(row['bands_bf16_times']):.2f}") for row in time],
        ),
        source("bench_bands.py time", "bands_time", time),
        paragraph(
            "The ratios depend on the CPU's speed in bf16 and on the size of the tiles. Expect smaller ones where bf16 is "
            "no faster than float32, and for narrow frames; `make bench-quick` prints them for 256 columns."
        ),
        paragraph(
            "`--precision auto` takes bf16 (fp16 on a GPU) from the stage on where the measured error of the whole "
            "chain stays within 0.3 levels on average and 2 levels for 99.9 % of the values."
        ),
        paragraph(
            "With another process on one of the two cores, bands take 2.3 times as long. They would take 15 to 25 "
            "times as long with OpenMP's default spin-waiting, which the command line turns off ([log](log.md))."
        ),
        *_peers(),
        "### Writing while computing",
        paragraph(
            f"A {beside['beside']['image']} render of noise by a network so small that writing matters: "
            f"{beside['beside']['seconds']} s with a writer thread, {beside['in turn']['seconds']} s without."
        ),
        source("bench_bands.py beside", "bands_beside", list(beside.values())),
        paragraph(
            "**Not yet measured on a GPU**; a section below has a forecast. `benchmarks/gpu_quick.py` measures one in eight "
            "minutes. The batched "
            "executor (`--executor stream`) and the Triton kernels are tested on a CPU, in Triton's interpreter, and "
            "compiled for five kinds of GPU."
        ),
        *_machine_code(),
    ]


def _machine_code() -> list[str]:
    shown = latest("machine_code", "kernel", "architecture")
    by_kernel: dict[str, dict[str, Row]] = {}
    for row in shown:
        by_kernel.setdefault(row["kernel"], {})[row["architecture"]] = row

    def cells(row: Row) -> tuple[str, ...]:
        return row["registers"], f"{row['tensor_core']} of {row['loop']}", percent(float(row["share"]))

    return [
        "### Machine code of the Triton kernels",
        paragraph(
            "Share of tensor-core instructions in the innermost loop, in fp16, for an RTX 40 (sm_89) and an H100 (sm_90), whose "
            "instruction multiplies 4 to 16 times as much. No kernel spills registers on sm_80, sm_86, sm_89, sm_90 and sm_120."
        ),
        table(
            ("kernel", "registers, sm_89", "in the loop", "share", "registers, sm_90", "in the loop", "share"),
            [(name, *cells(rows["sm_89"]), *cells(rows["sm_90"])) for name, rows in by_kernel.items()],
        ),
        source("bench_machine_code.py", "machine_code", shown),
    ]


def forecasts() -> list[str]:
    counts = latest("forecast_counts", "network", "way", "operations")
    shown = latest("forecast", "network", "way", "operations", "gpu", "image", "vram")
    large = [row for row in shown if row["image"] == "16384x8640" and float(row["vram"]) > 2]
    tight = [
        row for row in shown if row["gpu"] == "RTX 4090" and float(row["vram"]) < 2 and row["operations"] == "kernels"
    ]
    seconds = {(row["network"], row["gpu"], row["way"], row["operations"]): float(row["seconds"]) for row in large}
    bounds = {(row["network"], row["gpu"]): f"{row['bound']} ({percent(float(row['share']))})" for row in large}
    ways = [(way, operations) for way in ("tiles", "bands") for operations in ("PyTorch", "kernels")]
    return [
        "## Forecast for GPUs",
        paragraph(
            "**Nothing in this section is measured.** Operations, traffic and live memory of the networks are counted, "
            "and held against the published ceilings of each GPU: `engine plan --gpu rtx-4090` does the same for any "
            "render. Each operation takes the time of the ceiling that binds it, so a faster measurement refutes the "
            "forecast, and so does one that is far slower: kernels that reach half of a ceiling, for instance. Caches "
            "and everything but the networks are left out."
        ),
        table(
            (
                "network",
                "way",
                "operations",
                "MFLOP a pixel",
                "KB of traffic a pixel",
                "launches",
                "bytes held a pixel",
            ),
            [
                (
                    *(row[key] for key in ("network", "way", "operations", "mflop", "kilobytes")),
                    count(row["launches"]),
                    row["memory"],
                )
                for row in counts
            ],
        ),
        paragraph(
            "Pixels are those of the input; a band has 32 rows of 4096. Enlarged four times to 16384x8640 in fp16 with the whole "
            "memory of the card, by PyTorch's operations and by the engine's kernels, in seconds; the last column is for bands "
            "by kernels:"
        ),
        table(
            ("network", "GPU", *(f"{way}, {operations}" for way, operations in ways), "bound by"),
            [
                (network, gpu, *(f"{seconds[network, gpu, *way]:.3g}" for way in ways), bound)
                for (network, gpu), bound in bounds.items()
            ],
        ),
        paragraph(
            "Memory includes 600 MiB for the context and, in tiles, a quarter more than what is live, for the allocator. "
            "`work` counts the halos: 1 is the whole image. Halos are 40, or 14 for the small network of the shipped models:"
        ),
        table(
            ("network", "image", "`--vram` (GiB)", "way", "tile or strip", "work", "VRAM (GiB)"),
            [
                (
                    row["network"],
                    row["image"],
                    row["vram"],
                    row["way"],
                    row["tile"],
                    f"{float(row['work']):.2f}",
                    row["device"],
                )
                for row in tight
            ],
        ),
        "Count again: `python benchmarks/bench_forecast.py`.\n"
        "Rows: [forecast_counts.csv](../benchmarks/results/forecast_counts.csv) and\n"
        f"[forecast.csv](../benchmarks/results/forecast.csv), {shown[-1]['date']}.",
    ]


def _customary_error() -> float:
    (row,) = [row for row in latest("seams", "weights", "halo") if (row["weights"], row["halo"]) == ("realsr", "10")]
    return float(row["max"])


def safe() -> list[str]:
    kills = [row for row in latest("faults", "part", "case", "first", "last") if row["part"] == "kills"]
    cases = {row["case"]: [0, 0] for row in kills}
    for row in kills:
        cases[row["case"]][0] += int(row["faults"])
        cases[row["case"]][1] += int(row["failures"])
    return [
        "## Safe",
        paragraph(
            f"{sum(hits for hits, _ in cases.values())} processes were killed with `kill -9` at random moments, and the "
            "same command was run again to its end. Its files, and the tensors of a training, are compared bit for bit with "
            "those of an undisturbed run. [Reliability](reliability.md) has the other faults: full disks, damage, races, "
            "hostile files, limits and signals."
        ),
        table(("command", "kills", "ends that differ"), [(case, *numbers) for case, numbers in cases.items()]),
        source("faults.py kills", "faults", kills),
        paragraph(
            "The stores pass a third-party OME-Zarr validator and open bit-equal in tensorstore. The TIFF files open "
            "in tifffile and OpenSlide with all levels. `make test` checks both."
        ),
    ]


def training() -> list[str]:
    memory = latest("training_memory", "case")
    speed: dict[str, list[Row]] = {}
    for row in rows("training"):
        if row["what"] == "seconds an iteration":
            speed.setdefault(row["case"], []).append(row)
    recent = {case: all_rows[-RUNS:] for case, all_rows in speed.items()}
    return [
        "## Cost of training",
        "### Memory",
        paragraph("Peak resident memory of the whole process. The crops and batches of fine-tuning are the paper's."),
        table(
            ("training", "GiB"),
            [(_training_case(row["case"]), f"{float(row['resident_MiB']) / 1024:.2f}") for row in memory],
        ),
        source("bench_training.py memory", "training_memory", memory),
        "### Speed of step 1",
        paragraph(
            "Seconds of an iteration, beside a plain implementation that recomputes all lower scales with gradients. "
            f"Both reach the same losses within noise. The ratio is the median of the last {RUNS} runs; seconds are "
            "those of the last run."
        ),
        table(
            ("scale", "engine (s)", "plain (s)", "plain / engine", "range"),
            [_speed(case, runs) for case, runs in recent.items()],
        ),
        source("bench_training.py speed", "training", [row for runs in recent.values() for row in runs]),
    ]


def weights() -> list[str]:
    """Community networks on a photograph."""
    shown = latest("weights", "network")
    size = shown[0]["picture"]
    body = [
        (
            row["network"], row["architecture"], row["way"] + ("" if row["picture"] == size else f", {row['picture']} px"),
            f"{row['peak_mib']} / {row['projected_mib']}", row["worst"], row["mean"], _printed(row["printed"]),
            f"{row['cpu_s']} / {row['whole_cpu_s']}",
        )
        for row in shown
    ]  # fmt: skip
    return [
        "## Community networks",
        paragraph(
            f"`engine upscale` of {size} pixels of a photograph in float32, beside the same network on the whole picture in plain "
            "PyTorch. Errors are levels of 255 between the two pictures in 8 bits; *printed* is what the plan says. Seconds are "
            "CPU time of the process, with its start and measurements; after the slash, plain PyTorch's. The files of "
            "realesr-animevideov3 x3 and x2 hold the weights of x4, byte for byte, and reduce its result; so does `--scale`."
        ),
        table(
            ("network", "architecture", "way", "peak / projected MiB", "worst", "mean", "printed", "CPU seconds"),
            body,
        ),
        source("bench_weights.py", "weights", shown),
    ]


def _printed(error: str) -> str:
    """Error of a plan: "exact", or that of tiles against the whole picture."""
    if not error.startswith("{"):
        return error
    levels = json.loads(error)
    return f"mean {levels['mean']:.2g}, worst {levels['max']:.2g}"


def programs() -> list[str]:
    """Tiles of other programs."""
    shown = latest("tiling", "network", "program")
    return [
        "## Beside other programs' tiles",
        paragraph(
            f"The rules of other programs, written from their description, on a CPU in fp32: {shown[0]['picture']} pixels of a "
            "photograph, with the same weights, each in a process of its own. Errors are levels of 255 against the whole "
            "picture. A seam is the largest step of the error across a tile's border; for the engine, between any two "
            "neighbours. The largest picture of 4:3 within a memory is computed from measured tiles and the bytes that a result "
            "holds; the engine's is the largest of three sizes whose plan fits. The last table renders some of them."
        ),
        *(part for network in dict.fromkeys(row["network"] for row in shown) for part in _programs(network, shown)),
        paragraph(
            "The other programs hold the whole result, so memory bounds their pictures; the engine's are bounded by the disk. Its "
            "memory follows the width and not the height of a picture, so a flat one shows it at its worst. "
            "Only the buffers that a rule needs are held here: the programs themselves take more. ComfyUI halves its tiles "
            "where memory is exhausted; the errors are those of tiles of 512. The engine's time includes a store with its "
            "pyramid."
        ),
        source("bench_tiling.py", "tiling", shown),
        *_largest_pictures(),
    ]


def _largest_pictures() -> list[str]:
    """Pictures that other programs should just hold, and longer ones, as they were rendered."""
    shown = latest("tiling_largest", "network", "program", "picture")
    head = ("program", "picture", "peak MiB", "limit MiB", "seconds")
    body = [tuple(row[key] for key in ("program", "picture", "peak_mib", "limit_mib", "seconds")) for row in shown]
    return [
        f"### Rendered: {shown[0]['network']}",
        paragraph(
            "The picture that was computed above for a program, and one with sides a tenth longer; the engine renders the longest "
            "of them all. ncnn and ComfyUI take more than was computed, so their largest pictures are smaller."
        ),
        table(head, body),
        source("bench_tiling.py largest", "tiling_largest", shown),
    ]


def _programs(network: str, shown: Sequence[Row]) -> list[str]:
    own = [row for row in shown if row["network"] == network]
    body = [
        (
            row["program"], row["peak_mib"], row["cpu_s"], *(f"{float(row[key]):.2f}" for key in ("worst", "p999", "mean", "seam")),
            row["largest"] or "none",
        )
        for row in own
    ]  # fmt: skip
    limit = int(own[0]["limit_mib"]) // 1024
    head = ("program", "peak MiB", "CPU seconds", "worst", "99.9 %", "mean", "seam", f"largest in {limit} GiB")
    return [f"### {network}", table(head, body)]


def _training_case(case: str) -> str:
    return case.replace("structure seen by VGG", "step 1 through VGG-19").replace("structure", "step 1")


def _speed(case: str, runs: Sequence[Row]) -> tuple[str, ...]:
    ratios = [float(row["plain_over_ours"]) for row in runs]
    middle, last = statistics.median(ratios), runs[-1]
    span = f"{min(ratios):.1f} to {max(ratios):.1f}"
    return case, f"{float(last['ours']):.2f}", f"{float(last['plain']):.2f}", f"{middle:.1f}", span


def page() -> str:
    """The whole page as Markdown."""
    head = [
        "# Results",
        "<!-- Written by benchmarks/results_page.py; edit that file. -->",
        paragraph(
            "Measurements behind each promise of the [README](../README.md). Every table comes from committed rows "
            "of [benchmarks/results](../benchmarks/results) and names the command that measures it again. "
            "`make bench-quick` measures the main figures again in five minutes. [How good the pictures are](quality.md) "
            "has a page of its own."
        ),
        paragraph(
            f"Machine of all rows: {machines()}; a shared virtual machine. Only ratios within one run are comparable."
        ),
    ]
    return (
        "\n\n".join(
            [*head, *seamless(), *bounded(), *fast(), *forecasts(), *safe(), *weights(), *programs(), *training()]
        )
        + "\n"
    )


def plot(path: Path = PLOT) -> None:
    """Measured and projected peak memory against the size of the image: tiles on the left, bands on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    tall = [row for row in by_size("bands_memory") if row["size"].startswith("1024x")]
    wide = [row for row in by_size("bands_memory") if row["size"].endswith("x2048")]
    _curves(left, by_size("memory"), "tab:blue", "")
    _curves(right, wide, "tab:blue", "wider: 4096 to 16384 x 2048, ")
    _curves(right, tall, "tab:green", "taller: 1024 x 8192 to 131072, ")
    left.set(title="Tiles of 512, 16 channels", ylabel="peak memory, MiB above the idle process", ylim=(0, None))
    right.set(title="Bands, 64 channels")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="image size (megapixels)", xticks=[10, 30, 100, 300])
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="upper right" if axes is right else "lower right")
    figure.savefig(path, dpi=110)


def plot_peers(path: Path = PEERS_PLOT) -> None:
    """Speed of each runtime, one panel for each size of picture."""
    from matplotlib.figure import Figure

    shown = latest("peers", "size", "busy", "peer")
    sizes = list(dict.fromkeys((row["size"], row["busy"]) for row in shown))
    figure = Figure(figsize=(9, 2.6 * len(sizes)), layout="constrained")
    for axes, (size, busy) in zip(figure.subplots(len(sizes), 1, squeeze=False).flat, sizes, strict=True):
        panel = [row for row in shown if (row["size"], row["busy"]) == (size, busy)][::-1]
        colours = ["tab:blue" if row["peer"].startswith("engine") else "tab:gray" for row in panel]
        axes.barh([row["peer"] for row in panel], [float(row["gflop_s"]) for row in panel], color=colours)
        axes.set(xlabel="GFLOP/s", title=f"{size}{', one core taken' if busy == '1' else ''}")
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)


def _curves(axes, shown: Sequence[Row], colour: str, name: str) -> None:
    x = [float(row["megapixels"]) for row in shown]
    axes.plot(x, [float(row["measured"]) for row in shown], "o-", color=colour, label=f"{name}measured")
    axes.plot(x, [float(row["projected"]) for row in shown], "--", color=colour, alpha=0.7, label=f"{name}projected")


if __name__ == "__main__":
    PAGE.write_text(page())
    plot()
    plot_peers()
