// A picture with what models found in it, drawn as SVG in the picture's own pixels. A row is as in Shardsight's results:
// `detections`, `classes` and `answers` (docs: shardsight/row.py).

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Children are nodes or strings; a string becomes text, so that nothing a user wrote is ever markup. */
export function html(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element, likewise. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return made;
}

// --- Colours and line styles

// Far apart from one another, and light enough for dark text on them.
const PALETTE = [
  ...["#4cc9f0", "#ffd43b", "#ff6b6b", "#51cf66", "#cc7bea", "#ff922b"],
  ...["#f783ac", "#20c9b0", "#849bff", "#c0eb75", "#e0b68a", "#e9ecef"],
];
const colours = new Map();

/** A label's colour: from its text, so that it is the same on every page; the next free one where two would share it. */
export function colourOf(label) {
  if (!colours.has(label)) {
    let hash = 2166136261; // FNV-1a
    for (const letter of String(label)) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619) >>> 0;
    const taken = new Set(colours.values());
    const wished = PALETTE.map((_, step) => PALETTE[(hash + step) % PALETTE.length]);
    colours.set(label, wished.find((colour) => !taken.has(colour)) ?? wished[0]);
  }
  return colours.get(label);
}

const DASHES = ["", "8 5", "2 4", "12 4 2 4", "16 6"];
export const dashOf = (number) => DASHES[number % DASHES.length];
/** ① to ⑳: a layer's number, on its labels, and the key that switches it on and off. */
export const circled = (number) => (number < 20 ? String.fromCodePoint(0x2460 + number) : `(${number + 1})`);

/** A short line in the style of a layer's boxes, with its number. */
export function layerSample(number) {
  const line = svg("line", { x1: 1, y1: 5, x2: 33, y2: 5, "stroke-dasharray": dashOf(number) });
  return html("span", { class: "sample", "aria-hidden": "true" }, svg("svg", { viewBox: "0 0 34 10" }, line), circled(number));
}

export const swatch = (label, colour = colourOf(label)) =>
  html("span", { class: "swatch", style: `background:${colour}`, "aria-hidden": "true" });

/** The colour of a detection: in a video that of its identity, else of its label. */
export const markColour = (one) => (one.track_id == null ? colourOf(labelOf(one)) : PALETTE[one.track_id % PALETTE.length]);

// --- Rows

/** What each model found, apart: YOLO's detections, and those of each PaliGemma answer; and of a labelled set its truth,
 *  `row.truth`. [{key, name, found}] */
export function layersOf(row) {
  const layers = row?.truth ? [{ key: "truth", name: "truth", found: row.truth }] : [];
  if (row?.detections) layers.push({ key: "detections", name: "YOLO", found: row.detections });
  for (const answer of row?.answers ?? []) {
    if (answer.detections?.length || /^(detect|segment)\b/.test(answer.prompt)) {
      layers.push({ key: `answer ${answer.prompt}`, name: answer.prompt, found: answer.detections ?? [] });
    }
  }
  return layers;
}

export const labelOf = (one) => one.label || "(no label)";
export const scoreOf = (one) => (one.score == null ? "" : one.score.toFixed(2));

const TOKENS = /(?:<loc\d{4}>|<seg\d{3}>)+/g;

/** A PaliGemma answer as people read it: its words, and instead of <loc> and <seg> tokens what they stand for.
 *  {text, found: [[label, count]], lost}; lost: how many of its objects were malformed and are therefore not drawn. */
export function readable(answer) {
  const parts = (answer.text ?? "").split(/\s*;\s*/);
  const objects = parts.filter((part) => part.search(TOKENS) >= 0);
  const counts = new Map();
  for (const one of answer.detections ?? []) counts.set(labelOf(one), (counts.get(labelOf(one)) ?? 0) + 1);
  const found = [...counts];
  const text = objects.length ? parts.filter((part) => !objects.includes(part)).join("; ") : (answer.text ?? "");
  return { text: text.trim(), found, lost: Math.max(0, objects.length - (answer.detections?.length ?? 0)) };
}

// --- Masks

/** The run lengths of COCO's compressed RLE: columns from the top, background first. As pycocotools' rleFrString. */
export function runs(text) {
  const counts = [];
  for (let at = 0; at < text.length; ) {
    let value = 0;
    for (let shift = 0, more = true; more; shift += 5) {
      const code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      more = Boolean(code & 32);
      if (!more && code & 16) value |= -1 << (shift + 5);
    }
    if (counts.length > 2) value += counts[counts.length - 2];
    counts.push(value);
  }
  return counts;
}

const paths = new WeakMap(); // of each mask, as pictures are drawn again with every step of a filter

/** A row's mask as the data of an SVG path: each run a rectangle one pixel wide. */
export function maskPath(mask) {
  if (!paths.has(mask)) paths.set(mask, columns(mask));
  return paths.get(mask);
}

function columns({ height, counts }) {
  const parts = [];
  let at = 0;
  for (const [number, count] of runs(counts).entries()) {
    for (let left = count; left > 0; ) {
      const y = at % height;
      const length = Math.min(left, height - y);
      if (number % 2) parts.push(`M${(at - y) / height} ${y}h1v${length}h-1z`);
      at += length;
      left -= length;
    }
  }
  return parts.join("");
}

// --- Drawing

// COCO's skeleton, which ultralytics' pose models are trained on: pairs of its 17 keypoints.
const SKELETON = [
  ...[[15, 13], [13, 11], [16, 14], [14, 12], [11, 12], [5, 11], [6, 12], [5, 6], [5, 7], [6, 8]],
  ...[[7, 9], [8, 10], [1, 2], [0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6]],
];
const SEEN = 0.5; // the least score of a keypoint that is drawn
const FONT = "system-ui, sans-serif";
const ruler = document.createElement("canvas").getContext("2d");

/** The picture of `row`, from `src`, and what `view` lets be seen of it. small: labels without scores, as on a card. */
export class Picture {
  constructor(view, { small = false } = {}) {
    Object.assign(this, { view, small, row: null, size: { width: 0, height: 0 } }); // size: CSS pixels on the screen
    this.image = svg("image", { preserveAspectRatio: "none" });
    this.marks = svg("g", { class: "marks" });
    this.title = svg("title");
    this.root = svg("svg", { class: "picture", role: "img" }, this.title, this.image, this.marks);
    const resized = ([entry]) => {
      this.size = entry.contentRect; // asking each picture while others change would lay out the page each time
      this.draw();
    };
    new ResizeObserver(resized).observe(this.root);
  }

  show(row, src) {
    this.row = row;
    const { width, height } = row;
    if (src) this.image.setAttribute("href", src);
    else this.image.removeAttribute("href");
    for (const [name, value] of Object.entries({ width, height })) this.image.setAttribute(name, value ?? 1);
    this.root.setAttribute("viewBox", `0 0 ${width ?? 1} ${height ?? 1}`);
    this.root.style.setProperty("--aspect", `${width ?? 1} / ${height ?? 1}`);
    this.draw();
  }

  /** All anew: which marks are seen may have changed, or the size that text and lines are drawn for, CSS pixels. */
  draw(size = this.size) {
    const { row, view } = this;
    if (!row?.width || !size.width || !size.height) return;
    const unit = Math.max(row.width / size.width, row.height / size.height); // a CSS pixel, in the picture's
    const seen = view.seen(row);
    this.title.textContent = `${row.id}: ${countLabels(seen.map(({ one }) => labelOf(one)))}`;
    const groups = seen.map((mark) => this.mark(mark, unit));
    this.marks.replaceChildren(...groups);
    if (view.names) this.marks.append(...this.tags(seen, unit, size));
  }

  mark({ one, layer, index }, unit) {
    const colour = markColour(one);
    const group = svg("g", { class: "mark", "data-layer": layer.key, "data-index": index, stroke: colour, fill: colour });
    if (one.mask) group.append(svg("path", { class: "mask", d: maskPath(one.mask) }));
    const box = one.corners?.length
      ? () => svg("polygon", { points: one.corners.join(" ") })
      : () => svg("rect", { x: one.x1, y: one.y1, width: one.x2 - one.x1, height: one.y2 - one.y1 });
    const line = box();
    line.setAttribute("class", "line");
    line.setAttribute("stroke-dasharray", dashOf(layer.number));
    const halo = box();
    halo.setAttribute("class", "halo");
    group.append(halo, line, ...this.points(one, unit));
    return group;
  }

  points(one, unit) {
    const points = one.keypoints ?? [];
    const isSeen = (point) => point && (point.score ?? 1) >= SEEN;
    const bones = points.length === 17 ? SKELETON.map((pair) => pair.map((n) => points[n])) : [];
    const lines = bones.filter((pair) => pair.every(isSeen));
    return [
      ...lines.map(([a, b]) => svg("line", { class: "line", x1: a.x, y1: a.y, x2: b.x, y2: b.y })),
      ...points.filter(isSeen).map(({ x, y }) => svg("circle", { class: "point", cx: x, cy: y, r: 3.5 * unit })),
    ];
  }

  /** Labels, the surest first; one that finds no free place is left to the table of the row. */
  tags(seen, unit, { width: shown }) {
    const size = this.small || shown < 500 ? 11 : 13;
    ruler.font = `600 ${size}px ${FONT}`;
    const several = new Set(seen.map(({ layer }) => layer.key)).size > 1;
    const wanted = surestFirst(this.small ? withoutRepeats(seen) : seen).map((mark) => {
      const { one, layer } = mark;
      const track = one.track_id == null ? "" : ` #${one.track_id}`;
      const score = this.small ? "" : ` ${scoreOf(one)}`;
      const text = `${several && !this.small ? `${circled(layer.number)} ` : ""}${labelOf(one)}${track}${score}`.trimEnd();
      const room = this.row.width / unit - 10;
      const short = clipped(text, room);
      return { mark, text: short, width: (ruler.measureText(short).width + 8) * unit, height: (size + 5) * unit };
    });
    return placed(wanted, this.row.width, this.row.height).map(({ mark, text, width, height, x, y }) => {
      const first = mark.layer.number === 0;
      const colour = markColour(mark.one);
      const plate = { x, y, width, height, rx: first ? 0 : height / 2, fill: first ? colour : "#14181de8", stroke: colour };
      const place = { x: x + 4 * unit, y: y + height - 4.5 * unit, "font-size": size * unit, fill: first ? "#111" : "#fff" };
      const box = svg("rect", { class: "plate", ...plate });
      const data = { "data-layer": mark.layer.key, "data-index": mark.index };
      return svg("g", { class: "tag", ...data }, box, svg("text", place, text));
    });
  }

  /** Make one mark stand out; none with null. */
  point(layer, index) {
    this.root.classList.toggle("pointing", layer != null);
    for (const group of this.marks.children) {
      group.classList.toggle("pointed", group.dataset.layer === layer && group.dataset.index === String(index));
    }
  }
}

const surestFirst = (marks) => [...marks].sort((a, b) => (b.one.score ?? 1) - (a.one.score ?? 1));

/** Of the same thing, found by several models, the surest mark alone. */
export function withoutRepeats(marks) {
  const kept = [];
  for (const mark of surestFirst(marks)) {
    const again = ({ one }) => labelOf(one) === labelOf(mark.one) && overlap(one, mark.one) > 0.5;
    if (!kept.some(again)) kept.push(mark);
  }
  return kept;
}

/** Intersection over union of two boxes. */
function overlap(a, b) {
  const area = (x1, y1, x2, y2) => Math.max(0, x2 - x1) * Math.max(0, y2 - y1);
  const both = area(Math.max(a.x1, b.x1), Math.max(a.y1, b.y1), Math.min(a.x2, b.x2), Math.min(a.y2, b.y2));
  return both / (area(a.x1, a.y1, a.x2, a.y2) + area(b.x1, b.y1, b.x2, b.y2) - both) || 0;
}

function clipped(text, room) {
  if (ruler.measureText(text).width <= room) return text;
  const letters = [...text];
  while (letters.length > 1 && ruler.measureText(`${letters.join("")}…`).width > room) letters.pop();
  return `${letters.join("")}…`;
}

/** The labels that find a place within the picture, near their boxes, and over no other; with x and y. */
export function placed(wanted, width, height) {
  const done = [];
  for (const tag of wanted) {
    const { x1, y1, x2, y2 } = tag.mark.one;
    const [left, right] = [x1, x2 - tag.width].map((x) => Math.max(0, Math.min(x, width - tag.width)));
    const beside = [[x2, y1], [x1 - tag.width, y1]];
    const inside = [0, 1, 2, 3].map((line) => [left, y1 + line * tag.height]);
    const above = [[left, y1 - tag.height], [right, y1 - tag.height]];
    const places = [...above, [left, y2], [right, y2], ...beside, ...inside, [right, y2 - tag.height]];
    const place = places.find(([x, y]) => {
      const within = x >= 0 && y >= 0 && x + tag.width <= width && y + tag.height <= height;
      return within && !done.some((o) => x < o.x + o.width && o.x < x + tag.width && y < o.y + o.height && o.y < y + tag.height);
    });
    if (place) done.push({ ...tag, x: place[0], y: place[1] });
  }
  return done;
}

/** "2 star, 1 ring", the most frequent first; "nothing" of none. */
export function countLabels(labels) {
  const counts = new Map();
  for (const label of labels) counts.set(label, (counts.get(label) ?? 0) + 1);
  const parts = [...counts].sort((a, b) => b[1] - a[1]).map(([label, count]) => `${count} ${label}`);
  return parts.join(", ") || "nothing";
}
