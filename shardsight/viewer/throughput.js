// The report of a search for throughput: the choice, accuracy against speed, and every configuration.

import { html, svg } from "./picture.js";
import { axes, figure, polyline, scaleOf, textWidth } from "./charts.js";
import { chapter, facts, number, table } from "./sweep.js";

/** data: as tune/throughput/report.py makes it. */
export function throughput(data) {
  document.body.replaceChildren(
    html("header", { class: "top" }, html("h1", {}, data.title), html("p", { class: "quiet" }, data.subtitle)),
    html("dl", { class: "numbers" }, data.numbers.map(number)),
    html("main", { class: "evaluation sweep" },
      html("section", { class: "verdict" }, html("p", { class: "sentence" }, data.sentence), html("ul", {}, data.reasons.map((reason) => html("li", {}, reason)))),
      html("section", { class: "charts one" }, frontFigure(data.front)),
      chapter("Configurations", "trials", table(data.table)),
      chapter("How", "how", facts(data.facts))),
  );
}

function frontFigure({ points, x, y, note }) {
  const shown = figure({ title: "Pareto front", note, choices: [{ name: "all", points }], x: { label: x }, y: { label: y }, least: 320, draw: drawFront });
  shown.querySelector(".area").classList.add("wide");
  return shown;
}

function drawFront(spec, { points }, width) {
  const height = Math.round(Math.max(280, Math.min(480, width * 0.5)));
  const x = scaleOf({}, points.map((point) => point.x));
  const y = scaleOf({}, points.map((point) => point.y));
  const left = 28 + Math.max(...y.ticks.map(({ text }) => textWidth(text)));
  const box = { left, right: width - 14, top: 20, bottom: height - 44 };
  const at = (h, v) => [box.left + (box.right - box.left) * x.place(h), box.bottom - (box.bottom - box.top) * y.place(v)];
  const front = points.filter((point) => point.front).sort((a, b) => a.x - b.x);
  const steps = front.flatMap((point, n) => (n ? [at(front[n - 1].x, point.y), at(point.x, point.y)] : [at(point.x, point.y)]));
  const dots = [...points].sort((a, b) => a.best - b.best).map((point) => {
    const [cx, cy] = at(point.x, point.y);
    const said = `${point.name}: ${point.y.toFixed(1)} at ${point.x.toFixed(1)} pictures per second`;
    return svg("g", {},
      point.usual && svg("circle", { cx, cy, r: 11, class: "ring" }),
      svg("circle", { cx, cy, r: point.best ? 7 : 4.5, class: point.best ? "trial end top" : "trial end" }, svg("title", {}, said)));
  });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `accuracy and speed of ${points.length} configurations` },
    axes(spec, x, y, box, width, height), polyline(steps, { class: "front" }), dots, namesOf(points, at, box));
}

/** Names of the points of the front, the choice and the defaults, where they have room. */
function namesOf(points, at, box) {
  const taken = points.map((point) => {
    const [h, v] = at(point.x, point.y);
    return { x: h - 6, y: v - 6, width: 12, height: 12 };
  });
  const named = points.filter((point) => point.best || point.usual || point.front).sort((a, b) => b.best - a.best || b.usual - a.usual);
  return named.map(({ name, x, y }) => {
    const [h, v] = at(x, y);
    const width = textWidth(name);
    const place = [[h + 14, v - 8], [h - 14 - width, v - 8], [h - width / 2, v - 28], [h - width / 2, v + 12]]
      .map(([left, top]) => ({ x: left, y: top, width, height: 16 }))
      .find((one) => one.x >= box.left && one.x + width <= box.right && one.y >= 0 && one.y + 16 <= box.bottom &&
        !taken.some((other) => one.x < other.x + other.width && other.x < one.x + one.width && one.y < other.y + other.height && other.y < one.y + one.height));
    if (!place) return [];
    taken.push(place);
    return svg("text", { class: "name", x: place.x, y: place.y + 12 }, name);
  });
}
