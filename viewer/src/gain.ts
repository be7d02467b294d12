// The loudness of the noise channels: a slider, and a small part of the image that is computed with what it says.

import { act, cropUrl, type ModelState } from "./api";
import { element } from "./panel";
import type { Scene } from "./scene";

/** Milliseconds between two wishes while the slider moves: the last one counts. */
const PAUSE = 150;

export class GainSlider {
  readonly element: HTMLElement;
  private readonly input = element("input", { type: "range", min: "0", step: "0.05", name: "gain" });
  private readonly output = element("output");
  private readonly picture = element("img", { alt: "The middle of the view with this noise gain" });
  private readonly caption = element("span");
  private readonly use = element("button", { type: "button", className: "action", textContent: "Use" });
  private readonly figure: HTMLElement;
  private shown = 0;
  private pending = 0;

  /** `say` shows a line. */
  constructor(
    private model: ModelState,
    private readonly scene: Scene,
    private readonly say: (text: string) => void,
  ) {
    this.input.max = `${model.maxGain}`;
    this.input.value = `${model.gain}`;
    this.input.title = "Loudness of the networks' noise: more gives more fine texture. 1 is that of the model";
    this.figure = element("figure", { hidden: true }, this.picture, element("figcaption", {}, this.caption, this.use));
    this.element = element("div", { className: "gain" }, element("label", {}, "Noise gain", this.output, this.input), this.figure);
    this.input.addEventListener("input", () => this.moved());
    this.use.addEventListener("click", () => this.open());
    this.update(model);
  }

  /** Take a new state, which may have another crop. */
  update(model: ModelState): void {
    this.model = model;
    const crop = model.crop;
    if (crop && crop.number !== this.shown && !this.figure.hidden) {
      this.shown = crop.number;
      this.picture.hidden = crop.problem !== null;
      if (crop.problem === null) this.picture.src = cropUrl(crop.number);
    }
    const value = Number(this.input.value);
    const isThere = crop !== null && percent(crop.gain) === percent(value) && !model.cropping && !this.pending;
    this.output.textContent = `× ${value.toFixed(2)}`;
    this.picture.classList.toggle("busy", !isThere);
    this.caption.textContent = !isThere ? "computing …" : crop.problem ?? `the middle of the view, at ${crop.box[0]}, ${crop.box[1]}`;
    this.use.disabled = percent(value) === percent(model.gain!);
  }

  /** Want a crop with the slider's value, a moment after its last movement but one. */
  private moved(): void {
    this.figure.hidden = false;
    this.pending ||= window.setTimeout(() => this.ask(), PAUSE);
    this.update(this.model);
  }

  private ask(): void {
    this.pending = 0;
    const { x, y, width, height } = this.scene.visible;
    const place = { x: Math.floor(x + width / 2), y: Math.floor(y + height / 2) };
    void act("crop", { gain: this.percentage, ...place }).then((problem) => problem && this.say(problem));
    this.update(this.model);
  }

  private open(): void {
    void act("open", { seed: this.model.seed!, gain: this.percentage }).then((problem) => problem && this.say(problem));
  }

  private get percentage(): number {
    return percent(Number(this.input.value));
  }
}

function percent(gain: number): number {
  return Math.round(gain * 100);
}
