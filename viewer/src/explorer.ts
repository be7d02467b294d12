// A model that is explored: samples of seeds to choose from, seed and size of the image, and what is looked at.

import { act, sampleUrl, type ModelState, type Pair } from "./api";
import { GainSlider } from "./gain";
import { copyable, element, progressText } from "./panel";
import type { Scene } from "./scene";
import type { State } from "./api";

const find = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;

/** Samples that are added at a time. */
const MORE = 24;

/** Milliseconds after a movement until what is looked at is told. */
const PAUSE = 120;

const LAST_SEED = 2n ** 64n - 1n;

export class Explorer {
  private readonly samples = find("samples");
  private readonly render = element("button", { type: "button", className: "action" });
  private told = "";
  private pending = 0;
  private sheet: number;
  private readonly gain: GainSlider | null = null;

  /** `say` shows a line; `scene` is null while only samples are there. */
  constructor(
    private model: ModelState,
    private readonly scene: Scene | null,
    private readonly say: (text: string) => void,
  ) {
    this.sheet = model.sheet;
    find("title").textContent = model.name;
    find("choice").replaceChildren(this.form("Show", ""));
    find("seeds").hidden = false;
    find("seeds").addEventListener("click", () => this.toggle());
    find("back").hidden = !scene;
    find("back").addEventListener("click", () => this.toggle(false));
    this.samples.addEventListener("scroll", () => this.later());
    document.addEventListener("visibilitychange", () => this.later());
    addEventListener("resize", () => this.later());
    if (scene) {
      if (model.gain !== null) this.gain = new GainSlider(model, scene, say);
      this.render.addEventListener("click", () => void act("render", { on: this.model.rendering ? 0 : 1 }));
      find("explore").replaceChildren(
        element("h2", { textContent: "Explore" }),
        this.form("Open", model.seed ?? ""),
        ...(this.gain ? [this.gain.element] : []),
        element("p", {}, this.render),
        element("div", { id: "command" }),
      );
      find("explore").hidden = false;
      scene.onMove(() => this.later());
    }
    this.toggle(!scene);
    this.update(model, null);
  }

  /** Show the samples, or the image. */
  toggle(open = find("sheet").hidden): void {
    find("sheet").hidden = !open;
    if (open && !this.samples.childElementCount) this.add(BigInt(this.model.firstSeed));
    this.later();
  }

  get isOpen(): boolean {
    return !find("sheet").hidden;
  }

  /** Take a new state, with that of the image. */
  update(model: ModelState, state: State | null): void {
    const before = this.model;
    this.model = model;
    if (model.canvas !== before.canvas && model.opening === null) return this.reopen(before.size);
    if (model.opening !== null) this.say(`${model.opening} …`);
    else if (model.problem) this.say(model.problem);
    else if (before.opening !== null || before.problem) this.say("");
    if (model.sheet !== this.sheet) {
      this.sheet = model.sheet;
      for (const image of this.samples.querySelectorAll("img")) image.removeAttribute("src");
      this.told = "";
      this.later();
    }
    for (const seed of model.samples) {
      const image = this.samples.querySelector<HTMLImageElement>(`[data-seed="${seed}"] img`);
      if (image && !image.getAttribute("src")) image.src = sampleUrl(this.sheet, seed);
    }
    this.render.textContent = model.rendering ? "Pause" : "Render it";
    this.render.disabled = state?.complete ?? false;
    this.gain?.update(model);
    const command = model.command ?? "";
    if (this.scene && find("command").dataset.text !== command) {
      find("command").dataset.text = command;
      find("command").replaceChildren(...(command ? [copyable(command, "Copy the command that finishes this image")] : []));
    }
  }

  /** The line about progress. */
  text(state: State): string {
    if (state.complete) return "";
    if (this.model.rendering) return progressText({ ...state, running: true, secondsLeft: this.model.secondsLeft });
    const share = `${(state.share * 100).toPrecision(2)} % computed`;
    if (this.model.computing) return `${share} · computing what you see`;
    return this.isTooLarge ? `${share} · zoom in for the rest` : share;
  }

  /** Tell what is looked at, once more after the connection was lost. */
  tell(): void {
    this.told = "";
    this.later();
  }

  private get isTooLarge(): boolean {
    const { width, height } = this.scene!.visible;
    return width * height > this.model.maxView;
  }

  private later(): void {
    clearTimeout(this.pending);
    this.pending = window.setTimeout(() => this.look(), PAUSE);
  }

  private look(): void {
    const seen = document.visibilityState === "visible";
    const sheet = this.isOpen;
    const seeds = seen && sheet ? this.visibleSeeds() : { first: 0, count: 0 };
    const view = seen && !sheet && this.scene ? this.scene.visible : { x: 0, y: 0, width: 0, height: 0 };
    const told = JSON.stringify([seeds, view]);
    if (told === this.told) return;
    this.told = told;
    void act("samples", seeds);
    if (this.scene) void act("view", { ...view });
  }

  private visibleSeeds(): { first: string; count: number } {
    const box = this.samples.getBoundingClientRect();
    const cells = [...this.samples.children] as HTMLElement[];
    const last = cells.at(-1)!;
    if (last.getBoundingClientRect().top < box.bottom + 400) this.add(BigInt(last.dataset.seed!) + 1n);
    const visible = cells.filter((cell) => {
      const { top, bottom } = cell.getBoundingClientRect();
      return bottom > box.top && top < box.bottom;
    });
    return { first: visible[0]?.dataset.seed ?? this.model.firstSeed, count: visible.length };
  }

  private add(first: bigint): void {
    for (let seed = first; seed < first + BigInt(MORE) && seed <= LAST_SEED; seed++) {
      const cell = element("button", { type: "button", title: `Seed ${seed}` }, element("img", { alt: "" }), `${seed}`);
      cell.dataset.seed = `${seed}`;
      cell.addEventListener("click", () => this.choose({ seed: `${seed}` }));
      this.samples.append(cell);
    }
    if (this.samples.childElementCount && this.isOpen) this.later();
  }

  private choose(values: { seed?: string; size?: string }): void {
    if (this.scene && values.seed === this.model.seed && (values.size ?? sizeText(this.model.size)) === sizeText(this.model.size)) {
      return this.toggle(false);
    }
    void act("open", values).then((problem) => problem && this.say(problem));
  }

  /** Fields for the size and the seed; without a seed, samples of that size are shown. */
  private form(word: string, seed: string): HTMLFormElement {
    const size = element("input", { name: "size", value: sizeText(this.model.size), spellcheck: false });
    size.setAttribute("list", "sizes");
    const number = element("input", { name: "seed", value: seed, placeholder: "any", inputMode: "numeric" });
    find("sizes").replaceChildren(...this.model.sizes.map((each) => element("option", { value: sizeText(each) })));
    const form = element(
      "form",
      { className: "choice" },
      element("label", {}, "Size", size),
      element("label", {}, "Seed", number),
      element("button", { className: "action", textContent: word }),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const chosen = number.value.trim();
      this.choose({ size: size.value.trim().replace("×", "x"), ...(chosen ? { seed: chosen } : {}) });
    });
    return form;
  }

  /** Another store is shown: the same place of the same scene, if it is one. */
  private reopen([before]: Pair): void {
    const { size, canvas } = this.model;
    const values = new URLSearchParams(location.hash.slice(1));
    for (const [key, factor] of [["x", size[0] / before], ["y", size[0] / before], ["z", before / size[0]]] as const) {
      const value = Number.parseFloat(values.get(key) ?? "");
      if (Number.isFinite(value)) values.set(key, `${value * factor}`);
    }
    history.replaceState(null, "", canvas ? `#${values}` : location.pathname);
    location.reload();
  }
}

function sizeText([width, height]: Pair): string {
  return `${width}x${height}`;
}
