// Charts as SVG: lines and points with axes, drawn anew for the width that they get, so that text keeps its size.

import { circled, dashOf, html, svg } from "./picture.js";

const COLOURS = 8; // of models, as --m0 to --m7 in the style sheet
const MARKS = ["circle", "square", "triangle", "diamond"];
const TEXT = 12; // CSS pixels
const textRuler = document.createElement("canvas").getContext("2d");

/** The colour of the model of that number. */
export const modelColour = (number) => `var(--m${number % COLOURS})`;

/** What stands for a model in legends and tables: its line, its point, and its number. */
export function modelSample(number, { line = true } = {}) {
  const colour = modelColour(number);
  const stroke = line && svg("line", { x1: 1, y1: 6, x2: 33, y2: 6, style: `stroke:${colour}`, "stroke-dasharray": dashOf(number) });
  const point = !line && markOf(number, 17, 6, 5);
  return html("span", { class: "sample", "aria-hidden": "true" }, svg("svg", { viewBox: "0 0 34 12" }, stroke || [], point || []), circled(number));
}

/** A figure: {title, note, choices: [{name, lines | points}], x, y, diagonal}. Of several choices one is shown.
 *
 *  lines: [{model, name, points: [[x, y]]}]; points: [{model, name, x, y, low, high, front}], with the front joined.
 *  draw(spec, choice, width): makes another picture instead, without a legend; least: its least width, if it takes all.
 *  model: its number. x, y: {label, min, max, log}; what is missing follows from the values. */
export function figure(spec) {
  const area = html("div", { class: "area" });
  const legend = html("ul", { class: "legend" });
  let choice = spec.choices[0];
  const draw = () => {
    if (!area.clientWidth) return;
    area.replaceChildren((spec.draw ?? chart)(spec, choice, spec.least ? area.clientWidth : Math.min(720, area.clientWidth)));
    if (spec.draw) return;
    legend.replaceChildren(...(choice.lines ?? choice.points).map(({ model, name }) =>
      html("li", {}, modelSample(model, { line: Boolean(choice.lines) }), name)));
  };
  const onchange = (event) => ((choice = spec.choices[event.target.value]), draw());
  const select = spec.choices.length > 1 && html("select", { "aria-label": `${spec.title}: what is shown`, onchange },
    spec.choices.map(({ name }, index) => html("option", { value: index }, name)));
  new ResizeObserver(draw).observe(area);
  addEventListener("beforeprint", draw); // a page that is printed as soon as it is there was never on a screen
  return html("figure", { class: "chart" },
    html("figcaption", {}, html("h3", {}, spec.title), select), area, legend, spec.note && html("p", { class: "quiet" }, spec.note));
}

function chart(spec, choice, width) {
  const height = Math.round(Math.max(240, Math.min(400, width * 0.62)));
  const pairs = choice.lines ? choice.lines.flatMap(({ points }) => points) : choice.points.flatMap((p) => [[p.x, p.low ?? p.y], [p.x, p.high ?? p.y]]);
  const x = scaleOf(spec.x, pairs.map(([value]) => value));
  const y = scaleOf(spec.y, pairs.map(([, value]) => value));
  const left = 16 + TEXT + Math.max(...y.ticks.map((tick) => textWidth(tick.text)));
  const box = { left, right: width - 14, top: 10, bottom: height - 2 * TEXT - 20 };
  const at = (h, v) => [box.left + (box.right - box.left) * x.place(h), box.bottom - (box.bottom - box.top) * y.place(v)];
  const parts = [axes(spec, x, y, box, width, height)];
  if (spec.diagonal) parts.push(polyline([at(x.min, y.min), at(x.max, y.max)], { class: "diagonal" }));
  for (const line of choice.lines ?? []) parts.push(lineOf(line, at));
  if (choice.points) parts.push(...pointsOf(choice.points, at, box));
  const names = (choice.lines ?? choice.points).map(({ name }) => name).join(", ");
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${spec.title}: ${names}` }, parts);
}

function lineOf({ model, name, points }, at) {
  const attributes = { class: "curve", stroke: modelColour(model), "stroke-dasharray": dashOf(model) };
  return polyline(points.map(([h, v]) => at(h, v)), attributes, svg("title", {}, name));
}

export const polyline = (points, attributes, ...children) =>
  svg("path", { fill: "none", d: points.map(([h, v], n) => `${n ? "L" : "M"}${h.toFixed(1)} ${v.toFixed(1)}`).join(""), ...attributes }, children);

// --- Points, with their labels

function pointsOf(points, at, box) {
  const front = points.filter((point) => point.front).sort((a, b) => a.x - b.x);
  const steps = front.flatMap((point, n) => (n ? [at(front[n - 1].x, point.y), at(point.x, point.y)] : [at(point.x, point.y)]));
  const taken = points.map(({ x, y }) => {
    const [h, v] = at(x, y);
    return { x: h - 7, y: v - 7, width: 14, height: 14 };
  });
  const groups = points.map((point) => {
    const [h, v] = at(point.x, point.y);
    const bar = point.low != null && polyline([at(point.x, point.low), at(point.x, point.high)], { class: "interval", stroke: modelColour(point.model) });
    return svg("g", {}, bar || [], markOf(point.model, h, v, 6), svg("title", {}, point.title ?? point.name), nameBeside(point, h, v, box, taken));
  });
  return [polyline(steps, { class: "front" }), ...groups];
}

/** The name at the first place beside its point that is free and within the chart; its number alone where none is. */
function nameBeside({ model, name }, h, v, box, taken) {
  for (const text of [`${circled(model)} ${name}`, circled(model)]) {
    const width = textWidth(text);
    const places = [
      ...[[h + 11, v - 8], [h - 11 - width, v - 8], [h - width / 2, v - 27], [h - width / 2, v + 11]],
      ...[[h + 8, v - 25], [h - 8 - width, v - 25], [h + 8, v + 9], [h - 8 - width, v + 9]],
    ].map(([x, y]) => ({ x, y, width, height: 16 }));
    const place = places.find((one) => {
      const within = one.x >= box.left + 2 && one.x + width <= box.right && one.y >= box.top && one.y + 16 <= box.bottom;
      return within && !taken.some((o) => one.x < o.x + o.width && o.x < one.x + width && one.y < o.y + o.height && o.y < one.y + 16);
    });
    if (!place) continue;
    taken.push(place);
    return svg("text", { class: "name", x: place.x, y: place.y + TEXT }, text);
  }
  return [];
}

function markOf(number, x, y, r) {
  const fill = modelColour(number);
  const shape = MARKS[number % MARKS.length];
  if (shape === "circle") return svg("circle", { class: "dot", cx: x, cy: y, r, fill });
  const points = {
    square: [[-r, -r], [r, -r], [r, r], [-r, r]],
    triangle: [[0, -r * 1.15], [r * 1.1, r * 0.85], [-r * 1.1, r * 0.85]],
    diamond: [[0, -r * 1.25], [r * 1.25, 0], [0, r * 1.25], [-r * 1.25, 0]],
  }[shape].map(([h, v]) => `${x + h},${y + v}`);
  return svg("polygon", { class: "dot", points: points.join(" "), fill });
}

// --- Axes

export const textWidth = (text) => ((textRuler.font = `${TEXT}px system-ui, sans-serif`), textRuler.measureText(text).width);

export function scaleOf({ min, max, log }, values) {
  let low = min ?? Math.min(...values);
  let high = max ?? Math.max(...values);
  if (log) {
    [low, high] = [low / 1.5, high * 1.5];
    const place = (value) => Math.log(value / low) / Math.log(high / low);
    return { min: low, max: high, place, ticks: decades(low, high).map((value) => ({ value, text: tickText(value) })) };
  }
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  if (min == null) low -= room;
  if (max == null) high += room;
  const step = niceStep((high - low) / 5);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n += 1) ticks.push({ value: n * step, text: tickText(n * step || 0, step) });
  return { min: low, max: high, place: (value) => (value - low) / (high - low), ticks };
}

/** 1, 2 and 5 times the powers of ten between two numbers; the powers alone where there are many. */
function decades(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) for (const n of [1, 2, 5]) found.push(n * 10 ** power);
  const within = found.filter((value) => value >= low && value <= high);
  return within.length > 8 ? within.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9) : within;
}

function niceStep(wished) {
  const power = 10 ** Math.floor(Math.log10(wished));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= wished * 0.999);
}

function tickText(value, step = value) {
  const digits = Math.max(0, -Math.floor(Math.log10(Math.abs(step)) + 1e-9));
  return value.toLocaleString("en", { minimumFractionDigits: step === value ? 0 : digits, maximumFractionDigits: digits });
}

export function axes(spec, x, y, box, width, height) {
  const across = y.ticks.map(({ value, text }) => {
    const v = box.bottom - (box.bottom - box.top) * y.place(value);
    return [polyline([[box.left, v], [box.right, v]], { class: "grid" }), svg("text", { class: "tick", x: box.left - 6, y: v + 4, "text-anchor": "end" }, text)];
  });
  let end = -Infinity; // of the label before, so that none runs into the next
  const up = x.ticks.map(({ value, text }) => {
    const h = box.left + (box.right - box.left) * x.place(value);
    const half = textWidth(text) / 2;
    const free = h - half > end + 6 && h + half <= width;
    if (free) end = h + half;
    return [polyline([[h, box.top], [h, box.bottom]], { class: "grid" }), free && svg("text", { class: "tick", x: h, y: box.bottom + 16, "text-anchor": "middle" }, text)];
  });
  const middle = (box.top + box.bottom) / 2;
  return svg("g", { class: "axes" }, across, up,
    polyline([[box.left, box.top], [box.left, box.bottom], [box.right, box.bottom]], { class: "axis" }),
    svg("text", { class: "label", x: (box.left + box.right) / 2, y: height - 5, "text-anchor": "middle" }, spec.x.label),
    svg("text", { class: "label", x: TEXT, y: middle, transform: `rotate(-90 ${TEXT} ${middle})`, "text-anchor": "middle" }, spec.y.label));
}
