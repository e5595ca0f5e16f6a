// Shows a picture with what /v1/annotate finds in it, and streams PaliGemma's answers about it.

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const colour = (id) => `hsl(${(id * 137.5) % 360} 90% 60%)`; // neighbouring ids far apart on the wheel
let picture = null; // the File
let row = null; // what was found in it
let hidden = new Set(); // labels not to show
let work = null; // aborts what is under way

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function reason(response) {
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401) $("key-box").open = true;
  return problem.detail ?? `The server answered ${response.status}.`;
}

async function show(file) {
  work?.abort();
  work = new AbortController();
  picture = file;
  row = null;
  $("answer").textContent = "";
  draw();
  $("figure").hidden = true;
  say("Looking …");
  const form = new FormData();
  form.append("image", file);
  form.append("conf", "0.05"); // what the slider may show without asking again
  try {
    const response = await fetch("/v1/annotate", { method: "POST", body: form, headers: headers(), signal: work.signal });
    if (!response.ok) return say(await reason(response), true);
    row = await response.json();
  } catch (error) {
    if (error.name !== "AbortError") say("The server cannot be reached.", true);
    return;
  }
  URL.revokeObjectURL($("image").href.baseVal);
  $("image").setAttribute("href", URL.createObjectURL(file));
  for (const [name, value] of Object.entries({ width: row.width, height: row.height })) $("image").setAttribute(name, value);
  $("canvas").setAttribute("viewBox", `0 0 ${row.width} ${row.height}`);
  $("figure").hidden = false;
  $("size").textContent = `${file.name}, ${row.width} × ${row.height} pixels`;
  hidden = new Set();
  draw();
}

function shown() {
  const least = Number($("score").value);
  return (row?.detections ?? []).filter((one) => one.score >= least && !hidden.has(one.label));
}

function draw() {
  $("least").textContent = Number($("score").value).toFixed(2);
  const found = shown();
  $("marks").replaceChildren(...found.flatMap(mark));
  const list = found.length ? found : (row?.classes ?? []);
  $("found").replaceChildren(...list.map(item));
  if (!row) return;
  drawLabels();
  const count = found.length;
  say(row.classes ? `Most likely: ${row.classes[0]?.label ?? "nothing"}` : `${count} ${count === 1 ? "object" : "objects"}`);
  $("canvas-title").textContent = `The picture, with ${count} marked: ${found.map((one) => one.label).join(", ")}`;
}

function drawLabels() {
  const names = [...new Map((row.detections ?? []).map((one) => [one.label, one.class_id]))];
  $("labels").replaceChildren(
    ...names.map(([name, id]) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !hidden.has(name) });
      box.addEventListener("change", () => {
        box.checked ? hidden.delete(name) : hidden.add(name);
        draw();
        [...$("labels").querySelectorAll("input")].find((other) => other.parentNode.textContent === name)?.focus();
      });
      label.append(box, swatch(id), document.createTextNode(name));
      return label;
    }),
  );
}

function swatch(id) {
  const made = document.createElement("span");
  made.className = "swatch";
  made.style.background = colour(id ?? 0);
  return made;
}

function item(one) {
  const made = document.createElement("li");
  const name = document.createElement("span");
  const score = document.createElement("span");
  name.textContent = one.text ? `${one.label}: ${one.text}` : one.label;
  score.textContent = one.score.toFixed(2);
  made.append(swatch(one.class_id), name, score);
  return made;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function mark(one) {
  const stroke = colour(one.class_id ?? 0);
  const size = (13 * row.width) / ($("canvas").clientWidth || row.width); // 13 pixels of the screen
  const marks = [];
  if (one.mask) marks.push(element("path", { class: "mask", d: outline(one.mask), fill: stroke }));
  if (one.corners) {
    marks.push(element("polygon", { class: "mark", points: one.corners.join(" "), stroke }));
  } else {
    const place = { x: one.x1, y: one.y1, width: one.x2 - one.x1, height: one.y2 - one.y1 };
    marks.push(element("rect", { class: "mark", ...place, stroke }));
  }
  for (const point of one.keypoints ?? []) {
    if ((point.score ?? 1) >= 0.5) marks.push(element("circle", { cx: point.x, cy: point.y, r: size / 4, fill: stroke }));
  }
  const name = element("text", { class: "name", x: one.x1, y: Math.max(size, one.y1 - size / 4), "font-size": size });
  name.textContent = `${one.label} ${one.score.toFixed(2)}`;
  return [...marks, name];
}

// COCO's compressed RLE, of columns from the top: each count but the first two is relative to the one two before it.
function runs(text) {
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

// The mask as a path of one-pixel columns, each run a rectangle.
function outline({ height, counts }) {
  let at = 0;
  const parts = [];
  for (const [number, count] of runs(counts).entries()) {
    for (let left = count; left > 0; ) {
      const x = Math.floor(at / height);
      const y = at % height;
      const length = Math.min(left, height - y);
      if (number % 2) parts.push(`M${x} ${y}h1v${length}h-1z`);
      at += length;
      left -= length;
    }
  }
  return parts.join("");
}

const dataUri = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

async function ask(event) {
  event.preventDefault();
  if (!picture) return ($("answer").textContent = "Choose a picture first.");
  const button = $("ask").querySelector("button");
  button.disabled = true;
  $("answer").textContent = "…";
  try {
    const url = await dataUri(picture);
    const content = [{ type: "text", text: $("prompt").value }, { type: "image_url", image_url: { url } }];
    const body = JSON.stringify({ model: $("speaker").dataset.model, stream: true, messages: [{ role: "user", content }] });
    const sent = { "Content-Type": "application/json", ...headers() };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: sent, body });
    if (!response.ok) return ($("answer").textContent = await reason(response));
    $("answer").textContent = "";
    let rest = "";
    for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
      const events = (rest + part).split("\n\n");
      rest = events.pop();
      for (const each of events) {
        const data = each.slice("data: ".length);
        if (data !== "[DONE]") $("answer").textContent += JSON.parse(data).choices[0]?.delta.content ?? "";
      }
    }
    if (!$("answer").textContent) $("answer").textContent = "(nothing)";
  } catch {
    $("answer").textContent = "The server cannot be reached.";
  } finally {
    button.disabled = false;
  }
}

async function findSpeakers() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) $("key-box").open = true;
  const name = response.ok ? (await response.json()).data[0]?.id : null;
  $("speaker").hidden = !name;
  $("speaker").dataset.model = name ?? "";
}

$("file").addEventListener("change", () => $("file").files[0] && show($("file").files[0]));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) show(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => event.clipboardData.files[0] && show(event.clipboardData.files[0]));
$("score").addEventListener("input", draw);
window.addEventListener("resize", draw);
$("ask").addEventListener("submit", ask);
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  findSpeakers();
});
findSpeakers();
