// The service's page: a picture or a clip, what /v1/annotate finds in it, and PaliGemma's answers about it.

import { html, layersOf, layerSample, Picture } from "../viewer/picture.js";
import { momentOf, Player, PLAYER_KEYS } from "../viewer/player.js";
import { answerText, copied, describeVideo, Details, filters, statistics, View } from "../viewer/viewer.js";

const CONF = 0.05; // what the server is asked for, so that the slider shows more without asking again
const KEPT = 12; // pictures and clips, the newest ones
const TRACKER = "botsort"; // the job's own
const VIDEOS = /\.(mp4|mov|m4v|mkv|webm|avi|m?ts|m2ts|mpe?g)$/i;

const $ = (id) => document.getElementById(id);
const view = new View();
view.least = 0.25;
const picture = new Picture(view);
const player = new Player(view, showFrame);
const details = { picture: new Details(view, picture), clip: new Details(view, player) };
const models = { yolo: false, paligemma: false, tracks: false };
// {file, url, row, seconds, problem, questions: [{prompt, answer, seconds, problem}]}; of a clip also `rows`, of all of
// its frames, and the options with which they were asked for; `row` is then the one that is shown.
const pictures = [];
let current = null;
let shownFilters = null;

// --- The server

/** options: [name, value] of each field besides the file. Throws Error, with the `rows` of a damaged clip. */
async function annotate(field, file, options) {
  const form = new FormData();
  form.append(field, file);
  for (const [name, value] of options) form.append(name, value);
  const started = performance.now();
  let response;
  try {
    response = await fetch("v1/annotate", { method: "POST", body: form, headers: authorization() });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 401) askForKey();
  const body = await response.json().catch(() => null);
  if (!response.ok || !body) {
    const error = new Error(sentence(body?.detail ?? `The server answered ${response.status}.`));
    throw Object.assign(error, { rows: body?.rows });
  }
  return { found: body, seconds: (performance.now() - started) / 1000 };
}

const authorization = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

function sentence(text) {
  return sentenceCase(text) + (/[.!?]$/.test(text) ? "" : ".");
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
  models.tracks = yolo.ok && (await yolo.json()).parameters?.task !== "classify";
  $("track-choice").hidden = !models.tracks;
  models.paligemma = chat.ok && (await chat.json()).data.length > 0;
  $("questions-box").hidden = !models.paligemma;
}

// --- Pictures

async function open(file) {
  const isClip = file.type.startsWith("video/") || VIDEOS.test(file.name);
  const entry = { file, url: URL.createObjectURL(file), questions: [], row: isClip ? { id: file.name } : await blank(file) };
  if (isClip) entry.rows = [];
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
  const asked = { waiting: true, problem: null, options: entry.rows ? clipOptions() : [["conf", CONF]] };
  Object.assign(entry, asked);
  select(current);
  try {
    const { found, seconds } = await annotate(entry.rows ? "video" : "image", entry.file, asked.options);
    if (entry.options !== asked.options) return; // it was asked for again, with others
    if (entry.rows) Object.assign(entry, { seconds, rows: found.rows, row: found.rows[0] });
    else Object.assign(entry, { seconds, row: { ...found, answers: entry.row.answers ?? found.answers } });
  } catch (error) {
    if (entry.options !== asked.options) return;
    const good = error.rows?.filter((row) => !row.error) ?? [];
    if (good.length) Object.assign(entry, { rows: good, row: good[0] });
    entry.problem = error.message;
  }
  entry.waiting = false;
  if (entry === current) select(entry);
}

/** As the page's controls say. With a tracker, the server's own least score is what the tracker wants. */
function clipOptions() {
  const fps = $("fps").value;
  return [...(fps ? [["fps", fps]] : []), models.tracks && $("track").checked ? ["track", TRACKER] : ["conf", CONF]];
}

/** A clip's frame is shown. */
function showFrame(row) {
  if (!current?.rows) return;
  current.row = row;
  showDetails();
  drawForms();
}

function showDetails() {
  const shown = details[current.rows ? "clip" : "picture"];
  shown.show(current.row, { answers: Boolean(current.rows) });
  $("details").replaceChildren(...(current.rows?.length ? [html("h3", {}, sentenceCase(momentOf(current.row)))] : []), shown.root);
}

const sentenceCase = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** Show one of the pictures, with all that is known of it. */
function select(entry) {
  if (current !== entry) player.stop();
  current = entry;
  const { row, rows } = entry;
  $("figure").hidden = !rows && !row.width;
  const shown = rows ? player.root : picture.root;
  if (!shown.isConnected) $("figure").replaceChildren(shown); // moving a video would pause it
  if (rows) player.show(rows, entry.url);
  else picture.show(row, entry.url);
  shownFilters?.stop();
  const layers = statistics(rows ?? [row]);
  shownFilters = filters(view, layers);
  $("filters").replaceChildren(shownFilters.root);
  showDetails();
  $("clip-box").hidden = !rows;
  $("all-box").hidden = !rows?.length;
  if (rows?.length) $("all").replaceChildren(copied(JSON.stringify(rows, null, 2)));
  $("filters-box").hidden = layers.length === 0;
  $("found-box").hidden = false;
  $("curl").replaceChildren(copied(curl(entry)));
  drawStatus();
  drawQuestions();
  drawForms();
  drawEarlier();
}

function drawStatus() {
  const { row, rows, problem, waiting, seconds, file } = current;
  const count = view.seen({ detections: row.detections }).length;
  const found = row.detections && `${count} ${count === 1 ? "object" : "objects"}`;
  const best = row.classes?.length && `most likely: ${row.classes[0].label}`;
  const size = row.width && `${row.width} × ${row.height} pixels`;
  const frames = rows?.length > 0 && describeVideo(view, rows);
  const parts = [file.name, size, frames || best || found, seconds != null && `${seconds.toFixed(2)} s`].filter(Boolean);
  $("status").textContent = problem ?? (waiting ? `${file.name}: looking … ` : parts.join(" · "));
  $("status").className = problem ? "wrong" : waiting ? "waiting" : "";
}

function drawEarlier() {
  $("earlier").hidden = pictures.length < 2;
  const thumbnail = ({ file: { name }, url, rows }) => (rows
    ? html("video", { src: url, "aria-label": name, title: name, preload: "metadata", tabindex: -1 })
    : html("img", { src: url, alt: name, title: name }));
  $("earlier").replaceChildren(html("span", { class: "quiet" }, "Earlier:"), ...pictures.map((entry) =>
    html("button", { type: "button", "aria-current": String(entry === current), onclick: () => select(entry) }, thumbnail(entry))));
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
    const before = entry.row;
    const file = entry.rows ? await frameOf(before) : entry.file;
    const { found, seconds } = await annotate("image", file, [["conf", CONF], ["prompt", asked.prompt]]);
    const [answer] = found.answers;
    Object.assign(asked, { answer, seconds, frame: entry.rows && before.frame_index });
    const answers = [...(before.answers ?? []).filter((other) => other.prompt !== answer.prompt), answer];
    const row = { ...(entry.rows ? before : found), answers };
    if (entry.rows) entry.rows = entry.rows.map((other) => (other === before ? row : other));
    entry.row = row;
  } catch (error) {
    asked.problem = error.message;
  }
  if (entry === current) select(entry);
}

/** The frame of the clip that is shown, as a picture of its own. */
async function frameOf(row) {
  if (!row.width || player.blind) throw new Error("There is no frame of this clip to ask about.");
  const canvas = new OffscreenCanvas(row.width, row.height);
  canvas.getContext("2d").drawImage(player.video, 0, 0, row.width, row.height);
  return new File([await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 })], `${row.id}.jpg`, { type: "image/jpeg" });
}

function drawQuestions() {
  $("questions").replaceChildren(...current.questions.map((asked) => {
    const { prompt, answer, seconds, problem, frame } = asked;
    const layer = answer && layersOf({ answers: [answer] })[0];
    const head = html("div", { class: "asked" }, layer && layerSample(view.number(layer.key)), html("span", {}, prompt),
      frame != null && html("span", { class: "count" }, `frame ${frame}`),
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
function curl({ file, questions, rows, options }) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const name = `"${file.name.replace(/["\\]/g, "\\$&")}"`;
  const prompts = new Set(questions.filter(({ answer }) => answer).map(({ prompt }) => prompt).reverse());
  return [
    "curl --fail-with-body",
    ...($("key").value ? ['--header "Authorization: Bearer $SHARDSIGHT_API_KEY"'] : []),
    `--form ${quoted(`${rows ? "video" : "image"}=@${name}`)}`,
    ...(options ?? [["conf", CONF]]).map(([name, value]) => `--form ${name}=${value}`),
    ...(rows ? [] : [...prompts]).map((prompt) => `--form-string ${quoted(`prompt=${prompt}`)}`),
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
  if (event.target.matches("input:not([type=checkbox], [type=range]), textarea, select")) return;
  if (!current?.rows || !player.key(event)) view.key(event);
});
view.addEventListener("change", () => {
  for (const shown of [picture, player]) shown.draw();
  for (const shown of Object.values(details)) shown.update();
  if (current) drawStatus();
});
for (const id of ["fps", "track"]) $(id).addEventListener("change", () => current?.rows && look(current));
$("ask").addEventListener("submit", ask);
$("clip-keys").textContent = PLAYER_KEYS;
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", async () => {
  sessionStorage.setItem("key", $("key").value);
  ready = findModels();
  if (current?.problem) look(current);
});
drawForms();
let ready = findModels();
