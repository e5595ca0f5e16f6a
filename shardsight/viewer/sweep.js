// The report of a sweep: its best trial, learning curves, parallel coordinates, importance, and every trial.

import { html, svg } from "./picture.js";
import { axes, figure, polyline, scaleOf, textWidth } from "./charts.js";

/** data: as tune/report.py makes it. */
export function sweep(data) {
  document.body.replaceChildren(
    html("header", { class: "top" }, html("h1", {}, data.title), html("p", { class: "quiet" }, data.subtitle)),
    html("dl", { class: "numbers" }, data.numbers.map(number)),
    html("main", { class: "evaluation sweep" },
      data.best && chapter("The best", "best-trial", html("h3", {}, data.best.title),
        html("div", { class: "two" }, facts(data.best.config), facts(data.best.figures))),
      html("section", { class: "charts" }, curves(data.curves), bars(data.importance)),
      data.parallel.axes.length && data.parallel.lines.length && html("section", { class: "charts one" }, parallel(data.parallel)),
      chapter("Trials", "trials", table(data.table)),
      chapter("How", "how", facts(data.facts))),
  );
}

export const number = ({ name, value, good }) => html("div", {}, html("dt", {}, name),
  html("dd", { class: good == null ? "" : good ? "good" : "bad" }, value));

export const chapter = (title, name, ...content) => html("section", { class: name }, html("h2", {}, title), ...content);

export const facts = (pairs) => html("dl", { class: "facts" }, pairs.map(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]));

// --- Learning curves

function curves(choices) {
  const note = "A line is a trial, its end where it was stopped; the best is drawn thick, and a failed one dashed.";
  return figure({ title: "Learning curves", note, choices, x: { label: "epoch" }, y: { label: "" }, draw: curvesOf });
}

function curvesOf(spec, { name, lines }, width) {
  const height = Math.round(Math.max(240, Math.min(400, width * 0.62)));
  const points = lines.flatMap((line) => line.points).filter(([, value]) => Number.isFinite(value));
  if (!points.length) return html("p", { class: "quiet" }, "No epoch has ended.");
  const x = scaleOf({}, points.map(([epoch]) => epoch));
  x.ticks = x.ticks.filter(({ value }) => Number.isInteger(value));
  const y = scaleOf({}, points.map(([, value]) => value));
  const left = 28 + Math.max(...y.ticks.map(({ text }) => textWidth(text)));
  const box = { left, right: width - 14, top: 10, bottom: height - 44 };
  const at = ([h, v]) => [box.left + (box.right - box.left) * x.place(h), box.bottom - (box.bottom - box.top) * y.place(v)];
  const drawn = [...lines].sort((a, b) => a.best - b.best).map((line) => {
    const places = line.points.filter(([, value]) => Number.isFinite(value)).map(at);
    const kind = line.best ? "trial top" : line.status === "failed" ? "trial lost" : "trial";
    const title = svg("title", {}, `trial ${line.number}, ${line.status}`);
    const end = places.length ? svg("circle", { cx: places.at(-1)[0], cy: places.at(-1)[1], r: line.best ? 4 : 2.5, class: `${kind} end` }) : [];
    return svg("g", {}, polyline(places, { class: kind }, title), end);
  });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${name} of ${lines.length} trials by epoch` },
    axes({ ...spec, y: { label: name } }, x, y, box, width, height), drawn);
}

// --- Importance

function bars({ bars: found, note }) {
  const most = Math.max(...found.map(({ value }) => value), 1e-9);
  return html("figure", { class: "chart" }, html("figcaption", {}, html("h3", {}, "Importance of hyperparameters")),
    html("ul", { class: "importance" }, found.map(({ name, value }) => html("li", {}, html("span", {}, name),
      html("span", { class: "track" }, html("span", { class: "fill", style: `width:${(100 * value) / most}%` })),
      html("span", { class: "count" }, `${Math.round(100 * value)} %`)))),
    html("p", { class: "quiet" }, note));
}

// --- Parallel coordinates: an axis for each hyperparameter, and the fitness last

const AXIS = 96; // pixels between axes, at least

function parallel({ axes: given, lines, note }) {
  const all = [...given, { name: "fitness" }];
  const least = AXIS * all.length;
  const shown = figure({ title: "Parallel coordinates", note, choices: [{ name: "all" }], least, draw: (spec, choice, width) =>
    parallelOf(all, lines.map((line) => ({ ...line, values: [...line.values, line.fitness] })), Math.max(width, least)) });
  shown.querySelector(".area").classList.add("wide");
  return shown;
}

function parallelOf(given, lines, width) {
  const height = 320;
  const box = { top: 40, bottom: height - 20, left: AXIS / 2, right: width - AXIS / 2 };
  const scales = given.map((axis, n) => scaleFor(axis, lines.map(({ values }) => values[n])));
  const x = (n) => box.left + ((box.right - box.left) * n) / (given.length - 1);
  const y = (place) => box.bottom - (box.bottom - box.top) * place;
  const low = Math.min(...lines.map(({ fitness }) => fitness));
  const span = Math.max(...lines.map(({ fitness }) => fitness)) - low || 1;
  const drawn = [...lines].sort((a, b) => a.fitness - b.fitness).map((line) => {
    const share = Math.round(15 + (85 * (line.fitness - low)) / span);
    const places = line.values.map((value, n) => [x(n), y(scales[n].place(value))]);
    return polyline(places, { class: line.best ? "trial top" : "trial", style: line.best ? null : `stroke:color-mix(in srgb, var(--accent) ${share}%, var(--line))` },
      svg("title", {}, `trial ${line.number}, fitness ${line.fitness.toFixed(4)}`));
  });
  const axesDrawn = given.map(({ name }, n) => svg("g", { class: "axes" },
    polyline([[x(n), box.top], [x(n), box.bottom]], { class: "axis" }),
    svg("text", { class: "label", x: x(n), y: 16, "text-anchor": "middle" }, name),
    scales[n].ticks.map(({ place, text }) => svg("text", { class: "tick over", x: x(n) + 5, y: y(place) + 4 }, text))));
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `hyperparameters and fitness of ${lines.length} trials` },
    drawn, axesDrawn);
}

function scaleFor({ log, labels }, values) {
  if (labels) {
    const place = (value) => (labels.length > 1 ? labels.indexOf(value) / (labels.length - 1) : 0.5);
    return { place, ticks: labels.map((text) => ({ text, place: place(text) })) };
  }
  const change = log ? Math.log10 : (value) => value;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const span = change(high) - change(low);
  const place = (value) => (span ? (change(value) - change(low)) / span : 0.5);
  const short = (value) => Number(value.toPrecision(3)).toString();
  const middle = log ? Math.sqrt(low * high) : (low + high) / 2;
  return { place, ticks: span ? [low, middle, high].map((value) => ({ text: short(value), place: place(value) })) : [{ text: short(low), place: 0.5 }] };
}

// --- Every trial

export function table({ columns, rows }) {
  const row = ({ best, error, status, cells }) => [
    html("tr", {}, html("th", { scope: "row" }, best ? `★ ${cells[0]}` : cells[0]),
      cells.slice(1).map((cell, n) => html("td", { class: [n === 0 && `is-${status}`, best && "best"].filter(Boolean).join(" ") || null }, cell))),
    error && html("tr", { class: "why" }, html("td", { colspan: cells.length }, error)),
  ];
  return html("div", { class: "wide" }, html("table", { class: "figures" },
    html("thead", {}, html("tr", {}, columns.map((name) => html("th", { scope: "col" }, name)))), html("tbody", {}, rows.map(row))));
}
