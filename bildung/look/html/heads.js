"use strict";
// A grid of all heads coloured by one score, all scores in a table that sorts, and the chosen head's pattern.
const data = JSON.parse(document.getElementById("data").textContent);
const { layers: N, heads: H, labels, scores } = data;
const names = Object.keys(scores), L = labels.length;
const bytes = data.patterns && Uint8Array.from(atob(data.patterns), (c) => c.charCodeAt(0));
const by = (id) => document.getElementById(id);
const value = (name, head) => scores[name][Math.floor(head / H)][head % H];
const label = (head) => Math.floor(head / H) + "." + (head % H);
const best = (name) => [...Array(N * H).keys()].reduce((x, y) => (value(name, y) > value(name, x) ? y : x));
const state = { score: names[0], head: best(names[0]) };

function tint(cell, v) {
  cell.style.setProperty("--v", Math.min(1, Math.abs(v)).toFixed(3));
  cell.classList.toggle("minus", v < 0);
  cell.classList.toggle("strong", Math.abs(v) > 0.6);
}

// ── the grid ──
const cells = [];
{
  const top = by("grid").createTHead().insertRow(), body = by("grid").createTBody();
  const caption = (row, text) => row.append(Object.assign(document.createElement("th"), { textContent: text }));
  caption(top, "");
  for (let h = 0; h < H; h++) caption(top, h);
  for (let n = 0; n < N; n++) {
    const row = body.insertRow();
    caption(row, n);
    for (let h = 0; h < H; h++) {
      const cell = row.insertCell(), head = n * H + h;
      cell.tabIndex = -1;
      cell.addEventListener("click", () => choose({ head }));
      cell.addEventListener("pointermove", (event) => tip(event, head));
      cell.addEventListener("pointerleave", () => { by("tip").hidden = true; });
      cells.push(cell);
    }
  }
  by("grid").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -H, ArrowDown: H }[event.key], to = state.head + step;
    if (!step || to < 0 || to >= N * H) return;
    event.preventDefault();
    choose({ head: to });
    cells[to].focus();
  });
}

function tip(event, head) {
  const box = by("tip");
  box.replaceChildren(Object.assign(document.createElement("b"), { textContent: "layer " + label(head).replace(".", ", head ") }));
  const table = document.createElement("table");
  for (const name of names) {
    const row = table.insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = value(name, head).toFixed(3);
  }
  box.append(table);
  box.hidden = false;
  box.style.left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8) + "px";
  box.style.top = Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8) + "px";
}

// ── the table ──
const rows = [...by("all").tBodies[0].rows];
rows.forEach((row, head) => {
  [...row.cells].slice(1).forEach((cell, i) => tint(cell, value(names[i], head)));
  row.addEventListener("click", () => choose({ head }));
});
[...by("all").tHead.rows[0].cells].forEach((heading, column) => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: heading.textContent });
  heading.replaceChildren(button);
  button.addEventListener("click", () => sort(column));
});
let sorted = { column: 0, down: false };
function sort(column) {
  const down = column === sorted.column ? !sorted.down : column > 0;
  sorted = { column, down };
  const key = (head) => (column ? value(names[column - 1], head) : head);
  const order = [...Array(N * H).keys()].sort((x, y) => (down ? key(y) - key(x) : key(x) - key(y)));
  by("all").tBodies[0].append(...order.map((head) => rows[head]));
  [...by("all").tHead.rows[0].cells].forEach((heading, i) => {
    if (i === column) heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  });
}

// ── the pattern ──
let cell = 1, left = 0;
function draw() {
  const canvas = by("plot"), context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
  if (!bytes) return;
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  left = Math.min(120, 10 + 6.8 * Math.max(...labels.map((t) => t.length)));
  cell = Math.max(6, Math.min(16, (canvas.parentNode.clientWidth - left) / L));
  canvas.style.width = left + cell * L + "px";
  canvas.style.height = cell * L + "px";
  canvas.width = (left + cell * L) * ratio;
  canvas.height = cell * L * ratio;
  context.scale(ratio, ratio);
  context.font = Math.min(11, cell) + "px " + colour("--mono");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let l = 0; l < L; l++) {
    context.globalAlpha = 1;
    context.fillStyle = colour("--muted");
    context.fillText(labels[l], left - 6, cell * (l + 0.5));
    context.fillStyle = colour("--card");
    context.fillRect(left, cell * l, cell * (l + 1), cell);
    context.fillStyle = colour("--blue");
    for (let s = 0; s <= l; s++) {
      context.globalAlpha = Math.sqrt(bytes[(state.head * L + l) * L + s] / 255); // small weights above white
      context.fillRect(left + cell * s, cell * l, cell - 0.5, cell - 0.5);
    }
  }
}
by("plot").addEventListener("pointermove", (event) => {
  const l = Math.floor(event.offsetY / cell), s = Math.floor((event.offsetX - left) / cell);
  if (l < 0 || l >= L || s < 0 || s > l) return;
  by("readout").textContent = labels[l] + " (" + l + ") looks at " + labels[s] + " (" + s + "): " +
    (bytes[(state.head * L + l) * L + s] / 255).toFixed(3);
});

function choose(change) {
  const before = state.head;
  Object.assign(state, change);
  cells[before].removeAttribute("aria-selected");
  cells[before].tabIndex = -1;
  rows[before].removeAttribute("aria-selected");
  cells[state.head].setAttribute("aria-selected", "true");
  cells[state.head].tabIndex = 0;
  rows[state.head].setAttribute("aria-selected", "true");
  if ("score" in change) {
    by("meaning").textContent = data.meaning[state.score];
    cells.forEach((box, head) => {
      tint(box, value(state.score, head));
      box.textContent = Math.abs(value(state.score, head)) >= 0.005 ? value(state.score, head).toFixed(2).replace("0.", ".") : "";
      box.setAttribute("aria-label", label(head) + " " + state.score + " " + value(state.score, head));
    });
  }
  by("which").textContent = "Layer " + label(state.head).replace(".", ", head ") +
    (data.key_value_heads[H - 1] < H - 1 ? ", key-value head " + data.key_value_heads[state.head % H] : "");
  by("readout").textContent = names.map((name) => name + " " + value(name, state.head).toFixed(3)).join(",  ");
  draw();
}
by("score").addEventListener("change", (event) => choose({ score: event.target.value }));
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.querySelector(".controls").hidden = document.querySelector(".workbench").hidden = false;
by("score").value = state.score;
choose({ score: state.score });
