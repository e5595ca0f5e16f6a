// The service's page: a picture, what /v1/annotate finds in it, and PaliGemma's answers about it.

import { html, layersOf, layerSample, Picture } from "../viewer/picture.js";
import { answerText, copied, Details, filters, statistics, View } from "../viewer/viewer.js";

const CONF = 0.05; // what the server is asked for, so that the slider shows more without asking again
const KEPT = 12; // pictures, the newest ones

const $ = (id) => document.getElementById(id);
const view = new View();
view.least = 0.25;
const picture = new Picture(view);
const details = new Details(view, picture);
const models = { yolo: false, paligemma: false };
const pictures = []; // {file, url, row, seconds, problem, questions: [{prompt, answer, seconds, problem}]}
let current = null;
let shownFilters = null;

// --- The server

async function annotate(file, prompt) {
  const form = new FormData();
  form.append("image", file);
  form.append("conf", CONF);
  if (prompt) form.append("prompt", prompt);
  const started = performance.now();
  let response;
  try {
    response = await fetch("v1/annotate", { method: "POST", body: form, headers: authorization() });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 401) askForKey();
  const body = await response.json().catch(() => null);
  if (!response.ok || !body) throw new Error(sentence(body?.detail ?? `The server answered ${response.status}.`));
  return { row: body, seconds: (performance.now() - started) / 1000 };
}

const authorization = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function askForKey() {
  $("key-box").hidden = false;
  $("key").focus();
}

/** Which models the server has; without a valid key it does not say. */
async function findModels() {
  const ask = (path) => fetch(path, { headers: authorization() }).catch(() => ({ ok: false }));
  const [yolo, chat] = await Promise.all([ask("v2/models/yolo"), ask("v1/models")]);
  if (chat.status === 401) askForKey();
  models.yolo = yolo.ok;
  models.paligemma = chat.ok && (await chat.json()).data.length > 0;
  $("questions-box").hidden = !models.paligemma;
}

// --- Pictures

async function open(file) {
  const entry = { file, url: URL.createObjectURL(file), questions: [], row: await blank(file) };
  pictures.unshift(entry);
  for (const old of pictures.splice(KEPT)) URL.revokeObjectURL(old.url);
  select(entry);
  await look(entry);
}

/** What is known of a picture before the server has answered. */
async function blank(file) {
  const { width, height } = await createImageBitmap(file).catch(() => ({ width: null, height: null }));
  return { id: file.name, width, height };
}

async function look(entry) {
  await ready;
  if (!models.yolo) return;
  entry.waiting = true;
  entry.problem = null;
  select(current);
  try {
    const { row, seconds } = await annotate(entry.file);
    Object.assign(entry, { seconds, row: { ...row, answers: entry.row.answers ?? row.answers } });
  } catch (error) {
    entry.problem = error.message;
  }
  entry.waiting = false;
  if (entry === current) select(entry);
}

/** Show one of the pictures, with all that is known of it. */
function select(entry) {
  current = entry;
  const { row } = entry;
  $("figure").hidden = !row.width;
  picture.show(row, entry.url);
  shownFilters?.stop();
  const layers = statistics([row]);
  shownFilters = filters(view, layers);
  $("filters").replaceChildren(shownFilters.root);
  details.show(row, { answers: false });
  $("details").replaceChildren(details.root);
  $("filters-box").hidden = layers.length === 0;
  $("found-box").hidden = false;
  $("curl").replaceChildren(copied(curl(entry)));
  drawStatus();
  drawQuestions();
  drawForms();
  drawEarlier();
}

function drawStatus() {
  const { row, problem, waiting, seconds, file } = current;
  const count = view.seen({ detections: row.detections }).length;
  const found = row.detections && `${count} ${count === 1 ? "object" : "objects"}`;
  const best = row.classes?.length && `most likely: ${row.classes[0].label}`;
  const size = row.width && `${row.width} × ${row.height} pixels`;
  const parts = [file.name, size, best || found, seconds != null && `${seconds.toFixed(2)} s`].filter(Boolean);
  $("status").textContent = problem ?? (waiting ? `${file.name}: looking … ` : parts.join(" · "));
  $("status").className = problem ? "wrong" : waiting ? "waiting" : "";
}

function drawEarlier() {
  $("earlier").hidden = pictures.length < 2;
  $("earlier").replaceChildren(html("span", { class: "quiet" }, "Earlier:"), ...pictures.map((entry) =>
    html("button", { type: "button", "aria-current": String(entry === current), onclick: () => select(entry) },
      html("img", { src: entry.url, alt: entry.file.name, title: entry.file.name }))));
}

async function openSample(path) {
  const before = pictures.find(({ file }) => file.sample === path);
  if (before) return select(before);
  try {
    const blob = await (await fetch(path)).blob();
    const file = new File([blob], path.split("/").pop(), { type: blob.type });
    await open(Object.assign(file, { sample: path }));
  } catch {
    $("status").textContent = "The server cannot be reached.";
    $("status").className = "wrong";
  }
}

// --- Questions

async function ask(event) {
  event.preventDefault();
  if (!current) {
    $("status").textContent = "Choose a picture first.";
    $("status").className = "wrong";
    return;
  }
  const entry = current;
  const asked = { prompt: $("prompt").value.trim() };
  entry.questions.unshift(asked);
  drawQuestions();
  try {
    const { row, seconds } = await annotate(entry.file, asked.prompt);
    const [answer] = row.answers;
    Object.assign(asked, { answer, seconds });
    const others = (entry.row.answers ?? []).filter((other) => other.prompt !== answer.prompt);
    entry.row = { ...row, answers: [...others, answer] };
  } catch (error) {
    asked.problem = error.message;
  }
  if (entry === current) select(entry);
}

function drawQuestions() {
  $("questions").replaceChildren(...current.questions.map((asked) => {
    const { prompt, answer, seconds, problem } = asked;
    const layer = answer && layersOf({ answers: [answer] })[0];
    const head = html("div", { class: "asked" }, layer && layerSample(view.number(layer.key)), html("span", {}, prompt),
      seconds != null && html("span", { class: "count" }, `${seconds.toFixed(2)} s`));
    const body = problem ? html("p", { class: "error" }, problem) : answer ? answerText(answer) : html("span", { class: "waiting" });
    return html("li", {}, head, body);
  }));
}

/** PaliGemma's forms, filled in with what was found in the picture. */
function drawForms() {
  const labels = [...new Set((current?.row.detections ?? []).map((one) => one.label))];
  const several = labels.slice(0, 3).join(" ; ") || "person ; car";
  const forms = ["caption en", "ocr", "answer en what is in the picture?", `detect ${several}`, `segment ${labels[0] ?? "person"}`];
  $("forms").replaceChildren(...forms.map((form) =>
    html("button", { type: "button", onclick: () => (($("prompt").value = form), $("prompt").focus()) }, form)));
}

// --- The same from a shell

/** The command that gives the row as it stands here. */
function curl({ file, questions }) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const name = `"${file.name.replace(/["\\]/g, "\\$&")}"`;
  const prompts = new Set(questions.filter(({ answer }) => answer).map(({ prompt }) => prompt).reverse());
  return [
    "curl --fail-with-body",
    ...($("key").value ? ['--header "Authorization: Bearer $SHARDSIGHT_API_KEY"'] : []),
    `--form ${quoted(`image=@${name}`)}`,
    `--form conf=${CONF}`,
    ...[...prompts].map((prompt) => `--form-string ${quoted(`prompt=${prompt}`)}`),
    quoted(new URL("v1/annotate", document.baseURI).href),
  ].join(" \\\n  ");
}

// --- What people do

$("file").addEventListener("change", () => {
  if ($("file").files[0]) open($("file").files[0]);
  $("file").value = ""; // so that the same picture can be chosen again
});
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => openSample(button.dataset.sample));
}
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => event.clipboardData.files[0] && open(event.clipboardData.files[0]));
document.addEventListener("keydown", (event) => {
  if (!event.target.matches("input:not([type=checkbox], [type=range]), textarea")) view.key(event);
});
view.addEventListener("change", () => {
  picture.draw();
  details.update();
  if (current) drawStatus();
});
$("ask").addEventListener("submit", ask);
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", async () => {
  sessionStorage.setItem("key", $("key").value);
  ready = findModels();
  if (current?.problem) look(current);
});
$("figure").append(picture.root);
drawForms();
let ready = findModels();
