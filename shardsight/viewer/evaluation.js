// The report of an evaluation: which model to take, the table, charts, and the pictures behind the figures.

import { circled, html } from "./picture.js";
import { copied, filters, Gallery, statistics, View } from "./viewer.js";
import { figure, modelSample } from "./charts.js";

/** data: as viewer/evaluation.py makes it. */
export function evaluation(data) {
  const view = new View();
  view.least = data.least;
  const parts = [
    verdict(data.verdict),
    chapter("Models", "models", models(data)),
    data.figures.length && html("section", { class: "charts" }, data.figures.map(figure)),
    data.confusions.length && chapter("Which class is taken for which", "confusion", confusion(data.confusions)),
    data.classes && chapter("Classes", "classes-table", table(data.classes)),
    data.answers.length && chapter("Answers", "asked", answers(data.answers)),
    ...galleries(view, data),
    data.faults.length && chapter("The labelled set", "faults", list(data.faults)),
    data.published && chapter("Published figures beside ours", "published", html("p", { class: "quiet" }, data.published.note), table(data.published)),
    chapter("How this was measured", "how", facts(data.facts), html("p", {}, "The command that repeats it:"), copied(data.command)),
  ];
  document.body.replaceChildren(
    html("header", { class: "top" }, html("h1", {}, data.title), html("p", { class: "quiet" }, data.subtitle)),
    html("main", { class: "evaluation" }, parts.filter(Boolean)));
  document.addEventListener("keydown", (event) => {
    if (!event.target.matches("input:not([type=checkbox], [type=range]), textarea, select")) view.key(event);
  });
}

const chapter = (title, name, ...content) => html("section", { class: name }, html("h2", {}, title), ...content);

function verdict({ sentence, reasons }) {
  return html("section", { class: "verdict" }, html("h2", {}, "Recommendation"), html("p", { class: "sentence" }, sentence),
    html("ul", {}, reasons.map((reason) => html("li", {}, reason))));
}

// --- Tables

/** columns: [{group, name, title}]; rows: [{model, name, note, cells: [{text, small, best, title}]}]. */
function models({ columns, rows, note }) {
  const groups = [];
  for (const { group } of columns) {
    if (groups.at(-1)?.group === group) groups.at(-1).span += 1;
    else groups.push({ group, span: 1 });
  }
  const starts = new Set(columns.map(({ group }, n) => (group !== columns[n - 1]?.group ? n : -1)));
  const edge = (n) => (starts.has(n) ? "start" : null);
  const head = [
    html("tr", {}, html("td", {}), groups.map(({ group, span }) => html("th", { scope: "colgroup", colspan: span, class: "start" }, group))),
    html("tr", {}, html("th", { scope: "col" }, "model"), columns.map(({ name, title }, n) => html("th", { scope: "col", title, class: edge(n) }, name))),
  ];
  const body = rows.map(({ model, name, note: said, cells }) => html("tr", {},
    html("th", { scope: "row" }, modelSample(model, { line: false }), html("span", { class: "name" }, name), said && html("span", { class: "quiet" }, said)),
    cells.map((cell, n) => html("td", { class: [edge(n), cell.best && "best"].filter(Boolean).join(" ") || null, title: cell.title }, value(cell)))));
  return [html("div", { class: "wide" }, html("table", { class: "figures" }, html("thead", {}, head), html("tbody", {}, body))),
    html("p", { class: "quiet" }, note)];
}

const value = ({ text, small, best }) => [
  html("span", { class: "value" }, best && html("span", { "aria-hidden": "true" }, "★ "), text, best && html("span", { class: "unseen" }, " (best)")),
  small && html("span", { class: "range" }, small),
];

/** columns: names; rows: [{name, cells: [{text, small, best}]}]. */
function table({ columns, rows }) {
  return html("div", { class: "wide" }, html("table", { class: "figures" },
    html("thead", {}, html("tr", {}, columns.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, rows.map(({ name, cells }) => html("tr", {}, html("th", { scope: "row" }, name),
      cells.map((cell) => html("td", { class: cell.best ? "best" : null }, value(cell))))))));
}

/** One model's matrix at a time: {model, name, labels, counts, note}. A row is a true class. */
function confusion(matrices) {
  const area = html("div", { class: "wide" });
  const note = html("p", { class: "quiet" });
  const draw = ({ labels, others, counts, note: said }) => {
    const names = [...labels, others];
    const cell = (count, row, most, right) => html("td", {
      style: `--share:${Math.round((100 * count) / most)}%`, class: right ? "right" : null,
      title: `${names[row.at]} taken for ${names[row.to]}: ${count}`,
    }, count ? count.toLocaleString("en") : "");
    const rows = counts.map((row, at) => {
      const most = Math.max(1, row.reduce((sum, count) => sum + count, 0));
      const name = at < labels.length ? labels[at] : "(nothing there)";
      return html("tr", {}, html("th", { scope: "row" }, name), row.map((count, to) => cell(count, { at, to }, most, at === to && at < labels.length)));
    });
    const heads = [...labels, others].map((name) => html("th", { scope: "col" }, html("span", {}, name)));
    area.replaceChildren(html("table", { class: "matrix" },
      html("thead", {}, html("tr", {}, html("td", {}, "true ↓ found →"), heads)), html("tbody", {}, rows)));
    note.textContent = said;
  };
  const onchange = (event) => draw(matrices[event.target.value]);
  const select = matrices.length > 1 && html("label", {}, "of ", html("select", { "aria-label": "Model", onchange },
    matrices.map(({ model, name }, index) => html("option", { value: index }, `${circled(model)} ${name}`))));
  draw(matrices[0]);
  return [select, area, note].filter(Boolean);
}

/** [{name, text, examples}] */
function list(entries) {
  return html("dl", { class: "entries" }, entries.map(({ name, text, examples }) => [html("dt", {}, name), html("dd", {}, text,
    examples?.length ? html("details", {}, html("summary", {}, "which"), html("ul", {}, examples.map((one) => html("li", {}, html("code", {}, one))))) : [])]));
}

const facts = (entries) => html("dl", { class: "facts" }, entries.map(({ name, text }) => [html("dt", {}, name), html("dd", {}, text)]));

// --- Pictures

/** Questions with the right answers and each model's: [{title, note, items: [{picture, question, truth, said: [{model, name, text, right}]}]}] */
function answers(groups) {
  return groups.map(({ title, note, items }) => [html("h3", {}, title), note && html("p", { class: "quiet" }, note),
    html("div", { class: "grid" }, items.map(({ picture, problem, id, question, truth, said }) => html("article", { class: "card question" },
      picture ? html("img", { src: picture, alt: id, loading: "lazy" }) : html("p", { class: "problem" }, problem),
      html("p", { class: "title" }, question),
      html("dl", {}, html("dt", {}, "right"), html("dd", {}, truth),
        said.map(({ model, name, text, right }) => [html("dt", {}, `${circled(model)} ${name}`),
          html("dd", { class: right == null ? null : right ? "good" : "bad" }, right == null ? "" : right ? "✓ " : "✗ ", text)])))))]);
}

function galleries(view, { galleries: all, least }) {
  if (!all.length) return [];
  const rows = all.flatMap(({ items }) => items.flatMap((item) => item.rows.map(({ row }) => row)));
  const side = html("details", { class: "sidebar", open: innerWidth > 800 }, html("summary", {}, "Filters"), filters(view, statistics(rows)).root);
  const parts = all.map(({ title, note, items }) => html("div", {}, html("h3", {}, title), html("p", { class: "quiet" }, note), new Gallery(view, items).root));
  return [chapter("Pictures", "pictures", html("p", { class: "quiet" }, `Drawn from a score of ${least.toFixed(2)}, as the slider says.`),
    html("div", { class: "report" }, side, html("div", { class: "galleries" }, parts)))];
}
