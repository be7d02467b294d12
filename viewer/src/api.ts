// What the server tells: engine/view/app.py and engine/view/source.py.

export type Pair = [number, number];

export interface Step {
  scale: number;
  halo: number;
  band: number;
  tile: Pair;
  input: Pair;
}

/** A regular grid over the full image, in its pixels. */
export interface Cells {
  origin: Pair;
  size: Pair;
}

export interface Details {
  kind: "store" | "foreign store" | "picture";
  samples?: string;
  shard?: Pair;
  chunk?: Pair;
  engine?: string | null;
  model?: string | null;
  licences?: string[];
  seamError?: number | null;
  precisionError?: { mean: number; p999: number; max: number } | null;
  seed?: string | null;
  noiseGain?: (number | null)[];
  executor?: string | null;
  precision?: string | null;
  backend?: string | null;
  canvas?: Pair;
  roi?: [number, number, number, number];
  steps?: Step[];
  bands?: Cells;
  tiles?: Cells;
}

/** What changes while a source grows. `finished` holds bits, row by row, in base64. */
export interface State {
  complete: boolean;
  running: boolean | null;
  share: number;
  secondsLeft: number | null;
  cells: Pair;
  cell: Pair;
  finished: string;
  epoch: number;
  problems: string[];
  resume: string | null;
}

export interface Source {
  name: string;
  sizes: Pair[];
  tile: number;
  /** Address of a tile in an exported page, with {level}, {x} and {y}; missing where a server answers. */
  tiles?: string;
  transparent?: boolean;
  details: Details;
  state: State;
}

/** A model of which only what is looked at is computed: engine/explore.py. Seeds are texts: they have 64 bits. */
export interface ModelState {
  name: string;
  size: Pair;
  sizes: Pair[];
  seed: string | null;
  /** Loudness of the noise channels by that of the model; null where it has none. */
  gain: number | null;
  maxGain: number;
  /** The last crop with another gain: [x, y, width, height], and why it cannot be computed. */
  crop: { number: number; gain: number; box: [number, number, number, number]; problem: string | null } | null;
  /** Whether a crop is wanted or computed. */
  cropping: boolean;
  firstSeed: string;
  /** Number of the shape of the samples. */
  sheet: number;
  /** Seeds whose samples are there, of those that are wanted. */
  samples: string[];
  /** Words about a plan that is being made. */
  opening: string | null;
  computing: boolean;
  rendering: boolean;
  secondsLeft: number | null;
  command: string | null;
  problem: string | null;
  /** Pixels of the largest view that is computed. */
  maxView: number;
  /** Number of the store that is shown; 0 for none. */
  canvas: number;
}

export interface View {
  engine: string;
  dpi: number;
  maxRegion: number;
  sources: Source[];
  model?: ModelState | null;
}

/** What an exported page (engine/exporters/html.py) holds in place of a server. */
const exported = (() => {
  const text = document.getElementById("view")?.textContent;
  return text ? (JSON.parse(text) as View) : null;
})();

export async function loadView(): Promise<View> {
  if (exported) return exported;
  const answer = await fetch("api/view.json");
  if (!answer.ok) throw new Error(await answer.text());
  return (await answer.json()) as View;
}

export function tileUrl(source: number, level: number, x: number, y: number): string {
  const tiles = exported?.sources[source]?.tiles;
  if (tiles) return tiles.replace("{level}", `${level}`).replace("{x}", `${x}`).replace("{y}", `${y}`);
  return `api/tile/${source}/${level}/${x}_${y}.png`;
}

export function storeUrl(source: Source): string {
  return new URL(`zarr/${encodeURIComponent(source.name)}`, document.baseURI).href;
}

/** Which parts are finished, row by row. */
export function finishedParts(state: State): boolean[] {
  const bytes = Uint8Array.from(atob(state.finished), (c) => c.charCodeAt(0));
  return Array.from({ length: state.cells[0] * state.cells[1] }, (_, i) => ((bytes[i >> 3]! >> (7 - (i & 7))) & 1) === 1);
}

export function sampleUrl(sheet: number, seed: string): string {
  return `api/sample/${sheet}/${seed}.png`;
}

export function cropUrl(number: number): string {
  return `api/crop/${number}.png`;
}

/** Ask something of the model; returns what is wrong with it, if anything is, which is no error of the page. */
export async function act(action: "samples" | "view" | "crop" | "render" | "open", values: Record<string, string | number>): Promise<string> {
  const query = new URLSearchParams(Object.entries(values).map(([key, value]) => [key, `${value}`]));
  try {
    const answer = await fetch(`api/do/${action}?${query}`, { method: "POST" });
    return await answer.text();
  } catch {
    return ""; // The connection is lost: the page says so.
  }
}

/** Call `onStates` now and after each change, and `onLink` when the connection is lost or found again. */
export function follow(onStates: (states: State[], model: ModelState | null) => void, onLink: (alive: boolean) => void): void {
  if (exported) return;
  let events: EventSource | null = null;
  const open = () => {
    events = new EventSource("api/events");
    events.onopen = () => onLink(true);
    events.onmessage = (event) => {
      const { sources, model } = JSON.parse(event.data as string) as { sources: State[]; model: ModelState | null };
      onStates(sources, model);
    };
    events.onerror = () => {
      onLink(false);
      // After an answer that is no stream, the browser does not try again by itself.
      if (events?.readyState === EventSource.CLOSED) setTimeout(open, 2000);
    };
  };
  open();
}
