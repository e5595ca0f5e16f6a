// A video with what models found in its frames, drawn over it as it plays. Its rows are those of the frames, in order.

import { html, Picture } from "./picture.js";

export const PLAYER_KEYS = "Space plays · , . frame by frame";

export const momentOf = (row) => `frame ${row.frame_index} at ${row.pts_seconds.toFixed(2)} s`;

/** onframe: called with the row that is shown, unless the video plays. */
export class Player {
  rows = [];
  times = []; // of each row, seconds from the first
  index = -1; // of the row that is shown
  blind = false; // there is no video that the browser plays

  constructor(view, onframe = () => {}) {
    this.onframe = onframe;
    this.picture = new Picture(view);
    this.video = html("video", { playsinline: true, loop: true, preload: "auto" });
    this.video.muted = true;
    const button = (text, label, onclick) => html("button", { type: "button", "aria-label": label, title: label, onclick }, text);
    this.toggle = button("▶", "Play", () => this.play());
    const back = button("‹", "Previous frame", () => this.step(-1));
    const forth = button("›", "Next frame", () => this.step(1));
    const oninput = (event) => this.seek(Number(event.target.value));
    this.slider = html("input", { type: "range", min: 0, step: 1, "aria-label": "Frame", oninput });
    this.place = html("output", { class: "count" });
    this.note = html("p", { class: "quiet", hidden: true }, "This browser cannot play the video: its frames are shown without pictures.");
    const screen = { class: "screen", tabindex: 0, role: "group", "aria-label": "Video", onclick: () => this.play() };
    this.screen = html("div", screen, this.video, this.picture.root);
    this.controls = html("div", { class: "controls" }, this.toggle, back, forth, this.slider, this.place);
    this.root = html("div", { class: "player" }, this.screen, this.controls, this.note);
    this.listen();
  }

  listen() {
    for (const kind of ["play", "pause"]) this.video.addEventListener(kind, () => this.drawToggle());
    this.video.addEventListener("error", () => this.video.getAttribute("src") && this.beBlind(true));
    this.video.addEventListener("loadedmetadata", () => {
      if (!this.rows.length) this.screen.style.setProperty("--aspect", `${this.video.videoWidth} / ${this.video.videoHeight}`);
    });
    this.video.addEventListener("seeked", () => this.drawAt(this.video.currentTime));
    // The time of the very frame on the screen; currentTime runs ahead of it.
    const shown = (_, { mediaTime }) => {
      this.drawAt(mediaTime);
      this.video.requestVideoFrameCallback(shown);
    };
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(shown);
    else this.video.addEventListener("timeupdate", () => this.drawAt(this.video.currentTime));
  }

  /** rows: may come later than the video does. */
  show(rows, src) {
    Object.assign(this, { rows, times: rows.map((row) => row.pts_seconds - rows[0].pts_seconds), index: -1 });
    if (src !== this.src) {
      this.src = src;
      this.beBlind(!src);
      if (src) this.video.src = src;
      else this.video.removeAttribute("src");
    }
    this.slider.max = Math.max(0, rows.length - 1);
    this.controls.hidden = !rows.length && this.blind;
    this.picture.root.toggleAttribute("hidden", !rows.length);
    if (rows.length) this.screen.style.setProperty("--aspect", `${rows[0].width} / ${rows[0].height}`);
    this.drawAt(this.blind ? 0 : this.video.currentTime);
  }

  beBlind(blind) {
    Object.assign(this, { blind });
    this.note.hidden = !blind || !this.src;
    this.toggle.disabled = blind;
  }

  stop() {
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load(); // else its memory stays
    this.src = null;
  }

  play() {
    if (this.blind) return;
    if (this.video.paused) this.video.play();
    else this.video.pause();
  }

  step(by) {
    this.video.pause();
    this.seek(this.index + by);
  }

  seek(index) {
    if (!this.rows[index]) return;
    if (this.blind) this.drawAt(this.times[index]);
    else this.video.currentTime = this.times[index] + 0.001; // at a frame's very start, rounding may show the one before
  }

  /** The row nearest to a time. */
  nearest(time) {
    let [low, high] = [0, this.times.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.times[middle] < time) low = middle + 1;
      else high = middle;
    }
    return low > 0 && time - this.times[low - 1] <= this.times[low] - time ? low - 1 : low;
  }

  drawAt(time) {
    if (!this.rows.length) return;
    const index = this.nearest(time);
    const row = this.rows[index];
    if (index !== this.index) this.picture.show(row, null);
    this.index = index;
    this.slider.value = index;
    this.place.textContent = `${momentOf(row)} · ${index + 1} of ${this.rows.length}`;
    if (this.video.paused) this.report();
  }

  /** Tell of the row that is shown, once. */
  report() {
    const row = this.rows[this.index];
    if (row && row !== this.reported) this.onframe(row);
    this.reported = row;
  }

  drawToggle() {
    const { paused } = this.video;
    this.toggle.textContent = paused ? "▶" : "❚❚";
    for (const name of ["aria-label", "title"]) this.toggle.setAttribute(name, paused ? "Play" : "Pause");
    if (!paused) return;
    this.seek(this.index); // between two rows, to the frame of the nearest
    this.report();
  }

  draw() {
    this.picture.draw();
  }

  point(layer, index) {
    this.picture.point(layer, index);
  }

  /** Space, comma and full stop, where they mean nothing else. Returns whether the player has it. */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    if (event.target === this.slider && event.key.startsWith("Arrow")) return true; // steps by itself
    const step = { ",": -1, ".": 1 }[event.key];
    if (step) this.step(step);
    else if (event.key === " " && !event.target.matches("button, summary, input, a")) this.play();
    else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }
}
