"use strict";
// A sheet of heads, the chosen one large, and for the chosen token where its attention goes.
const data = JSON.parse(document.getElementById("data").textContent);
const { layers: N, heads: H, labels } = data;
const L = labels.length;
const bytes = Object.fromEntries(Object.entries(data.patterns).map(([key, text]) =>
  [key, Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]));
const state = { view: data.patterns.b ? "difference" : "a", head: 0, row: L - 1, order: "" };
const by = (id) => document.getElementById(id);

// The strongest difference sets the scale of all differences: most tunes move attention by little.
let widest = 1;
if (bytes.b) for (let i = (widest = 0); i < bytes.a.length; i++) widest = Math.max(widest, Math.abs(bytes.b[i] - bytes.a[i]) / 255);

// Weight of a link: 0..1, or -1..1 for the difference.
function weight(head, l, s) {
  const at = (head * L + l) * L + s;
  return (state.view === "difference" ? bytes.b[at] - bytes.a[at] : bytes[state.view][at]) / 255;
}

// How strong its colour is. The square root lifts the small weights, which are most of a pattern, above white.
const strength = (w) => Math.sqrt(Math.abs(w) / (state.view === "difference" ? widest || 1 : 1));

// Colours come from the style sheet, so light and dark agree with the page.
function palette() {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    probe.fillStyle = style.getPropertyValue(name).trim();
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  return { none: rgb("--card"), more: rgb("--blue"), less: rgb("--orange"), outside: rgb("--paper"),
    ink: style.getPropertyValue("--ink"), muted: style.getPropertyValue("--muted") };
}
let colours = palette();

function paint(canvas, head) {
  canvas.width = canvas.height = L;
  const context = canvas.getContext("2d"), image = context.createImageData(L, L);
  for (let l = 0; l < L; l++)
    for (let s = 0; s < L; s++) {
      const w = weight(head, l, s), t = strength(w), end = w < 0 ? colours.less : colours.more;
      const base = s > l ? colours.outside : colours.none;
      for (let c = 0; c < 3; c++) image.data[(l * L + s) * 4 + c] = base[c] + (end[c] - base[c]) * t;
      image.data[(l * L + s) * 4 + 3] = 255;
    }
  context.putImageData(image, 0, 0);
}

function drawSheet() {
  const sheet = document.querySelector(".heads"), order = [...Array(N * H).keys()];
  const score = (head) => data.scores[state.order][Math.floor(head / H)][head % H];
  if (state.order) order.sort((x, y) => score(y) - score(x));
  sheet.classList.toggle("sorted", Boolean(state.order));
  sheet.replaceChildren();
  const caption = (text) => Object.assign(document.createElement("span"), { textContent: text });
  if (!state.order) sheet.append(caption(""), ...[...Array(H).keys()].map((h) => caption(h)));
  for (const head of order) {
    if (!state.order && head % H === 0) sheet.append(caption(head / H));
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button";
    button.dataset.head = head;
    button.title = name(head) + (state.order ? ", " + state.order + " " + score(head).toFixed(3) : "");
    button.setAttribute("aria-label", button.title);
    button.setAttribute("aria-pressed", head === state.head);
    paint(canvas, head);
    button.append(canvas);
    if (state.order) button.append(Object.assign(document.createElement("small"),
      { textContent: Math.floor(head / H) + "." + (head % H) + " " + score(head).toFixed(2) }));
    button.addEventListener("click", () => choose({ head }));
    sheet.append(button);
  }
}

const name = (head) => "layer " + Math.floor(head / H) + ", head " + (head % H);
const signed = (w) => (state.view === "difference" && w > 0 ? "+" : "") + w.toFixed(3);
let frame = { left: 0, top: 0, cell: 1 };

function drawLarge() {
  const canvas = by("plot"), context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
  const available = canvas.parentNode.clientWidth, longest = Math.max(...labels.map((t) => t.length));
  const left = Math.min(120, 10 + 6.8 * longest), cell = Math.max(7, Math.min(26, (available - left) / L));
  const top = cell >= 11 ? left * 0.8 : 8;
  frame = { left, top, cell };
  const width = left + cell * L + 4, height = top + cell * L + 4;
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  context.scale(ratio, ratio);
  const small = document.createElement("canvas");
  paint(small, state.head);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, left, top, cell * L, cell * L);
  context.font = Math.min(11.5, cell) + "px " + getComputedStyle(document.documentElement).getPropertyValue("--mono");
  context.textBaseline = "middle";
  labels.forEach((text, i) => {
    context.fillStyle = i === state.row ? colours.ink : colours.muted;
    context.textAlign = "right";
    context.fillText(text, left - 6, top + cell * (i + 0.5));
    if (cell < 11) return;
    context.save();
    context.translate(left + cell * (i + 0.5), top - 5);
    context.rotate(-Math.PI / 3);
    context.textAlign = "left";
    context.fillStyle = colours.muted;
    context.fillText(text, 0, 0);
    context.restore();
  });
  context.strokeStyle = colours.ink;
  context.lineWidth = 1.5;
  context.strokeRect(left, top + cell * state.row, cell * L, cell);
  by("which").textContent = name(state.head).replace("l", "L");
  drawRow();
}

function drawRow() {
  const row = state.row;
  by("strip").replaceChildren(...labels.map((text, s) => {
    const button = document.createElement("button"), w = s <= row ? weight(state.head, row, s) : 0;
    button.type = "button";
    button.textContent = text;
    button.title = signed(w);
    button.style.setProperty("--v", strength(w).toFixed(3));
    if (w < 0) button.style.setProperty("--hue", "var(--orange)");
    button.classList.toggle("strong", strength(w) > 0.66);
    button.setAttribute("aria-pressed", s === row);
    button.addEventListener("click", () => choose({ row: s }));
    return button;
  }));
  const links = [];
  for (let l = 0; l < L; l++) for (let s = 0; s <= l; s++) links.push([Math.abs(weight(state.head, l, s)), l, s]);
  links.sort((x, y) => y[0] - x[0]);
  const table = by("links");
  table.replaceChildren();
  for (const [, l, s] of links.slice(0, 24)) {
    const line = table.insertRow();
    for (const text of [labels[l], "looks at", labels[s], signed(weight(state.head, l, s))]) line.insertCell().textContent = text;
  }
  const best = [...Array(row + 1).keys()].sort((x, y) => Math.abs(weight(state.head, row, y)) - Math.abs(weight(state.head, row, x)));
  by("readout").textContent = labels[row] + " looks at " +
    best.slice(0, 4).map((s) => labels[s] + " " + signed(weight(state.head, row, s))).join(",  ");
}

function choose(change) {
  Object.assign(state, change);
  if ("view" in change || "order" in change) drawSheet();
  document.querySelectorAll("[data-head]").forEach((b) => b.setAttribute("aria-pressed", Number(b.dataset.head) === state.head));
  document.querySelectorAll("[data-view]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.view === state.view));
  const two = state.view === "difference";
  document.querySelector(".scale i").classList.toggle("two", two);
  by("low").textContent = two ? "A " + widest.toFixed(2) + " more" : "0";
  by("high").textContent = two ? "B " + widest.toFixed(2) + " more" : "1";
  drawLarge();
}

by("plot").addEventListener("pointermove", (event) => {
  const l = Math.floor((event.offsetY - frame.top) / frame.cell), s = Math.floor((event.offsetX - frame.left) / frame.cell);
  if (l < 0 || l >= L || s < 0 || s > l) return;
  by("readout").textContent = labels[l] + " looks at " + labels[s] + ": " + signed(weight(state.head, l, s));
});
by("plot").addEventListener("click", (event) => {
  const l = Math.floor((event.offsetY - frame.top) / frame.cell);
  if (l >= 0 && l < L) choose({ row: l });
});
by("order").addEventListener("change", (event) => choose({ order: event.target.value }));
document.querySelectorAll("[data-view]").forEach((b) => b.addEventListener("click", () => choose({ view: b.dataset.view })));
addEventListener("resize", drawLarge);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = palette(); drawSheet(); drawLarge(); });
document.querySelector(".controls").hidden = document.querySelector(".workbench").hidden = false;
drawSheet();
const kind = data.scores.moved || data.scores["previous token"];
state.head = kind.flat().indexOf(Math.max(...kind.flat())); // start with a telling head
choose({});
