// The image: OpenSeadragon over the tiles of the server. Coordinates are pixels of the first source.

import OpenSeadragon from "openseadragon";
import { finishedParts, tileUrl, type Source, type State } from "./api";

export interface Place {
  /** Centre, in image pixels. */
  x: number;
  y: number;
  /** Device pixels of the screen for an image pixel: 1 is 100 %. */
  zoom: number;
}

export interface Rectangle {
  x: number;
  y: number;
  width: number;
  height: number;
}

/** A part of a source that has changed. */
interface Change {
  source: number;
  parts: Rectangle[];
  time: number;
}

/** Milliseconds for which a tile may be under way with pixels of before a change. */
const UNDER_WAY = 60000;

export class Scene {
  readonly viewer: OpenSeadragon.Viewer;
  readonly width: number;
  readonly height: number;
  private readonly known: State[];
  /** Tiles whose pixels have changed, with their addresses. */
  private readonly stale = new Map<OpenSeadragon.Tile, string>();
  private recent: Change[] = [];
  private readonly listeners: (() => void)[] = [];
  private divider: number | null = null;

  constructor(
    element: HTMLElement,
    private readonly sources: Source[],
  ) {
    [this.width, this.height] = sources[0]!.sizes[0]!;
    this.known = sources.map((source) => source.state);
    // OpenSeadragon adds a style where it finds none of this name. The page's policy refuses it, and style.css has it.
    const none = document.createElementNS(null, "style");
    none.setAttribute("data-openseadragon-mobile-css", "true");
    document.head.append(none);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.viewer = new OpenSeadragon.Viewer({
      element,
      // Its pixels are those of the tiles; the drawer of WebGL filters them.
      drawer: "canvas",
      showNavigationControl: false,
      keyboardNavEnabled: false,
      animationTime: calm ? 0 : 0.5,
      springStiffness: 9,
      preserveImageSizeOnResize: true,
      visibilityRatio: 0.6,
      constrainDuringPan: false,
      minZoomImageRatio: 0.5,
      maxZoomPixelRatio: 64,
      zoomPerScroll: 1.25,
      immediateRender: false,
      blendTime: 0,
      imageLoaderLimit: 8,
      timeout: 120000,
      tileRetryMax: 20,
      tileRetryDelay: 1000,
      maxImageCacheCount: 300,
      smoothTileEdgesMinZoom: Infinity,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { pinchRotate: false },
    } as unknown as OpenSeadragon.Options);
    this.viewer.addHandler("update-viewport", () => this.moved());
    this.viewer.addHandler("animation", () => this.moved());
    this.viewer.addHandler("animation-finish", () => {
      if (Math.abs(this.zoom - Math.round(this.zoom)) < 1e-3 && this.zoom > 0.999 && !this.aligned) {
        this.go({ zoom: Math.round(this.zoom) }, true);
      }
    });
    this.viewer.addHandler("tile-loaded", (event) => this.loaded(event.tile, event.tiledImage));
    this.viewer.addHandler("tile-invalidated", (event) => this.replace(event as unknown as Invalidated));
    // The whole image drags; the page must neither scroll nor show a menu of the canvas.
    element.querySelector(".openseadragon-canvas")?.setAttribute("aria-label", "Image");
  }

  /** Open all sources; resolves when the first one is there. */
  async open(): Promise<void> {
    for (const [index, source] of this.sources.entries()) {
      await new Promise<void>((resolve, reject) =>
        this.viewer.addTiledImage({
          tileSource: tileSource(index, source),
          x: 0,
          y: 0,
          width: 1,
          success: () => resolve(),
          error: (event: unknown) => reject(new Error(String((event as { message: string }).message))),
        } as unknown as Parameters<OpenSeadragon.Viewer["addTiledImage"]>[0]),
      );
    }
    if (this.sources.length > 1) this.compare(null);
    this.viewer.viewport.goHome(true);
  }

  onMove(listener: () => void): void {
    this.listeners.push(listener);
  }

  get ratio(): number {
    return window.devicePixelRatio || 1;
  }

  get place(): Place {
    const centre = this.viewer.viewport.getCenter(true);
    return { x: centre.x * this.width, y: centre.y * this.width, zoom: this.zoom };
  }

  get zoom(): number {
    return ((this.viewer.viewport.getZoom(true) * this.viewer.viewport.getContainerSize().x) / this.width) * this.ratio;
  }

  /** Go to a place. From 100 % on, image pixels end at pixels of the screen. */
  go(place: Partial<Place>, now = false): void {
    const viewport = this.viewer.viewport;
    const target: Place = { ...this.place, ...place };
    const size = viewport.getContainerSize();
    if (target.zoom >= 1) {
      const snap = (at: number, length: number) => {
        const left = (at * target.zoom) - (length * this.ratio) / 2;
        return (Math.round(left) + (length * this.ratio) / 2) / target.zoom;
      };
      target.x = snap(target.x, size.x);
      target.y = snap(target.y, size.y);
    }
    viewport.zoomTo((target.zoom / this.ratio) * (this.width / size.x), undefined, now);
    viewport.panTo(new OpenSeadragon.Point(target.x / this.width, target.y / this.width), now);
    if (now) viewport.update();
    this.viewer.forceRedraw();
  }

  zoomBy(factor: number): void {
    this.viewer.viewport.zoomBy(factor);
    this.viewer.viewport.applyConstraints();
  }

  pan(x: number, y: number): void {
    const size = this.viewer.viewport.getBounds(false);
    this.viewer.viewport.panBy(new OpenSeadragon.Point(x * size.width, y * size.height));
    this.viewer.viewport.applyConstraints();
  }

  home(): void {
    this.viewer.viewport.goHome();
  }

  /** The visible part of the image, in whole pixels. */
  get visible(): Rectangle {
    const bounds = this.viewer.viewport.getBounds(true);
    const [x0, y0] = [Math.max(0, Math.floor(bounds.x * this.width)), Math.max(0, Math.floor(bounds.y * this.width))];
    const x1 = Math.min(this.width, Math.ceil((bounds.x + bounds.width) * this.width));
    const y1 = Math.min(this.height, Math.ceil((bounds.y + bounds.height) * this.width));
    return { x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0) };
  }

  /** Pixels of the page, relative to the element, of a point of the image. */
  toScreen(x: number, y: number): { x: number; y: number } {
    return this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(x / this.width, y / this.width), true);
  }

  toImage(x: number, y: number): { x: number; y: number } {
    const point = this.viewer.viewport.pointFromPixel(new OpenSeadragon.Point(x, y), true);
    return { x: point.x * this.width, y: point.y * this.width };
  }

  /** Show the second source right of a share of the element's width; null hides it. */
  compare(share: number | null): void {
    this.divider = share;
    const second = this.viewer.world.getItemAt(1);
    if (!second) return;
    second.setOpacity(share === null ? 0 : 1);
    this.clip();
    this.viewer.forceRedraw();
  }

  /** Take new states: only tiles whose parts have changed are loaded again, and are replaced in place. */
  update(states: State[]): void {
    for (const tile of this.stale.keys()) if (!tile.loaded) this.stale.delete(tile);
    const failed = [...this.stale.keys()];
    for (const [index, state] of states.entries()) {
      const before = this.known[index];
      const item = this.viewer.world.getItemAt(index);
      if (!before || !item) continue;
      this.known[index] = state;
      const change = { source: index, parts: changedParts(before, state), time: Date.now() };
      if (!change.parts.length) continue;
      this.recent.push(change);
      this.reload(loadedTiles(this.viewer, item).filter((tile) => this.meets(tile, change)), index);
    }
    if (failed.length) this.invalidate(failed);
  }

  /** A tile that was asked for before a change may have come after it. */
  private loaded(tile: OpenSeadragon.Tile, item: OpenSeadragon.TiledImage): void {
    this.recent = this.recent.filter((change) => Date.now() - change.time < UNDER_WAY);
    const index = this.viewer.world.getIndexOfItem(item);
    if (this.recent.some((change) => change.source === index && this.meets(tile, change))) {
      setTimeout(() => this.reload([tile], index));
    }
  }

  private meets(tile: OpenSeadragon.Tile, change: Change): boolean {
    const source = this.sources[change.source]!;
    const [width] = source.sizes[0]!;
    const side = source.tile * (width / source.sizes[source.sizes.length - 1 - tile.level]![0]);
    // A little more: what is enlarged reaches beyond its border.
    const [x, y, length] = [(tile.x - 0.1) * side, (tile.y - 0.1) * side, 1.2 * side];
    return change.parts.some((p) => p.x < x + length && p.x + p.width > x && p.y < y + length && p.y + p.height > y);
  }

  private reload(tiles: OpenSeadragon.Tile[], index: number): void {
    const last = this.sources[index]!.sizes.length - 1;
    for (const tile of tiles) this.stale.set(tile, tileUrl(index, last - tile.level, tile.x, tile.y));
    if (tiles.length) this.invalidate(tiles);
  }

  private invalidate(tiles: OpenSeadragon.Tile[]): void {
    void this.viewer.world.requestTileInvalidateEvent(tiles, OpenSeadragon.now(), false);
  }

  private async replace(event: Invalidated): Promise<void> {
    const url = this.stale.get(event.tile);
    if (!url) return;
    for (let attempt = 1; attempt < 10 && !event.outdated(); attempt++) {
      try {
        const answer = await fetch(url);
        if (answer.ok) {
          const context = await drawn(await answer.blob());
          if (event.outdated()) return;
          await event.setData(context, "context2d");
          this.stale.delete(event.tile);
          return;
        }
        if (answer.status !== 503) break;
      } catch {
        return; // The connection is lost: the next state asks again.
      }
      await new Promise((resolve) => setTimeout(resolve, 500 * attempt));
    }
    this.stale.delete(event.tile);
  }

  private moved(): void {
    // Whole pixels from 100 % on, smooth below.
    const smooth = this.zoom < 0.999;
    const drawer = this.viewer.drawer as unknown as { _imageSmoothingEnabled?: boolean };
    if (drawer._imageSmoothingEnabled !== smooth) this.viewer.drawer.setImageSmoothingEnabled(smooth);
    this.fit();
    this.clip();
    for (const listener of this.listeners) listener();
  }

  /** Whether pixels of the image begin and end at pixels of the screen. */
  private get aligned(): boolean {
    const corner = this.toScreen(0, 0);
    const whole = (n: number) => Math.abs(n - Math.round(n)) < 1e-3;
    return this.zoom > 0.999 && whole(this.zoom) && whole(corner.x * this.ratio) && whole(corner.y * this.ratio);
  }

  /**
   * OpenSeadragon draws tiles without an overlap a pixel too large, so that no gap shows between them. Where pixels are
   * aligned there is none, and every tile must have its true size.
   */
  private fit(): void {
    const overlap = this.aligned ? 1e-9 : 0;
    for (let i = 0; i < this.viewer.world.getItemCount(); i++) {
      const item = this.viewer.world.getItemAt(i)!;
      if (item.source.tileOverlap === overlap) continue;
      item.source.tileOverlap = overlap;
      this.viewer.forceRedraw();
    }
  }

  private clip(): void {
    const second = this.viewer.world.getItemAt(1);
    if (!second || this.divider === null) return;
    const size = this.viewer.viewport.getContainerSize();
    const scale = second.source.dimensions.x / this.width;
    const x = Math.min(Math.max(this.toImage(this.divider * size.x, 0).x * scale, 0), second.source.dimensions.x);
    const clip = second.getClip();
    if (clip && Math.abs(clip.x - x) < 1e-6) return;
    second.setClip(new OpenSeadragon.Rect(x, 0, second.source.dimensions.x - x, second.source.dimensions.y));
  }
}

interface Invalidated {
  tile: OpenSeadragon.Tile;
  outdated(): boolean;
  setData(data: unknown, type: string): Promise<void>;
}

function tileSource(index: number, source: Source): OpenSeadragon.TileSource {
  const [width, height] = source.sizes[0]!;
  const last = source.sizes.length - 1;
  const ours = source.details.kind !== "foreign store";
  return new OpenSeadragon.TileSource({
    width,
    height,
    tileSize: source.tile,
    tileOverlap: 0,
    minLevel: 0,
    maxLevel: last,
    // OpenSeadragon counts levels from the smallest image.
    getLevelScale: (level: number) => (ours ? 2 ** (level - last) : source.sizes[last - level]![0] / width),
    getTileUrl: (level: number, x: number, y: number) => tileUrl(index, last - level, x, y),
    hasTransparency: () => source.transparent ?? false,
  } as unknown as OpenSeadragon.TileSourceOptions);
}

async function drawn(picture: Blob): Promise<CanvasRenderingContext2D> {
  const bitmap = await createImageBitmap(picture);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d")!;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context;
}

function loadedTiles(viewer: OpenSeadragon.Viewer, item: OpenSeadragon.TiledImage): OpenSeadragon.Tile[] {
  const cache = (viewer as unknown as { tileCache: { getLoadedTilesFor(i: unknown): OpenSeadragon.Tile[] } }).tileCache;
  return cache.getLoadedTilesFor(item);
}

/** Parts that became finished, or lost their pixels, in pixels of the full image. */
function changedParts(before: State, now: State): Rectangle[] {
  const [rows, columns] = now.cells;
  const [height, width] = now.cell;
  const [old, fresh] = [finishedParts(before), finishedParts(now)];
  if (before.epoch !== now.epoch || before.problems.length !== now.problems.length) {
    return [{ x: 0, y: 0, width: columns * width, height: rows * height }];
  }
  const parts: Rectangle[] = [];
  fresh.forEach((value, i) => {
    if (value !== old[i]) parts.push({ x: (i % columns) * width, y: Math.floor(i / columns) * height, width, height });
  });
  return parts;
}
