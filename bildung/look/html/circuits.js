"use strict";
// The matrix of composition on a canvas, and the table of heads, which sorts.
const data = JSON.parse(document.getElementById("data").textContent);
const { layers: N, heads: H, matrices } = data;
const M = N * H, by = (id) => document.getElementById(id);
const label = (head) => Math.floor(head / H) + "." + (head % H);
for (const one of Object.values(matrices)) one.steps = Uint8Array.from(atob(one.bytes), (c) => c.charCodeAt(0));
let kind = "K", cell = 1;
const value = (row, column) => {
  const one = matrices[kind];
  return one.low + (one.steps[row * M + column] / 255) * (one.high - one.low);
};
const below = (row, column) => Math.floor(column / H) < Math.floor(row / H);

function draw() {
  const canvas = by("plot"), context = canvas.getContext("2d"), one = matrices[kind];
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  cell = Math.max(1, Math.min(24, Math.floor(Math.min(900, canvas.parentNode.clientWidth - 8) / M)));
  canvas.width = canvas.height = cell * M;
  const widest = Math.max(Math.abs(one.low), Math.abs(one.high)) || 1;
  for (let row = 0; row < M; row++)
    for (let column = 0; column < M; column++) {
      if (!below(row, column)) continue;
      const v = value(row, column);
      context.globalAlpha = Math.min(1, Math.abs(v) / widest);
      context.fillStyle = colour(v < 0 ? "--orange" : "--blue");
      context.fillRect(column * cell, row * cell, cell, cell);
    }
  context.globalAlpha = 1;
  context.strokeStyle = colour("--rule");
  for (let n = 0; n <= N; n++) {
    context.strokeRect(0, n * H * cell, cell * M, 0);
    context.strokeRect(n * H * cell, 0, 0, cell * M);
  }
  by("low").textContent = (-widest).toFixed(2);
  by("high").textContent = "+" + widest.toFixed(2);
}

function choose(to) {
  kind = to;
  document.querySelectorAll("[data-kind]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.kind === kind));
  draw();
}

if (Object.keys(matrices).length) {
  document.querySelector(".controls").hidden = document.querySelector(".plot").hidden = false;
  document.querySelectorAll("[data-kind]").forEach((b) => b.addEventListener("click", () => choose(b.dataset.kind)));
  by("plot").addEventListener("pointermove", (event) => {
    const column = Math.floor(event.offsetX / cell), row = Math.floor(event.offsetY / cell);
    by("readout").textContent = row < M && column < M && below(row, column)
      ? label(row) + " reads " + label(column) + ": " + value(row, column).toFixed(3) : "";
  });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  choose("K");
}

const names = Object.keys(data.scores), rows = [...by("all").tBodies[0].rows];
const score = (name, head) => data.scores[name][Math.floor(head / H)][head % H];
rows.forEach((row, head) => [...row.cells].slice(1).forEach((box, i) => {
  const v = names[i].startsWith("norm") ? 0 : score(names[i], head);
  box.style.setProperty("--v", Math.abs(v).toFixed(3));
  box.classList.toggle("minus", v < 0);
  box.classList.toggle("strong", Math.abs(v) > 0.6);
}));
let sorted = { column: 0, down: false };
[...by("all").tHead.rows[0].cells].forEach((heading, column, all) => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: heading.textContent });
  heading.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = column === sorted.column ? !sorted.down : column > 0;
    sorted = { column, down };
    const key = (head) => (column ? score(names[column - 1], head) : head);
    const order = [...Array(M).keys()].sort((x, y) => (down ? key(y) - key(x) : key(x) - key(y)));
    by("all").tBodies[0].append(...order.map((head) => rows[head]));
    all.forEach((other, i) => i === column ? other.setAttribute("aria-sort", down ? "descending" : "ascending")
      : other.removeAttribute("aria-sort"));
  });
});
