// The page: puts the parts together, and gives them buttons, keys and an address.

import { follow, loadView, type State, type View } from "./api";
import { Loupe } from "./loupe";
import { Overlay, type Mode } from "./overlay";
import { copy, element, fillPanel, progressText } from "./panel";
import { Scene } from "./scene";
import { Slider } from "./slider";

const find = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;

const KEYS: [key: string, what: string][] = [
  ["+ −", "zoom in, out"],
  ["0", "whole image"],
  ["1 … 4", "100 % … 800 %"],
  ["← ↑ ↓ →", "move"],
  ["L", "loupe"],
  ["O", "shards, tiles, bands"],
  ["C", "compare (then ← →)"],
  ["D", "download the visible region"],
  ["S", "copy a link to this view"],
  ["I", "information"],
  ["T", "dark, light"],
  ["F", "full screen"],
  ["?", "these keys"],
];

async function start(): Promise<void> {
  theme();
  let view: View;
  try {
    view = await loadView();
  } catch (error) {
    return say(`The server does not answer (${(error as Error).message}). Start engine view again and reload.`, true);
  }
  document.title = view.maxRegion ? `${view.sources[0]!.name} – engine` : view.sources[0]!.name;
  find("name").textContent = view.sources[0]!.name;
  fillPanel(find("facts"), view);
  // The image first: the panel is open at once where there is room for both.
  document.body.dataset.panel = innerWidth > 900 ? "open" : "closed";
  const scene = new Scene(find("image"), view.sources);
  requestAnimationFrame(() => document.body.classList.remove("still"));
  await scene.open();
  new Page(view, scene);
}

class Page {
  private readonly overlay: Overlay;
  private readonly loupe: Loupe;
  private readonly slider: Slider;
  private pending = 0;

  constructor(
    private readonly view: View,
    private readonly scene: Scene,
  ) {
    const first = view.sources[0]!;
    this.overlay = new Overlay(find("overlay"), scene, first);
    this.loupe = new Loupe(find("loupe"), scene, first, find("image"));
    this.slider = new Slider(find("slider"), (share) => scene.compare(share), () => this.remember());
    for (const [index, source] of view.sources.slice(0, 2).entries()) {
      find(index ? "right" : "left").textContent = source.name;
    }
    find("compare").hidden = view.sources.length < 2;
    find("save").hidden = !view.maxRegion;
    find("grid").hidden = this.overlay.modes.length < 2;
    this.buttons();
    document.addEventListener("keydown", (event) => this.key(event));
    scene.onMove(() => this.moved());
    this.restore();
    addEventListener("hashchange", () => this.restore());
    addEventListener("resize", () => this.moved());
    this.show(view.sources.map((source) => source.state));
    follow(
      (states) => {
        scene.update(states);
        this.show(states);
      },
      (alive) => say(alive ? "" : "Connection lost, trying again …"),
    );
    document.body.dataset.ready = "true";
  }

  private buttons(): void {
    const actions: Record<string, () => void> = {
      out: () => this.scene.zoomBy(1 / 1.5),
      in: () => this.scene.zoomBy(1.5),
      zoom: () => this.scene.go({ zoom: 1 }),
      home: () => this.scene.home(),
      grid: () => this.nextOverlay(),
      glass: () => this.toggleLoupe(),
      compare: () => this.toggleCompare(),
      save: () => this.download(),
      link: () => void this.share(),
      theme: () => theme(true),
      info: () => this.toggleInfo(),
      close: () => this.toggleInfo(false),
      help: () => keys(),
    };
    for (const [id, act] of Object.entries(actions)) find(id).addEventListener("click", act);
    press("info", document.body.dataset.panel === "open");
  }

  private key(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target instanceof HTMLTextAreaElement) return;
    const moves: Record<string, [number, number]> = {
      ArrowLeft: [-0.2, 0],
      ArrowRight: [0.2, 0],
      ArrowUp: [0, -0.2],
      ArrowDown: [0, 0.2],
    };
    const actions: Record<string, () => void> = {
      "+": () => this.scene.zoomBy(1.5),
      "=": () => this.scene.zoomBy(1.5),
      "-": () => this.scene.zoomBy(1 / 1.5),
      "0": () => this.scene.home(),
      l: () => this.toggleLoupe(),
      o: () => this.nextOverlay(),
      c: () => this.toggleCompare(),
      d: () => this.download(),
      s: () => void this.share(),
      i: () => this.toggleInfo(),
      t: () => theme(true),
      f: () => void (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen()),
      "?": () => keys(),
      Escape: () => this.escape(),
    };
    const move = moves[event.key];
    const act = move ? () => this.scene.pan(...move) : /^[1-4]$/.test(event.key) ? () => this.scene.go({ zoom: 2 ** (Number(event.key) - 1) }) : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  private escape(): void {
    if (this.loupe.enabled) this.toggleLoupe();
    else if (this.slider.share !== null) this.toggleCompare();
  }

  private nextOverlay(): void {
    const { modes, mode } = this.overlay;
    this.setOverlay(modes[(modes.indexOf(mode) + 1) % modes.length]!);
    this.remember();
  }

  private setOverlay(mode: Mode): void {
    this.overlay.show(mode);
    press("grid", this.overlay.mode !== "none");
    find("legend").hidden = this.overlay.mode === "none";
    find("legend").textContent = this.overlay.mode;
    find("legend").dataset.mode = this.overlay.mode;
  }

  private toggleLoupe(): void {
    this.loupe.toggle(!this.loupe.enabled);
    press("glass", this.loupe.enabled);
  }

  private toggleCompare(): void {
    if (this.view.sources.length < 2) return say("Nothing to compare with: engine view STORE OTHER", false, 4000);
    this.setCompare(this.slider.share === null ? 0.5 : null);
    this.remember();
  }

  private setCompare(share: number | null): void {
    this.slider.set(share);
    press("compare", share !== null);
  }

  private toggleInfo(open = document.body.dataset.panel !== "open"): void {
    document.body.dataset.panel = open ? "open" : "closed";
    press("info", open);
  }

  private download(): void {
    const { x, y, width, height } = this.scene.visible;
    if (!width || !height || !this.view.maxRegion) return;
    if (width * height > this.view.maxRegion) {
      return say(`${width} × ${height} px are too many for the browser: zoom in, or use engine export`, false, 6000);
    }
    const url = `api/region/0.png?x=${x}&y=${y}&width=${width}&height=${height}`;
    void fetch(url, { method: "HEAD" }).then(async (answer) => {
      if (!answer.ok) return say(answer.status === 409 ? "This region is not finished yet" : "The server is busy, try again", false, 4000);
      const link = element("a", { href: url, download: "" });
      link.click();
      return say(`Downloading ${width} × ${height} px at full resolution`, false, 3000);
    });
  }

  private async share(): Promise<void> {
    this.remember();
    await copy(location.href);
    say("Link to this view copied", false, 2000);
  }

  private show(states: State[]): void {
    this.view.sources.forEach((source, index) => (source.state = states[index] ?? source.state));
    const state = states[0]!;
    this.loupe.forget();
    this.overlay.draw();
    const text = progressText(state);
    find("progress").textContent = text;
    find("progress").hidden = !text;
    find("bar").hidden = state.complete;
    find("bar").style.transform = `scaleX(${state.share})`;
    find("bar").classList.toggle("stopped", state.running === false);
    document.body.dataset.complete = String(state.complete);
    const problems = states.flatMap((each) => each.problems);
    const notes = problems.map((text) => element("p", { textContent: text }));
    if (state.resume) notes.push(element("p", {}, "Continue: ", element("code", { textContent: state.resume })));
    find("notes").replaceChildren(...notes);
    find("notes").hidden = !notes.length;
  }

  private moved(): void {
    const zoom = this.scene.zoom * 100;
    find("zoom").textContent = `${zoom >= 10 ? Math.round(zoom) : zoom.toFixed(1)} %`;
    this.scale();
    clearTimeout(this.pending);
    this.pending = window.setTimeout(() => this.remember(), 300);
  }

  /** A bar of a round length on the print. */
  private scale(): void {
    const pixel = this.scene.zoom / this.scene.ratio;
    const metre = (1 / 0.0254) * this.view.dpi * pixel;
    const power = 10 ** Math.floor(Math.log10(120 / metre));
    const length = [5, 2, 1].map((n) => n * power).find((n) => n * metre <= 120) ?? power;
    const [bar, text] = find("scale").children as unknown as [HTMLElement, HTMLElement];
    bar.style.width = `${length * metre}px`;
    const units: [number, string][] = [[1, "m"], [0.01, "cm"], [0.001, "mm"], [1e-6, "µm"]];
    const [unit, name] = units.find(([u]) => length >= u * 0.999) ?? units.at(-1)!;
    text.textContent = `${+(length / unit).toPrecision(2)} ${name} · ${Math.round((length / 0.0254) * this.view.dpi)} px`;
  }

  /** Write the view into the address. */
  private remember(): void {
    const { x, y, zoom } = this.scene.place;
    const parts = [`x=${+x.toFixed(1)}`, `y=${+y.toFixed(1)}`, `z=${+zoom.toPrecision(4)}`];
    if (this.overlay.mode !== "none") parts.push(`overlay=${this.overlay.mode}`);
    if (this.slider.share !== null) parts.push(`compare=${this.slider.share.toFixed(3)}`);
    history.replaceState(null, "", `#${parts.join("&")}`);
  }

  /** Take the view from the address. */
  private restore(): void {
    const values = new URLSearchParams(location.hash.slice(1));
    const [x, y, zoom] = ["x", "y", "z"].map((key) => Number.parseFloat(values.get(key) ?? "")) as [number, number, number];
    if ([x, y, zoom].every(Number.isFinite) && zoom > 0) this.scene.go({ x, y, zoom }, true);
    this.setOverlay((values.get("overlay") ?? "none") as Mode);
    const share = Number.parseFloat(values.get("compare") ?? "");
    this.setCompare(Number.isFinite(share) && this.view.sources.length > 1 ? share : null);
    this.moved();
  }
}

function press(id: string, pressed: boolean): void {
  find(id).setAttribute("aria-pressed", String(pressed));
}

let silence = 0;

function say(text: string, lasting = false, milliseconds = 0): void {
  clearTimeout(silence);
  const message = find("message");
  message.textContent = text;
  message.hidden = !text;
  if (milliseconds && !lasting) silence = window.setTimeout(() => (message.hidden = true), milliseconds);
}

function keys(): void {
  const dialog = find<HTMLDialogElement>("keys");
  if (dialog.open) return dialog.close();
  const list = element("dl");
  const shown = KEYS.filter(([key]) => key !== "D" || !find("save").hidden);
  for (const [key, what] of shown) list.append(element("dt", {}, element("kbd", { textContent: key })), element("dd", { textContent: what }));
  dialog.replaceChildren(element("h2", { textContent: "Keys" }), list);
  dialog.onclick = () => dialog.close();
  dialog.showModal();
}

/** Dark or light: as the system says, unless the user has chosen. */
function theme(change = false): void {
  const system = matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark";
  let chosen: string | null = null;
  try {
    chosen = localStorage.getItem("theme");
    if (change) localStorage.setItem("theme", (chosen = (chosen ?? system) === "dark" ? "light" : "dark"));
  } catch {
    if (change) chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  }
  document.documentElement.dataset.theme = chosen ?? system;
}

void start();
