// A loupe: pixels of the full image around the pointer, whatever the zoom.

import { tileUrl, type Source } from "./api";
import type { Scene } from "./scene";

const KEPT = 24;

export class Loupe {
  private readonly context: CanvasRenderingContext2D;
  private readonly tiles = new Map<string, Promise<ImageBitmap | null>>();
  private at: { x: number; y: number } | null = null;
  private drawing = 0;
  enabled = false;

  constructor(
    private readonly element: HTMLElement,
    private readonly scene: Scene,
    private readonly source: Source,
    stage: HTMLElement,
  ) {
    this.context = element.querySelector("canvas")!.getContext("2d", { willReadFrequently: true })!;
    stage.addEventListener("pointermove", (event) => this.move(event), true);
    stage.addEventListener("pointerdown", (event) => this.move(event), true);
    stage.addEventListener("pointerleave", () => (element.hidden = true));
  }

  toggle(enabled: boolean): void {
    this.enabled = enabled;
    this.element.hidden = true;
    if (enabled && this.at) void this.draw();
  }

  /** Forget pixels: some have changed. */
  forget(): void {
    this.tiles.clear();
    if (!this.element.hidden) void this.draw();
  }

  private move(event: PointerEvent): void {
    const box = (event.currentTarget as HTMLElement).getBoundingClientRect();
    this.at = { x: event.clientX - box.left, y: event.clientY - box.top };
    if (this.enabled) void this.draw();
  }

  private async draw(): Promise<void> {
    const { scene, context, element } = this;
    if (!this.at) return;
    const turn = ++this.drawing;
    const centre = scene.toImage(this.at.x, this.at.y);
    const side = element.clientWidth || 200;
    // Whole enlargements: at least 1 pixel of the screen for a pixel of the image, and twice what is seen.
    const scale = Math.max(1, 2 ** Math.ceil(Math.log2(Math.max(scene.zoom, 0.5) * 2)));
    const size = Math.round(side * scene.ratio);
    const reach = size / scale / 2;
    const [x0, y0] = [Math.round(centre.x - reach), Math.round(centre.y - reach)];
    const span = Math.ceil(2 * reach) + 1;
    const t = this.source.tile;
    const wanted: Promise<[ImageBitmap | null, number, number]>[] = [];
    for (let y = Math.max(0, Math.floor(y0 / t)); y <= Math.floor(Math.min(y0 + span, scene.height - 1) / t); y++) {
      for (let x = Math.max(0, Math.floor(x0 / t)); x <= Math.floor(Math.min(x0 + span, scene.width - 1) / t); x++) {
        wanted.push(this.tile(x, y).then((bitmap) => [bitmap, x * t, y * t]));
      }
    }
    const tiles = await Promise.all(wanted);
    if (turn !== this.drawing || !this.enabled) return;
    if (context.canvas.width !== size) context.canvas.width = context.canvas.height = size;
    context.imageSmoothingEnabled = false;
    context.fillStyle = "#808080";
    context.fillRect(0, 0, size, size);
    for (const [bitmap, x, y] of tiles) {
      if (bitmap) context.drawImage(bitmap, (x - x0) * scale, (y - y0) * scale, bitmap.width * scale, bitmap.height * scale);
    }
    this.label(centre, scale, x0, y0);
    this.put(side);
  }

  private label(centre: { x: number; y: number }, scale: number, x0: number, y0: number): void {
    const [x, y] = [Math.floor(centre.x), Math.floor(centre.y)];
    const inside = x >= 0 && y >= 0 && x < this.scene.width && y < this.scene.height;
    const [r, g, b] = this.context.getImageData((x - x0 + 0.5) * scale, (y - y0 + 0.5) * scale, 1, 1).data;
    const text = inside ? `${x}, ${y}  ·  ${r} ${g} ${b}  ·  ${Math.round(scale * 100)} %` : "outside";
    this.element.querySelector("output")!.textContent = text;
  }

  /** Beside the pointer, inside the window. */
  private put(side: number): void {
    const { element, at } = this;
    element.hidden = false;
    const gap = 24;
    const [width, height] = [innerWidth, innerHeight];
    const x = at!.x + gap + side > width ? at!.x - gap - side : at!.x + gap;
    const y = at!.y - gap - side < 0 ? at!.y + gap : at!.y - gap - side;
    element.style.transform = `translate(${Math.max(4, x)}px, ${Math.min(Math.max(4, y), height - side - 40)}px)`;
  }

  private tile(x: number, y: number): Promise<ImageBitmap | null> {
    const key = `${x}_${y}`;
    let tile = this.tiles.get(key);
    if (!tile) {
      tile = fetch(tileUrl(0, 0, x, y))
        .then(async (answer) => (answer.ok ? createImageBitmap(await answer.blob()) : null))
        .catch(() => null);
      this.tiles.set(key, tile);
      if (this.tiles.size > KEPT) this.tiles.delete(this.tiles.keys().next().value!);
    }
    return tile;
  }
}
