// The page of a job, or of any set of rows: numbers, errors by kind, filters with histograms, pictures.

import { html } from "./picture.js";
import { filters, Gallery, statistics, View } from "./viewer.js";

/** data: {title, subtitle, numbers: [{name, value, good}], layers, errors: [{stage, type, count, examples}], items}. */
export function report(data) {
  const view = new View();
  const layers = data.layers ?? statistics(data.items.flatMap((item) => item.rows.map(({ row }) => row)));
  const gallery = new Gallery(view, data.items);
  const only = (event) => {
    gallery.onlySeen = event.target.checked;
    gallery.update();
  };
  const side = html("details", { class: "sidebar", open: innerWidth > 800 }, html("summary", {}, "Filters and histograms"),
    filters(view, layers).root,
    html("label", { class: "choice" }, html("input", { type: "checkbox", onchange: only }), "Only pictures with something shown"));
  const note = data.items.length && html("p", { class: "quiet" }, data.note ?? "");
  document.body.replaceChildren(
    html("header", { class: "top" }, html("h1", {}, data.title), html("p", { class: "quiet" }, data.subtitle)),
    html("dl", { class: "numbers" }, data.numbers.map(number)),
    html("main", { class: "report" }, side, html("div", {}, data.errors.length ? errors(data.errors) : [],
      html("h2", {}, data.items.some(({ rows }) => rows[0].frames) ? "Pictures and videos" : "Pictures"), note, gallery.root)),
  );
  document.addEventListener("keydown", (event) => {
    if (!event.target.matches("input:not([type=checkbox], [type=range]), textarea")) view.key(event);
  });
}

function number({ name, value, good }) {
  const kind = good == null ? "" : good ? "good" : "bad";
  return html("div", {}, html("dt", {}, name), html("dd", { class: kind }, value));
}

function errors(kinds) {
  return html("section", { class: "errors" }, html("h2", {}, "Errors"), html("div", { class: "kinds" }, kinds.map(({ stage, type, count, examples }) =>
    html("details", {}, html("summary", {}, html("strong", {}, `${stage}: ${type}`), html("span", { class: "count" }, String(count))),
      html("ul", {}, examples.map(({ id, message }) => html("li", {}, html("code", {}, id), html("span", {}, message))),
        count > examples.length && html("li", { class: "quiet" }, `and ${count - examples.length} more`))))));
}
