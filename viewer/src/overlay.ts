// Lines over the image: shards, tiles and bands of the plan; what is not finished is veiled.

import { finishedParts, type Cells, type Source, type State } from "./api";
import type { Scene } from "./scene";

export const MODES = ["none", "shards", "tiles", "bands"] as const;
export type Mode = (typeof MODES)[number];

const COLOURS: Record<Exclude<Mode, "none">, string> = { shards: "#4da3ff", tiles: "#ffb454", bands: "#63d297" };

/** Lines nearer than this many pixels of the page are left out. */
const NEAREST = 5;

export class Overlay {
  mode: Mode = "none";
  private readonly context: CanvasRenderingContext2D;

  constructor(
    private readonly canvas: HTMLCanvasElement,
    private readonly scene: Scene,
    private readonly source: Source,
  ) {
    this.context = canvas.getContext("2d")!;
    scene.onMove(() => this.draw());
  }

  /** Modes that this source has. */
  get modes(): Mode[] {
    const { shard, tiles, bands } = this.source.details;
    return MODES.filter((m) => m === "none" || (m === "shards" && shard) || (m === "tiles" && tiles) || (m === "bands" && bands));
  }

  show(mode: Mode): void {
    this.mode = this.modes.includes(mode) ? mode : "none";
    this.draw();
  }

  draw(): void {
    const { canvas, context, scene } = this;
    const [width, height] = [Math.round(canvas.clientWidth * scene.ratio), Math.round(canvas.clientHeight * scene.ratio)];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    if (this.mode === "none") return;
    context.setTransform(scene.ratio, 0, 0, scene.ratio, 0, 0);
    if (this.mode === "shards") this.veil(this.source.state);
    const cells = this.cells(this.mode);
    if (cells) this.lines(cells, COLOURS[this.mode]);
  }

  private cells(mode: Mode): Cells | undefined {
    const { shard, tiles, bands } = this.source.details;
    if (mode === "shards" && shard) return { origin: [0, 0], size: [shard[1], shard[0]] };
    return mode === "tiles" ? tiles : bands;
  }

  private lines({ origin, size }: Cells, colour: string): void {
    const { context, scene } = this;
    const view = scene.visible;
    if (!view.width || !view.height) return;
    const scale = scene.zoom / scene.ratio;
    context.strokeStyle = colour;
    context.lineWidth = 1;
    context.beginPath();
    const step = (side: number) => side * Math.max(1, 2 ** Math.ceil(Math.log2(NEAREST / (side * scale))));
    const [dx, dy] = [step(size[0]), step(size[1])];
    const [x1, y1] = [view.x + view.width, view.y + view.height];
    for (let x = origin[0] + Math.ceil((view.x - origin[0]) / dx) * dx; x <= x1; x += dx) {
      const [top, bottom] = [scene.toScreen(x, view.y), scene.toScreen(x, y1)];
      context.moveTo(Math.round(top.x) + 0.5, top.y);
      context.lineTo(Math.round(bottom.x) + 0.5, bottom.y);
    }
    for (let y = origin[1] + Math.ceil((view.y - origin[1]) / dy) * dy; y <= y1; y += dy) {
      const [left, right] = [scene.toScreen(view.x, y), scene.toScreen(x1, y)];
      context.moveTo(left.x, Math.round(left.y) + 0.5);
      context.lineTo(right.x, Math.round(right.y) + 0.5);
    }
    context.globalAlpha = 0.85;
    context.stroke();
    context.globalAlpha = 1;
  }

  private veil(state: State): void {
    const { context, scene } = this;
    const [, columns] = state.cells;
    const [height, width] = state.cell;
    context.fillStyle = "rgb(0 0 0 / 0.35)";
    finishedParts(state).forEach((finished, i) => {
      if (finished) return;
      const [x, y] = [(i % columns) * width, Math.floor(i / columns) * height];
      const a = scene.toScreen(x, y);
      const b = scene.toScreen(Math.min(x + width, scene.width), Math.min(y + height, scene.height));
      context.fillRect(a.x, a.y, b.x - a.x, b.y - a.y);
    });
  }
}
