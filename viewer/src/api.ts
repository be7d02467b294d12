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

export interface View {
  engine: string;
  dpi: number;
  maxRegion: number;
  sources: Source[];
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

/** Call `onStates` now and after each change, and `onLink` when the connection is lost or found again. */
export function follow(onStates: (states: State[]) => void, onLink: (alive: boolean) => void): void {
  if (exported) return;
  let events: EventSource | null = null;
  const open = () => {
    events = new EventSource("api/events");
    events.onopen = () => onLink(true);
    events.onmessage = (event) => onStates(JSON.parse(event.data as string) as State[]);
    events.onerror = () => {
      onLink(false);
      // After an answer that is no stream, the browser does not try again by itself.
      if (events?.readyState === EventSource.CLOSED) setTimeout(open, 2000);
    };
  };
  open();
}
