// A source of OpenSeadragon's tiles from a single-file OME-Zarr, which zarrita reads: the reader below vizarr and
// OMEZarrTileSource.
import ZipFileStore from "@zarrita/storage/zip";
import { get, open, slice } from "zarrita";

const SIDE = 128;

window.ozxSource = async (address) => {
  const file = await (await fetch(address)).blob();
  const root = await open(ZipFileStore.fromBlob(file), { kind: "group" });
  const paths = root.attrs.ome.multiscales[0].datasets.map(({ path }) => path);
  const levels = await Promise.all(paths.reverse().map((path) => open(root.resolve(path), { kind: "array" })));
  const [, height, width] = levels.at(-1).shape;
  return {
    height,
    width,
    tileSize: SIDE,
    minLevel: 0,
    maxLevel: levels.length - 1,
    getTileUrl: (level, x, y) => `${address}/${level}/${x}/${y}`,
    downloadTileStart: async (context) => {
      const { level, x, y } = context.tile;
      const { shape } = levels[level];
      const cut = (place, side) => slice(place * SIDE, Math.min((place + 1) * SIDE, side));
      const part = await get(levels[level], [null, cut(y, shape[1]), cut(x, shape[2])]);
      const [, rows, columns] = part.shape;
      const pixels = new Uint8ClampedArray(4 * rows * columns).fill(255);
      part.data.forEach((value, k) => {
        pixels[4 * (k % (rows * columns)) + Math.floor(k / (rows * columns))] = value;
      });
      const canvas = new OffscreenCanvas(columns, rows).getContext("2d");
      canvas.putImageData(new ImageData(pixels, columns, rows), 0, 0);
      context.finish(canvas, null, "context2d");
    },
    downloadTileAbort: () => {},
  };
};
