"use strict";
// Colours of the grid by four measures, and the details of the cell under the pointer (or the keyboard's focus).
const data = JSON.parse(document.getElementById("data").textContent);
const tables = [...document.querySelectorAll("table.heat[data-model]")];
const tip = document.getElementById("tip");
const logV = Math.log(data.vocabulary);
const highestKl = Math.max(0.01, ...["a", "b"].flatMap((side) => (data[side] ? data[side].kl.flat() : [])));

// Each measure as a number from 0 (pale) to 1 (strong), and what its two ends mean.
const modes = {
  probability: { of: (m, n, l) => m.top_probs[n][l][0], ends: ["0", "1"] },
  rank: { of: (m, n, l) => 1 - Math.log(m.rank[n][l]) / logV, ends: ["last of " + data.vocabulary, "first"] },
  kl: { of: (m, n, l) => m.kl[n][l] / highestKl, ends: ["0 nats", highestKl.toFixed(1)] },
  entropy: { of: (m, n, l) => m.entropy[n][l] / logV, ends: ["0 nats", logV.toFixed(1)] },
};

const place = (td) => [td.parentNode.rowIndex - 1, td.cellIndex - 1];
const cells = (table) => [...table.tBodies[0].querySelectorAll("td")];

function colour(mode) {
  for (const table of tables.filter((t) => t.dataset.model in data)) {
    for (const td of cells(table)) {
      const value = modes[mode].of(data[table.dataset.model], ...place(td));
      td.style.setProperty("--v", value.toFixed(3));
      td.classList.toggle("strong", value > 0.66);
    }
  }
  document.getElementById("low").textContent = modes[mode].ends[0];
  document.getElementById("high").textContent = modes[mode].ends[1];
  document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === mode));
}

// Built from nodes, never from markup: a token may be any text.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function candidates(side, n, l) {
  const model = data[side], box = element("div"), table = element("table");
  if (data.b) box.append(element("b", side.toUpperCase()));
  model.top_ids[n][l].forEach((id, k) => {
    const p = model.top_probs[n][l][k], row = table.insertRow(), bar = element("span", undefined, "bar");
    bar.style.width = (p * 70).toFixed(1) + "px";
    row.append(element("td", data.words[id], "mono"), element("td", p.toFixed(3)), element("td"));
    row.lastChild.append(bar);
  });
  const next = model.next_probs[n][l];
  const lines = ["final token ranks " + model.rank[n][l], "KL from final " + model.kl[n][l].toPrecision(3),
    "entropy " + model.entropy[n][l].toPrecision(3)];
  if (next !== null) lines.push("p(really next) " + next.toPrecision(3));
  box.append(table, ...lines.map((line) => element("div", line, "muted")));
  return box;
}

function show(td) {
  const [n, l] = place(td), sides = element("div", undefined, "sides");
  const head = element("div", "layer " + n + ", after ");
  head.append(element("code", data.labels[l]));
  sides.append(...["a", "b"].filter((side) => data[side]).map((side) => candidates(side, n, l)));
  tip.replaceChildren(head, sides);
  if (data.b) tip.append(element("div", "KL(A‖B) " + data.kl_ab[n][l].toPrecision(3) + " nats"));
  tip.hidden = false;
  const at = td.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8));
  const below = at.bottom + 8 + size.height < innerHeight;
  tip.style.left = left + "px";
  tip.style.top = Math.max(8, below ? at.bottom + 8 : at.top - size.height - 8) + "px";
  for (const table of tables)
    for (const other of cells(table)) other.classList.toggle("column", other.cellIndex === td.cellIndex);
}

function hide() {
  tip.hidden = true;
  document.querySelectorAll("td.column").forEach((td) => td.classList.remove("column"));
}

const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
for (const table of tables) {
  cells(table)[0].tabIndex = 0; // one stop for Tab, arrows inside
  const inside = (event) => event.target.closest("tbody td");
  table.addEventListener("pointerover", (event) => inside(event) && show(inside(event)));
  table.addEventListener("focusin", (event) => inside(event) && show(inside(event)));
  table.addEventListener("pointerleave", hide);
  table.addEventListener("focusout", hide);
  table.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const step = steps[event.key], td = inside(event);
    if (!step || !td) return;
    const row = table.tBodies[0].rows[place(td)[0] + step[0]], next = row && row.cells[td.cellIndex + step[1]];
    if (!next || next.tagName !== "TD") return;
    event.preventDefault();
    td.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

const scrolls = tables.map((table) => table.closest(".scroll"));
for (const one of scrolls)
  one.addEventListener("scroll", () => scrolls.forEach((other) => other !== one && (other.scrollLeft = one.scrollLeft)));
document.querySelectorAll("[data-mode]").forEach((b) => b.addEventListener("click", () => colour(b.dataset.mode)));
document.querySelector(".controls").hidden = false;
