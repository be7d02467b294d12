// The side panel: what the image is, how it was made, and where else it opens.

import { storeUrl, type Pair, type Source, type State, type View } from "./api";

type Row = [name: string, value: string | Node | null | undefined];

export function element<K extends keyof HTMLElementTagNameMap>(
  name: K,
  properties: Partial<HTMLElementTagNameMap[K]> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function fillPanel(panel: HTMLElement, view: View): void {
  const first = view.sources[0]!;
  panel.replaceChildren(
    ...section("Image", imageRows(first, view.dpi)),
    ...section("Made with", madeRows(first)),
    ...section("Exactness", exactRows(first)),
    ...steps(first),
    ...(view.sources[1] ? section("Compared with", imageRows(view.sources[1], view.dpi)) : []),
    ...links(first),
    ...licences(first),
    element("p", { className: "fine", textContent: `engine ${view.engine} · OpenSeadragon` }),
  );
}

function section(title: string, rows: Row[]): Node[] {
  const filled = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  if (!filled.length) return [];
  const list = element("dl");
  for (const [name, value] of filled) list.append(element("dt", { textContent: name }), element("dd", {}, value!));
  return [element("h2", { textContent: title }), list];
}

function imageRows(source: Source, dpi: number): Row[] {
  const [width, height] = source.sizes[0]!;
  const { details } = source;
  const region = details.canvas && details.roi && (details.roi[2] !== details.canvas[0] || details.roi[3] !== details.canvas[1]);
  return [
    ["Name", source.name],
    ["Size", `${count(width)} × ${count(height)} px`],
    ["", `${megapixels(width * height)} megapixels`],
    ["Print", print(width, height, dpi)],
    ["Region", region ? `at ${details.roi![0]}, ${details.roi![1]} of ${pair(details.canvas!)}` : null],
    ["Levels", `${source.sizes.length}, down to ${pair(source.sizes.at(-1)!)}`],
    ["Samples", details.samples ?? null],
  ];
}

function madeRows({ details }: Source): Row[] {
  return [
    ["Seed", details.seed],
    ["Noise gain", gains(details.noiseGain ?? [])],
    ["Model", details.model],
    ["Executor", details.executor],
    ["Precision", details.precision],
    ["Backend", details.backend],
    ["Shards", details.shard ? `${pair([details.shard[1], details.shard[0]])} px` : null],
  ];
}

function exactRows({ details }: Source): Row[] {
  const { seamError: seam, precisionError: error } = details;
  if (details.kind !== "store") return [];
  return [
    ["Seams", seam === 0 ? "exact" : seam == null ? "not measured" : `at most ${seam.toFixed(2)} levels of 255`],
    ["Precision", error ? `${error.mean.toFixed(2)} levels on average, ${error.max.toFixed(2)} at most, against fp32` : null],
  ];
}

/** Factors of the noise channels: one for all steps, or one per step. */
function gains(values: (number | null)[]): string {
  return (new Set(values).size === 1 ? values.slice(0, 1) : values).map((value) => `× ${value}`).join(", ");
}

function steps({ details }: Source): Node[] {
  if (!details.steps?.length) return [];
  const rows = details.steps.map((step, index) => {
    const part = step.band ? `bands of ${step.band} rows` : `tiles of ${pair(step.tile)}`;
    return [`Step ${index + 2}`, `×${step.scale} from ${pair(step.input)}, ${part}, halo ${step.halo}`] as Row;
  });
  return section("Steps and halos", rows);
}

function links(source: Source): Node[] {
  if (source.details.kind === "picture") return [];
  const url = storeUrl(source);
  const vizarr = `https://hms-dbmi.github.io/vizarr/?source=${encodeURIComponent(url)}`;
  const state = { layers: [{ type: "image", name: source.name, source: `zarr://${url}` }] };
  const neuroglancer = `https://neuroglancer-demo.appspot.com/#!${encodeURIComponent(JSON.stringify(state))}`;
  const external = (href: string, text: string) => element("a", { href, textContent: text, target: "_blank", rel: "noopener noreferrer" });
  return [
    element("h2", { textContent: "Open elsewhere" }),
    element("p", { className: "links" }, external(vizarr, "vizarr"), external(neuroglancer, "neuroglancer")),
    copyable(`napari --plugin napari-ome-zarr ${url}`, "Copy the command for napari"),
    copyable(url, "Copy the address of the store (OME-Zarr; OpenSeadragon and others)"),
  ];
}

function licences({ details }: Source): Node[] {
  if (!details.licences?.length) return [];
  const list = element("ul", {}, ...details.licences.map((text) => element("li", { textContent: text })));
  return [element("details", {}, element("summary", { textContent: "Licences" }), list)];
}

export function copyable(text: string, title: string): HTMLElement {
  const button = element("button", { className: "copy", title, type: "button" }, element("code", { textContent: text }));
  button.append(element("span", { textContent: "copy" }));
  button.onclick = async () => {
    await copy(text);
    button.lastChild!.textContent = "copied";
    setTimeout(() => (button.lastChild!.textContent = "copy"), 1500);
  };
  return button;
}

/** Copy a text; addresses of other machines are no secure context, which the clipboard needs. */
export async function copy(text: string): Promise<void> {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

/** The line about progress; empty for a finished image. */
export function progressText(state: State): string {
  if (state.complete) return "";
  const share = `${Math.floor(state.share * 100)} %`;
  if (state.running === false) return `stopped at ${share}`;
  return state.secondsLeft === null ? share : `${share} · ${clock(state.secondsLeft)} left`;
}

function clock(seconds: number): string {
  const total = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, total % 60];
  const two = (n: number) => n.toString().padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

function print(width: number, height: number, dpi: number): string {
  const [across, down] = [(width / dpi) * 0.0254, (height / dpi) * 0.0254];
  const large = Math.max(across, down) >= 1;
  const [factor, unit, digits] = large ? [1, "m", 2] : [100, "cm", 1];
  return `${(across * factor).toFixed(digits)} × ${(down * factor).toFixed(digits)} ${unit} at ${dpi} dpi`;
}

function count(n: number): string {
  return n.toLocaleString("en").replaceAll(",", "\u202f");
}

function megapixels(n: number): string {
  return n >= 1e5 ? (n / 1e6).toFixed(1) : (n / 1e6).toPrecision(2);
}

function pair([a, b]: Pair): string {
  return `${a} × ${b}`;
}
