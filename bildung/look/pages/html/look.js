"use strict";
// Shared by the pages of a look: colours, tips, what is read out, tables, and heat maps (heat_map.js) made of them.
const by = (id) => document.getElementById(id);
const data = by("data") ? JSON.parse(by("data").textContent) : {};

// Built from nodes, never from markup: a token may be any text.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// What a screen reader speaks; the eyes see the tip.
const say = (text) => { by("say").textContent = text; };

function showTip(content, box) {
  const tip = by("tip");
  tip.replaceChildren(...[content].flat());
  tip.hidden = false;
  const size = tip.getBoundingClientRect(), below = box.bottom + 8 + size.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - size.width - 8)) + "px";
  tip.style.top = Math.max(8, below ? box.bottom + 8 : box.top - size.height - 8) + "px";
}
const hideTip = () => { by("tip").hidden = true; };
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", hideTip, { passive: true });

// Arrow keys, Home and End: the next place in a grid, or null.
function step(event, [row, column], rows, columns) {
  const moved = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    Home: [0, -column], End: [0, columns - 1 - column], PageUp: [-row, 0], PageDown: [rows - 1 - row, 0] }[event.key];
  if (!moved || event.altKey || event.metaKey) return null;
  event.preventDefault();
  const clamp = (n, highest) => Math.max(0, Math.min(highest, n));
  return [clamp(row + moved[0], rows - 1), clamp(column + moved[1], columns - 1)];
}

// ── colours ── they come from the style sheet, so light and dark agree with the page
function palette() {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    probe.fillStyle = style.getPropertyValue(name).trim();
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const named = (name) => style.getPropertyValue(name).trim();
  return { none: rgb("--card"), more: rgb("--blue"), less: rgb("--orange"), outside: rgb("--paper"),
    ink: named("--ink"), strong: named("--on-blue"), muted: named("--muted"), rule: named("--rule"), mono: named("--mono") };
}
let colours = palette();
const redrawn = []; // functions that draw again when the window or the colours change
addEventListener("resize", () => redrawn.forEach((draw) => draw(false)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colours = palette();
  redrawn.forEach((draw) => draw(true));
});

// One pixel of an image: from paper (0) to blue (1) or orange (-1); null is outside.
function tint(pixels, at, value) {
  const base = value === null ? colours.outside : colours.none, end = value < 0 ? colours.less : colours.more;
  const part = Math.min(1, Math.abs(value || 0));
  for (let c = 0; c < 3; c++) pixels[at + c] = base[c] + (end[c] - base[c]) * part;
  pixels[at + 3] = 255;
}

// ── a heat map as a table: one stop for Tab, arrows inside ──
const place = (td) => [td.parentNode.sectionRowIndex, td.cellIndex - 1];
const cellOf = (table, row, column) => table.tBodies[0].rows[row].cells[column + 1];

function cellWords(td) {
  const table = td.closest("table"), row = td.parentNode.cells[0].textContent, head = table.tHead.rows[0].cells;
  const corner = head[0].textContent.trim();
  const where = (corner ? corner + " " : "") + row + ", " + head[td.cellIndex].textContent;
  return td.dataset.tip || where + ": " + (td.textContent || "0");
}

function heatTable(table, words = cellWords, show = (td) => showTip(element("p", words(td)), td.getBoundingClientRect())) {
  const rows = table.tBodies[0].rows, inside = (event) => event.target.closest("tbody td");
  for (const td of table.tBodies[0].querySelectorAll("td[title]")) { // one tip, not two
    if (td.title) td.dataset.tip = td.title;
    td.removeAttribute("title");
  }
  table.setAttribute("role", "grid");
  if (rows.length && rows[0].cells[1]) rows[0].cells[1].tabIndex = 0;
  table.addEventListener("pointerover", (event) => (inside(event) ? show(inside(event)) : hideTip()));
  table.addEventListener("pointerleave", hideTip);
  table.addEventListener("focusout", hideTip);
  table.addEventListener("focusin", (event) => {
    const td = inside(event);
    if (!td) return;
    show(td);
    say(words(td));
  });
  table.addEventListener("keydown", (event) => {
    const td = inside(event), to = td && step(event, place(td), rows.length, rows[0].cells.length - 1);
    const next = to && cellOf(table, ...to);
    if (!next || next === td) return;
    td.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// A column's name sorts by it. value(row of the table, column) is what is compared.
function sortable(table, value) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  let sorted = { column: 0, down: false };
  headings.forEach((heading, column) => {
    const button = Object.assign(element("button", heading.textContent), { type: "button" });
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = column === sorted.column ? !sorted.down : column > 0;
      sorted = { column, down };
      const keys = new Map([...body.rows].map((row) => [row, value(row, column)]));
      body.append(...[...body.rows].sort((x, y) => (down ? keys.get(y) - keys.get(x) : keys.get(x) - keys.get(y))));
      headings.forEach((other, i) => {
        if (i === column) other.setAttribute("aria-sort", down ? "descending" : "ascending");
        else other.removeAttribute("aria-sort");
      });
      say("sorted by " + heading.textContent + (down ? ", highest first" : ", lowest first"));
    });
  });
}

// The canvas of a <figure class="map">, from the table in it, which goes behind "The same as a table".
function mapOf(figure) {
  const table = figure.querySelector("table"), body = table.tBodies[0].rows, head = table.tHead.rows[0].cells;
  const plot = element("div", undefined, "plot"), canvas = element("canvas");
  plot.append(canvas);
  figure.querySelector("details").before(plot);
  figure.querySelector("details").open = false;
  canvas.setAttribute("aria-label", figure.querySelector("figcaption").textContent + "; the table below has its numbers");
  new HeatMap(canvas, {
    rows: body.length, columns: head.length - 1, least: 9, most: 52, highest: 20,
    text: (r, c) => cellOf(table, r, c).textContent,
    rowName: (r) => body[r].cells[0].textContent,
    columnName: (c) => head[c + 1].textContent,
    colour: (r, c) => {
      const td = cellOf(table, r, c), v = Number(td.style.getPropertyValue("--v"));
      return td.classList.contains("minus") ? -v : v;
    },
    words: (r, c) => cellWords(cellOf(table, r, c)),
  }).draw();
}

// Bytes that travel as deflated base64.
async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

if (location.hash === "#index") by("home").hidden = false; // come from the index of `bildung look MODEL`
for (const keys of document.querySelectorAll(".keys")) keys.hidden = false;
for (const table of document.querySelectorAll("figure.map table.heat")) heatTable(table);
document.querySelectorAll("figure.map").forEach(mapOf);
