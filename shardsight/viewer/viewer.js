// Rows to look at: what is seen of them (layers, labels, scores), cards of many pictures, and one picture large with its
// row beside it. An item is {picture, problem, rows: [{model, row}]}: one picture, and each model's row of it; or of a
// video {picture, video, problem, rows: [{model, row, frames}]}: its first frame, and each model's rows of all its frames.

import {
  circled, colourOf, countLabels, html, labelOf, layerSample, layersOf, markColour, Picture, readable, scoreOf, svg, swatch,
  withoutRepeats,
} from "./picture.js";
import { momentOf, Player, PLAYER_KEYS } from "./player.js";

const BINS = 20; // of scores from 0 to 1
const CARD_ANSWERS = 3;

/** What may be seen: shared by all pictures of a page. Fires `change`. */
export class View extends EventTarget {
  hiddenLayers = new Set();
  hiddenLabels = new Set();
  least = 0; // score
  names = true; // labels in the picture
  numbers = new Map(); // layer → its number

  layers(row) {
    return layersOf(row).map((layer) => ({ ...layer, number: this.number(layer.key) }));
  }

  number(key) {
    if (!this.numbers.has(key)) this.numbers.set(key, this.numbers.size);
    return this.numbers.get(key);
  }

  /** The row's marks that are seen: [{one, layer, index}]. */
  seen(row) {
    return this.layers(row)
      .filter((layer) => !this.hiddenLayers.has(layer.key))
      .flatMap((layer) => layer.found.map((one, index) => ({ one, layer, index })))
      .filter(({ one }) => (one.score ?? 1) >= this.least && !this.hiddenLabels.has(labelOf(one)));
  }

  /** Whether the filters leave anything of a row: a mark, or its best class. */
  leaves(row) {
    const best = this.hiddenLayers.has("classes") ? null : row.classes?.[0];
    const isSeen = best && (best.score ?? 1) >= this.least && !this.hiddenLabels.has(labelOf(best));
    return Boolean(isSeen) || this.seen(row).length > 0;
  }

  change(changes) {
    Object.assign(this, changes);
    this.dispatchEvent(new Event("change"));
  }

  toggle(set, value, isSeen = set.has(value)) {
    isSeen ? set.delete(value) : set.add(value);
    this.dispatchEvent(new Event("change"));
  }

  /** Keys that work wherever no text is typed: 1 to 9 for layers, L for the labels. Returns whether it was one. */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    const layer = [...this.numbers].find(([, number]) => String(number + 1) === event.key);
    if (layer) this.toggle(this.hiddenLayers, layer[0]);
    else if (event.key.toLowerCase() === "l") this.change({ names: !this.names });
    else return false;
    return true;
  }
}

/** Of rows, what the filters show: per layer the counts of labels and of scores. [{key, name, labels, scores}] */
export function statistics(rows) {
  const layers = new Map();
  for (const layer of rows.flatMap(layersOf)) {
    if (!layers.has(layer.key)) layers.set(layer.key, { ...layer, labels: new Map(), scores: Array(BINS).fill(0) });
    const { labels, scores } = layers.get(layer.key);
    for (const one of layer.found) {
      labels.set(labelOf(one), (labels.get(labelOf(one)) ?? 0) + 1);
      if (one.score != null) scores[Math.min(BINS - 1, Math.floor(one.score * BINS))] += 1;
    }
  }
  return [...layers.values()].map(({ key, name, labels, scores }) => ({ key, name, labels: [...labels], scores }));
}

const plain = (number) => number.toLocaleString("en");
const total = (layer) => layer.labels.reduce((sum, [, count]) => sum + count, 0);

/** Layers to switch on and off, a slider under the histogram of scores, and labels with their counts. */
export function filters(view, layers) {
  for (const layer of layers) view.number(layer.key);
  const labels = [...new Set(layers.flatMap((layer) => layer.labels.map(([label]) => label)))].sort();
  labels.forEach(colourOf);
  const parts = [layerChoices(view, layers), scoreChoice(view, layers), labelChoices(view, layers, labels)];
  const update = () => parts.forEach((part) => part.update());
  view.addEventListener("change", update);
  update();
  const root = html("div", { class: "filters" }, layers.length ? parts.map((part) => part.root) : []);
  return { root, stop: () => view.removeEventListener("change", update) };
}

function layerChoices(view, layers) {
  const boxes = layers.map((layer) => {
    const onchange = (event) => view.toggle(view.hiddenLayers, layer.key, event.target.checked);
    const box = html("input", { type: "checkbox", onchange });
    const count = html("span", { class: "count" }, plain(total(layer)));
    const name = html("span", { class: "name", title: layer.name }, layer.name);
    return { layer, box, label: html("label", { class: "choice" }, box, layerSample(view.number(layer.key)), name, count) };
  });
  const names = html("input", { type: "checkbox", onchange: (event) => view.change({ names: event.target.checked }) });
  const root = html("fieldset", {}, html("legend", {}, "Layers"), boxes.map(({ label }) => label),
    html("label", { class: "choice" }, names, html("span", { class: "name" }, "Labels in the picture")));
  const update = () => {
    for (const { layer, box } of boxes) box.checked = !view.hiddenLayers.has(layer.key);
    names.checked = view.names;
  };
  return { root, update };
}

function scoreChoice(view, layers) {
  const bars = Array.from({ length: BINS }, (_, n) => svg("rect", { x: n + 0.08, width: 0.84 }));
  const chart = svg("svg", { class: "scores", viewBox: `0 0 ${BINS} 10`, preserveAspectRatio: "none", role: "img" }, bars);
  const oninput = (event) => view.change({ least: Number(event.target.value) });
  const slider = html("input", { type: "range", min: 0, max: 1, step: 0.01, "aria-label": "Least score", oninput });
  const value = html("output", {});
  const root = html("fieldset", {}, html("legend", {}, "Score at least ", value), html("div", { class: "slide" }, chart, slider));
  const update = () => {
    const shown = layers.filter((layer) => !view.hiddenLayers.has(layer.key));
    const sums = bars.map((_, n) => shown.reduce((sum, layer) => sum + layer.scores[n], 0));
    const most = Math.max(1, ...sums);
    for (const [n, bar] of bars.entries()) {
      const height = sums[n] && Math.max(0.4, (10 * sums[n]) / most);
      bar.setAttribute("y", 10 - height);
      bar.setAttribute("height", height);
      bar.setAttribute("class", (n + 1) / BINS <= view.least ? "below" : "");
    }
    const said = sums.map((sum, n) => (sum ? `${sum} from ${(n / BINS).toFixed(2)}` : "")).filter(Boolean);
    chart.setAttribute("aria-label", `Histogram of scores: ${said.join(", ") || "none"}`);
    slider.value = view.least;
    value.textContent = view.least.toFixed(2);
  };
  return { root, update };
}

function labelChoices(view, layers, labels) {
  const sums = (label) =>
    layers.filter((layer) => !view.hiddenLayers.has(layer.key))
      .reduce((sum, layer) => sum + (layer.labels.find(([name]) => name === label)?.[1] ?? 0), 0);
  const rows = labels.map((label) => {
    const onchange = (event) => view.toggle(view.hiddenLabels, label, event.target.checked);
    const box = html("input", { type: "checkbox", onchange });
    const bar = html("span", { class: "bar", style: `background:${colourOf(label)}` });
    const count = html("span", { class: "count" });
    const name = html("span", { class: "name", title: label }, label);
    const root = html("label", { class: "choice bars" }, box, swatch(label), name, count, bar);
    return { label, box, bar, count, root };
  });
  const list = html("div", { class: "labels" }, rows.map(({ root }) => root));
  const all = (seen) => () => view.change({ hiddenLabels: new Set(seen ? [] : labels) });
  const buttons = labels.length > 2 && html("div", { class: "buttons" },
    html("button", { type: "button", onclick: all(true) }, "All"), html("button", { type: "button", onclick: all(false) }, "None"));
  const root = html("fieldset", {}, html("legend", {}, "Labels"), buttons, list);
  const update = () => {
    const counted = rows.map((row) => ({ ...row, sum: sums(row.label) }));
    const most = Math.max(1, ...counted.map(({ sum }) => sum));
    for (const { label, box, bar, count, sum } of counted) {
      box.checked = !view.hiddenLabels.has(label);
      count.textContent = plain(sum);
      bar.style.width = `${(100 * sum) / most}%`;
    }
  };
  return { root, update };
}

// --- A row in words

/** A PaliGemma answer: its text, and its objects as chips instead of tokens. */
export function answerText(answer) {
  const { text, found, lost } = readable(answer);
  const chips = found.map(([label, count]) =>
    html("span", { class: "chip" }, swatch(label), count > 1 ? `${label} × ${count}` : label));
  const notes = [
    lost && `${lost} more, malformed and therefore not drawn`,
    answer.finish_reason === "length" && "cut off at the most tokens allowed",
  ].filter(Boolean);
  const nothing = !text && !found.length && html("span", { class: "quiet" }, lost ? "" : "nothing");
  return html("div", { class: "answer" }, chips, text && html("span", { class: "text" }, text), nothing,
    notes.map((note) => html("span", { class: "quiet note" }, ` (${note})`)));
}

/** Everything a row says, beside its picture. pictures: whose marks light up under the pointer. */
export class Details {
  constructor(view, picture) {
    Object.assign(this, { view, picture });
    this.root = html("div", { class: "details" });
  }

  show(row, { answers = true } = {}) {
    this.row = row;
    this.found = html("div", { class: "tables" });
    this.root.replaceChildren(...[
      row.error && html("p", { class: "error" }, html("strong", {}, `${row.error.stage}: ${row.error.type}`), ` ${row.error.message}`),
      row.classes?.length && section("Classes", classBars(row.classes)),
      answers && row.answers?.length && section("Answers", answerList(row.answers)),
      this.found,
      row.metadata && section("Metadata", html("pre", {}, pretty(row.metadata))),
      html("details", {}, html("summary", {}, "Row as JSON"), copied(JSON.stringify(row, null, 2))),
    ].filter(Boolean));
    this.update();
  }

  /** The tables of detections, of what is seen. */
  update() {
    if (!this.row) return;
    const focused = this.found.contains(document.activeElement) && document.activeElement.dataset.layer;
    const seen = this.view.seen(this.row);
    const tables = this.view.layers(this.row).map((layer) => {
      const own = seen.filter((mark) => mark.layer.key === layer.key);
      const hidden = layer.found.length - own.length;
      const head = html("caption", {}, this.choice(layer));
      const note = hidden ? `${hidden} hidden by the filters` : own.length ? null : "nothing";
      return html("div", {}, this.table(head, own), note && html("p", { class: "quiet" }, note));
    });
    this.found.replaceChildren(...tables);
    if (focused) this.found.querySelector(`input[data-layer=${CSS.escape(focused)}]`)?.focus();
  }

  choice(layer) {
    const checked = !this.view.hiddenLayers.has(layer.key);
    const onchange = (event) => this.view.toggle(this.view.hiddenLayers, layer.key, event.target.checked);
    const box = html("input", { type: "checkbox", checked, onchange, "data-layer": layer.key });
    return html("label", { class: "choice" }, box, layerSample(layer.number), html("span", { class: "name" }, layer.name));
  }

  table(head, marks) {
    const optional = {
      track: ({ track_id }) => track_id,
      text: ({ text }) => text,
      points: ({ keypoints }) => keypoints?.length || null,
    };
    const extra = Object.entries(optional).filter(([, value]) => marks.some(({ one }) => value(one) != null));
    const titles = ["label", "score", ...extra.map(([name]) => name), "x1, y1, x2, y2"];
    const rows = marks.map(({ one, layer, index }) =>
      html("tr", {
        onpointerenter: () => this.picture.point(layer.key, index), onpointerleave: () => this.picture.point(null),
      },
        html("th", { scope: "row" }, swatch(labelOf(one), markColour(one)), labelOf(one)), html("td", {}, scoreOf(one)),
        extra.map(([, value]) => html("td", {}, String(value(one) ?? ""))),
        html("td", { class: "box" }, [one.x1, one.y1, one.x2, one.y2].map((side) => Math.round(side)).join(", "))));
    const heads = html("tr", {}, titles.map((title) => html("th", { scope: "col" }, title)));
    return html("div", { class: "wide" }, html("table", {}, head, marks.length ? [html("thead", {}, heads), html("tbody", {}, rows)] : []));
  }
}

const section = (title, ...content) => html("section", {}, html("h3", {}, title), ...content);

function answerList(answers) {
  return html("dl", { class: "answers" }, answers.map((answer) => [html("dt", {}, answer.prompt), html("dd", {}, answerText(answer))]));
}

function classBars(classes) {
  return html("ol", { class: "classes" }, classes.slice(0, 5).map((one) =>
    html("li", {}, html("span", { class: "name" }, labelOf(one)), html("span", { class: "count" }, scoreOf(one)),
      html("span", { class: "bar", style: `width:${100 * (one.score ?? 0)}%;background:${colourOf(labelOf(one))}` }))));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Text with a button that copies it. */
export function copied(text) {
  const pre = html("pre", { tabindex: 0 }, text);
  const button = html("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // where a page may not, as over http from another machine
      getSelection().selectAllChildren(pre);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return html("div", { class: "copied" }, button, pre);
}

// --- Many pictures

const nameOf = ({ rows: [{ row, frames }] }) => (frames ? videoOf(row.id) : row.id).split("/").pop();
/** The id of the video that a frame's row is of. */
const videoOf = (id) => id.replace(/@[^@]*$/, "");

/** A prompt without the words that only PaliGemma needs. */
const question = (prompt) => {
  const [, form, rest] = /^(caption|cap|describe|answer|ocr)(?: \w+)?(?: (.*))?$/.exec(prompt) ?? [];
  return rest ? `${rest}?` : `${form ?? prompt}:`;
};

function describe(view, row) {
  if (row.error) return row.error.type;
  if (row.classes?.length) return `${labelOf(row.classes[0])} ${scoreOf(row.classes[0])}`;
  return view.layers(row).length ? countLabels(withoutRepeats(view.seen(row)).map(({ one }) => labelOf(one))) : "";
}

/** What is in a video: its identities by label, if it was tracked, and how long it is. */
export function describeVideo(view, frames) {
  const tracks = new Map(); // identity → label
  for (const { one } of frames.flatMap((row) => view.seen(row))) if (one.track_id != null) tracks.set(one.track_id, labelOf(one));
  const seconds = frames.at(-1).pts_seconds - frames[0].pts_seconds;
  const length = `${plain(frames.length)} ${frames.length === 1 ? "frame" : "frames"}, ${seconds.toFixed(1)} s`;
  return tracks.size ? `${countLabels([...tracks.values()])} tracked · ${length}` : length;
}

/** Cards of pictures, drawn when they come near the window; one opens large. */
export class Gallery {
  constructor(view, items) {
    Object.assign(this, { view, items });
    this.large = new Large(view, items, (index) => this.cards[index].root.focus());
    this.cards = items.map((item, index) => new Card(view, item, () => this.large.open(index)));
    this.grid = html("div", { class: "grid", onkeydown: (event) => this.move(event) }, this.cards.map((card) => card.root));
    this.none = html("p", { class: "quiet", hidden: true }, "No picture has anything that the filters let through.");
    this.root = html("div", {}, this.grid, this.none, this.large.root);
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) this.cards.find((card) => card.root === entry.target).near = entry.isIntersecting;
      this.drawNear();
    }, { rootMargin: "800px 0px" });
    for (const card of this.cards) near.observe(card.root);
    this.onlySeen = false;
    view.addEventListener("change", () => this.update());
    addEventListener("beforeprint", () => this.cards.forEach((card) => card.draw(PRINTED)));
    addEventListener("afterprint", () => this.update());
  }

  update() {
    const kept = this.cards.filter((card) => {
      const rows = () => card.item.rows.flatMap(({ row, frames }) => frames ?? [row]);
      card.root.hidden = this.onlySeen && !rows().some((row) => this.view.leaves(row));
      card.old = true;
      return !card.root.hidden;
    });
    this.none.hidden = kept.length > 0;
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNear());
  }

  drawNear() {
    for (const card of this.cards) if (card.near && card.old) card.draw();
  }

  move(event) {
    const columns = getComputedStyle(this.grid).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    const shown = this.cards.map((card) => card.root).filter((root) => !root.hidden);
    const next = shown[shown.indexOf(document.activeElement) + step];
    if (!step || !next) return;
    event.preventDefault();
    next.focus();
  }
}

const PRINTED = { width: 240, height: 180 }; // CSS pixels that labels on paper are drawn for, as most cards were never on the screen

class Card {
  near = false;
  old = true;

  constructor(view, item, onclick) {
    Object.assign(this, { view, item });
    this.panels = item.rows.map(() => new Picture(view, { small: true }));
    const panels = this.panels.map((panel, n) => {
      const model = item.rows[n].model;
      return html("span", { class: "panel" }, panel.root, model && html("span", { class: "model" }, model));
    });
    const film = item.rows[0].frames && html("span", { class: "film", "aria-label": "Video" }, "▶");
    this.words = html("span", { class: "words" });
    const answers = (item.rows[0].row.answers ?? []).filter((answer) => !answer.detections?.length);
    const said = answers.slice(0, CARD_ANSWERS).map((answer) =>
      html("span", { class: "said" }, html("span", { class: "quiet" }, `${question(answer.prompt)} `), readable(answer).text || "nothing"));
    const problem = item.problem && html("span", { class: "problem" }, item.problem);
    this.root = html("button", { type: "button", class: "card", onclick }, html("span", { class: "panels" }, panels, film),
      html("span", { class: "title" }, nameOf(item)), problem, this.words, said);
  }

  draw(size) {
    this.old = false;
    for (const [n, { row }] of this.item.rows.entries()) {
      if (!this.panels[n].row) this.panels[n].show(row, this.item.picture);
      this.panels[n].draw(size);
    }
    const words = this.item.rows.map(({ model, row, frames }) =>
      (model ? `${model}: ` : "") + (frames ? describeVideo(this.view, frames) : describe(this.view, row)));
    this.words.textContent = words.join("; ");
  }
}

/** One picture as large as the window lets it be, its row beside it; arrows lead to the next, Escape back. */
class Large {
  constructor(view, items, onleave) {
    Object.assign(this, { view, items, onleave, index: 0 });
    this.title = html("h2", {});
    this.place = html("span", { class: "quiet" });
    this.panels = html("div", { class: "stage" });
    this.side = html("div", { class: "side" });
    const button = (text, label, onclick) => html("button", { type: "button", "aria-label": label, title: label, onclick }, text);
    const head = html("header", {}, this.title, this.place, button("←", "Previous picture", () => this.step(-1)),
      button("→", "Next picture", () => this.step(1)), button("✕", "Close", () => this.root.close()));
    this.keys = html("p", { class: "keys quiet" });
    this.pictures = [];
    const onclose = () => (this.stop(), onleave(this.index));
    this.root = html("dialog", { class: "large", "aria-label": "One picture and its row", onclose },
      head, html("div", { class: "both" }, html("div", { class: "left" }, this.panels, this.keys), this.side));
    this.root.addEventListener("keydown", (event) => this.key(event));
    view.addEventListener("change", () => this.root.open && this.update());
  }

  open(index) {
    this.root.showModal();
    this.show(index);
  }

  show(index) {
    this.index = index;
    const item = this.items[index];
    this.title.textContent = nameOf(item);
    this.title.title = item.rows[0].row.id;
    this.place.textContent = `${index + 1} of ${this.items.length}`;
    this.stop();
    this.pictures = item.rows.map(({ frames }, n) =>
      frames ? new Player(this.view, (row) => this.details[n].show(row)) : new Picture(this.view));
    this.details = this.pictures.map((picture) => new Details(this.view, picture));
    this.panels.replaceChildren(...item.rows.map(({ model }, n) =>
      html("div", { class: "panel" }, model && html("h3", {}, model), this.pictures[n].root)),
      ...(item.problem ? [html("p", { class: "problem" }, item.problem)] : []));
    const video = item.rows[0].frames;
    this.side.replaceChildren(html("p", { class: "quiet id" }, video ? describeVideo(this.view, video) : sizeOf(item.rows[0].row)),
      ...item.rows.flatMap(({ model }, n) => [model && html("h3", {}, model), this.details[n].root]).filter(Boolean));
    for (const [n, { row, frames }] of item.rows.entries()) {
      if (frames) this.pictures[n].show(frames, item.video);
      else this.pictures[n].show(row, item.picture);
      this.details[n].show(row);
    }
    if (video) this.pictures[0].screen.focus();
    const play = video ? `${PLAYER_KEYS} · ` : "";
    const numbers = [...this.view.numbers].slice(0, 9).map(([, number]) => circled(number)).join("");
    this.keys.textContent = `${play}← → other pictures · Esc back · L labels${numbers && ` · 1–${Math.min(9, this.view.numbers.size)} layers`}`;
    this.side.scrollTop = 0;
  }

  /** End what plays. */
  stop() {
    for (const picture of this.pictures) if (picture instanceof Player) picture.stop();
  }

  update() {
    for (const picture of this.pictures) picture.draw();
    for (const details of this.details) details.update();
  }

  step(by) {
    this.show((this.index + by + this.items.length) % this.items.length);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (this.pictures.filter((picture) => picture instanceof Player && picture.key(event)).length) return;
    if (step) this.step(step);
    else if (!this.view.key(event)) return;
    event.preventDefault();
    event.stopPropagation();
  }
}

export function sizeOf(row) {
  const when = row.pts_seconds == null ? "" : `, ${momentOf(row)}`;
  return `${row.id}${row.width ? `, ${row.width} × ${row.height} pixels` : ""}${when}`;
}
