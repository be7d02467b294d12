"""Peak memory and time of every exporter, beside another program on the same pixels, in alternating turns.

The store holds parts of an enlarged photograph with noise (sigma 1.5): eight shards, copied so that none returns within
deflate's window, which makes large stores cheap and compresses them as pictures. Each export runs in a process of its own.
Memory is the peak above the imports (VmHWM); time is that of the clock and of all cores. The other program reads a tiled
TIFF of the same pixels with lossless compression (deflate), as the store's are (zstd).

    python benchmarks/bench_export.py 16384x8640 --turns 3
    python benchmarks/bench_export.py 131072x2048 --format tif,dzi,exr --no-peer
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import zarr
from harness import add_row
from PIL import Image

SHARD, CHUNK = 2048, 512

KINDS = 8
"""Different shards: as many, side by side, exceed the 32 KiB in which deflate finds repetitions."""

PHOTO = Path(__file__).parent / "photos" / "picosdeeuropa-crop.jpg"

OURS = {
    "tif": ("a.tif", {}),
    "tif-lzw": ("a.tif", {"compression": "lzw"}),
    "tif-web": ("a.tif", {"preset": "web"}),
    "ome.tif": ("a.ome.tif", {}),
    "dzi": ("a.dzi", {}),
    "dzi.zip": ("a.dzi.zip", {}),
    "iiif": ("a.iiif", {}),
    "html": ("a.html", {}),
    "ozx": ("a.ozx", {}),
    "exr": ("a.exr", {}),
    "png": ("a.png", {}),
    "jpg": ("a.jpg", {}),
    "webp": ("a.webp", {}),
}
"""Format -> (name of the file, options of ``export``)."""

PEERS = {
    "tif": ("vips", "tiffsave", {"tile": True, "tile_width": 512, "tile_height": 512, "pyramid": True,
                                 "compression": "deflate", "predictor": "horizontal", "bigtiff": True}),
    "tif-lzw": ("vips", "tiffsave", {"tile": True, "tile_width": 512, "tile_height": 512, "pyramid": True,
                                      "compression": "lzw", "predictor": "horizontal", "bigtiff": True}),
    "tif-web": ("vips", "tiffsave", {"tile": True, "tile_width": 512, "tile_height": 512, "pyramid": True,
                                      "compression": "jpeg", "Q": 85, "bigtiff": True}),
    "ome.tif": ("vips", "tiffsave", {"tile": True, "tile_width": 512, "tile_height": 512, "pyramid": True, "subifd": True,
                                     "compression": "deflate", "predictor": "horizontal", "bigtiff": True}),
    "dzi": ("vips", "dzsave", {"tile_size": 512, "overlap": 0, "suffix": ".jpg[Q=85]"}),
    "dzi.zip": ("vips", "dzsave", {"tile_size": 512, "overlap": 0, "suffix": ".jpg[Q=85]", "container": "zip"}),
    "iiif": ("vips", "dzsave", {"tile_size": 512, "layout": "iiif3", "suffix": ".jpg[Q=85]"}),
    "html": ("vips", "dzsave", {"tile_size": 512, "overlap": 0, "suffix": ".jpg[Q=85]"}),  # tiles alone: it has no page
    "png": ("vips", "pngsave", {}),
    "jpg": ("vips", "jpegsave", {"Q": 90}),
    "webp": ("vips", "webpsave", {"Q": 90}),
    "ozx": ("zipfile", "", {}),
    "exr": ("maketx", "", {}),
}  # fmt: skip
"""Format -> (program, its function, its options)."""

PROBE = """
import json, os, resource, sys, time
from pathlib import Path
task = json.loads(sys.argv[1])

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

if task["program"] == "engine":
    import engine.exporters.pyramid, engine.exporters.view
    from engine.exporters import FORMATS, export, find_suffix
    __import__("engine.exporters." + FORMATS[find_suffix(Path(task["out"]))].module)
    from engine.device.heap import fix_malloc_thresholds
    fix_malloc_thresholds()  # as the command does
elif task["program"] == "maketx":
    import OpenImageIO as oiio
elif task["program"] == "vips":
    import pyvips
import zipfile
before, start, cpu = peak(), time.perf_counter(), os.times()
if task["program"] == "engine":
    export(task["store"], task["out"], **task["options"])
elif task["program"] == "vips":
    image = pyvips.Image.new_from_file(task["tiff"], access="sequential")
    getattr(image, task["call"])(task["out"], **task["options"])
elif task["program"] == "maketx":
    config = oiio.ImageSpec()
    config.attribute("maketx:filtername", "box")
    config.attribute("compression", "zip")
    config.format = oiio.TypeDesc("half")
    assert oiio.ImageBufAlgo.make_texture(oiio.MakeTxTexture, task["tiff"], task["out"], config), oiio.geterror()
else:
    with zipfile.ZipFile(task["out"], "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(Path(task["store"]).rglob("*")):
            archive.write(path, path.relative_to(task["store"]))
os.sync()
now = os.times()
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": now.user + now.system - cpu.user - cpu.system,
                  "peak": peak() - before}))
"""


def make_store(path: Path, width: int, height: int, dtype: str) -> None:
    """Write a store whose whole shards are copies of ``KINDS``."""
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    photo = Image.open(PHOTO).convert("RGB")
    large = photo.resize((SHARD + 300, SHARD + 300), Image.Resampling.BICUBIC)
    planes = np.asarray(large, np.float32).transpose(2, 0, 1) / 255  # [3, H, W]
    textures = []
    for kind in range(KINDS):
        y, x = 40 * kind, (97 * kind) % 300
        part = planes[:, y : y + SHARD, x : x + SHARD][:, :: -1 if kind % 2 else 1]
        noise = rng.normal(0, 1.5 / 255, part.shape).astype(np.float32)
        textures.append(np.clip((part + noise) * top, 0, top).astype(dtype))
    group = zarr.open_group(path, mode="w", zarr_format=3)
    whole: dict[int, Path] = {}
    datasets = []
    while True:
        level = str(len(datasets))
        array = group.create_array(
            level, shape=(3, height, width), dtype=dtype, chunks=(3, CHUNK, CHUNK), shards=(3, SHARD, SHARD),
            config={"write_empty_chunks": True}, dimension_names=["c", "y", "x"],
            compressors=[zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")],
        )  # fmt: skip
        for top_row in range(0, height, SHARD):
            for left in range(0, width, SHARD):
                rows, columns = min(SHARD, height - top_row), min(SHARD, width - left)
                kind = (left // SHARD + 3 * (top_row // SHARD)) % KINDS
                file = path / level / "c" / "0" / str(top_row // SHARD) / str(left // SHARD)
                if rows == columns == SHARD and kind in whole:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(whole[kind], file)
                    continue
                box = (slice(None), slice(top_row, top_row + rows), slice(left, left + columns))
                array[box] = textures[kind][:, :rows, :columns]
                if rows == columns == SHARD:
                    whole[kind] = file
        scale = [1.0, 2.0 ** len(datasets), 2.0 ** len(datasets)]
        datasets.append({"path": level, "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        if max(width, height) <= CHUNK:
            break
        width, height = -(-width // 2), -(-height // 2)
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    group.attrs["ourgan"] = {"complete": True, "seed": 7, "licences": ["CC0-1.0"]}


def measure(task: dict[str, object], folder: Path) -> dict[str, float]:
    """Run one export in a new process and remove what it wrote."""
    out = folder / "out"
    out.mkdir()
    task = {**task, "out": str(out / str(task["name"]))}
    try:
        command = [sys.executable, "-c", PROBE, json.dumps(task)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return {**found, "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{task['program']}: {error.stderr.strip().splitlines()[-1]}") from error
    finally:
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", help="WIDTHxHEIGHT")
    parser.add_argument("--format", default=",".join(each for each in OURS if each not in ("tif-lzw", "tif-web")))
    parser.add_argument("--dtype", default="uint8")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--folder", type=Path, help="place of the store and the exports; default: a temporary one")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_store(folder / "a.zarr", width, height, arguments.dtype)
        common = {"store": str(folder / "a.zarr"), "tiff": str(folder / "a.tif")}
        formats = arguments.format.split(",")
        if not arguments.no_peer and set(formats) - {"ozx"}:
            from engine.exporters import export

            export(common["store"], common["tiff"])
        for format in formats:
            name, options = OURS[format]
            tasks = {"engine": {"program": "engine", "options": options, "name": name}}
            if not arguments.no_peer:
                program, call, peer_options = PEERS[format]
                peer_name = Path(name).stem if format in ("dzi", "html") else name
                tasks[program] = {"program": program, "call": call, "options": peer_options, "name": peer_name}
            found: dict[str, list[dict[str, float]]] = {program: [] for program in tasks}
            for _ in range(arguments.turns):
                for program, task in tasks.items():
                    found[program].append(measure({**common, **task}, folder))
            for program, turns in found.items():
                row = {
                    "format": format, "program": program, "width": width, "height": height, "dtype": arguments.dtype,
                    "turns": arguments.turns, "seconds": round(statistics.median(t["seconds"] for t in turns), 2),
                    "cpu_seconds": round(statistics.median(t["cpu"] for t in turns), 2),
                    "peak_mb": round(max(t["peak"] for t in turns) / 1e6), "megabytes": round(turns[0]["bytes"] / 1e6, 1),
                }  # fmt: skip
                add_row("export", row)
                print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
