"use strict";
// Shared by the pages of a look: heat maps on a canvas and as tables, with the pointer, the keyboard and a reader.
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

// ── a heat map on a canvas ──
// given: rows, columns     how many of each            rowName(r), columnName(c)   their labels
//        colour(r, c)      -1 to 1, null: no cell      words(r, c)                 what is shown and said of a cell
//        moved(r, c)       the keyboard or a click chose the cell                  least, most   pixels across a cell
//        text(r, c)        written into cells that are wide enough             highest       pixels down, if not square
//        picture()         instead of colour: a canvas that is drawn over all cells      every   a line after so many
class HeatMap {
  constructor(canvas, given) {
    Object.assign(this, { least: 2, most: 24, highest: Infinity, every: 0, moved: () => {}, canvas, at: [0, 0], marked: false }, given);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-roledescription", "heat map, arrow keys go from cell to cell");
    canvas.addEventListener("pointermove", (event) => {
      const cell = this.under(event);
      if (!cell) return hideTip();
      canvas.style.cursor = "crosshair";
      this.tell(...cell, false);
    });
    canvas.addEventListener("pointerleave", hideTip);
    canvas.addEventListener("blur", hideTip);
    canvas.addEventListener("click", (event) => this.under(event) && this.go(...this.under(event)));
    canvas.addEventListener("keydown", (event) => {
      const to = step(event, this.at, this.rows, this.columns);
      if (to) this.go(...to);
      else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        this.go(...this.at);
      }
    });
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.tell(...this.at, true));
    redrawn.push((recolour) => this.draw(recolour));
  }

  under(event) {
    const { left, top, cell, high } = this.frame;
    const row = Math.floor((event.offsetY - top) / high), column = Math.floor((event.offsetX - left) / cell);
    const inside = row >= 0 && column >= 0 && row < this.rows && column < this.columns;
    return inside && this.words(row, column) ? [row, column] : null;
  }

  tell(row, column, aloud) {
    const text = this.words(row, column), { left, top, cell, high } = this.frame;
    if (aloud) say(text || "nothing here");
    if (!text) return hideTip();
    const box = this.canvas.getBoundingClientRect();
    const x = box.left + left + column * cell, y = box.top + top + row * high;
    showTip(text.split("\n").map((line) => element("p", line)), { left: x, top: y, bottom: y + high });
  }

  go(row, column) {
    Object.assign(this, { at: [row, column], marked: true });
    this.moved(row, column);
    this.draw(false);
    this.reveal();
    this.tell(row, column, true);
  }

  reveal() { // keeps the chosen cell in sight
    const { left, top, cell, high } = this.frame, plot = this.canvas.parentNode;
    const x = left + this.at[1] * cell, y = top + this.at[0] * high;
    if (x < plot.scrollLeft || x + cell > plot.scrollLeft + plot.clientWidth) plot.scrollLeft = x - plot.clientWidth / 2;
    if (y < plot.scrollTop || y + high > plot.scrollTop + plot.clientHeight) plot.scrollTop = y - plot.clientHeight / 2;
  }

  image() {
    const made = document.createElement("canvas"), { rows, columns } = this;
    made.width = columns;
    made.height = rows;
    const context = made.getContext("2d"), image = context.createImageData(columns, rows);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) tint(image.data, (r * columns + c) * 4, this.colour(r, c));
    context.putImageData(image, 0, 0);
    return made;
  }

  // again: the values or the colours are others than at the last call
  draw(again = true) {
    const { canvas, rows: R, columns: C } = this, context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    if (again || !this.drawn) this.drawn = this.picture ? this.picture() : this.image();
    const rowNames = [...Array(R).keys()].map(this.rowName), columnNames = [...Array(C).keys()].map(this.columnName);
    const longest = (names) => Math.max(0, ...names.map((text) => String(text).length));
    const left = Math.min(170, 12 + 6.9 * longest(rowNames));
    const cell = Math.max(this.least, Math.min(this.most, (canvas.parentNode.clientWidth - left - 40) / C));
    const steep = longest(columnNames) * 6.9 > cell - 2; // labels that do not fit side by side stand aslant
    const top = steep ? Math.min(120, 10 + 6.1 * longest(columnNames)) : 18;
    const high = Math.min(cell, this.highest);
    this.frame = { left, top, cell, high };
    const width = left + cell * C + (steep ? Math.min(60, 4.2 * longest(columnNames)) : 4), height = top + high * R + 4;
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.drawn, left, top, cell * C, high * R);
    if (!this.picture && high >= 9) this.grid(context);
    context.font = "11.5px " + colours.mono;
    context.textBaseline = "middle";
    const thin = Math.ceil(12 / cell), thinRows = Math.ceil(12 / high); // every so many labels have room
    const shorten = (text, most) => (String(text).length > most ? String(text).slice(0, most - 1) + "…" : String(text));
    rowNames.forEach((text, r) => {
      if (r % thinRows) return;
      context.textAlign = "right";
      context.fillStyle = this.marked && r === this.at[0] ? colours.ink : colours.muted;
      context.fillText(shorten(text, 23), left - 6, top + high * (r + 0.5));
    });
    columnNames.forEach((text, c) => {
      if (c % thin) return;
      context.save();
      context.translate(left + cell * (c + 0.5), top - 7);
      if (steep) context.rotate(-Math.PI / 3);
      context.textAlign = steep ? "left" : "center";
      context.fillStyle = this.marked && c === this.at[1] ? colours.ink : colours.muted;
      context.fillText(shorten(text, 19), 0, 0);
      context.restore();
    });
    context.strokeStyle = colours.rule;
    context.lineWidth = 1;
    context.strokeRect(left, top, cell * C, high * R);
    for (let n = this.every; this.every && n < Math.max(R, C); n += this.every) {
      context.beginPath();
      context.moveTo(left, top + n * high);
      context.lineTo(left + cell * C, top + n * high);
      context.moveTo(left + n * cell, top);
      context.lineTo(left + n * cell, top + high * R);
      context.stroke();
    }
    if (!this.marked) return;
    context.strokeStyle = colours.ink;
    context.lineWidth = 2;
    context.strokeRect(left + this.at[1] * cell, top + this.at[0] * high, cell, high);
  }

  // Thin lines between cells, and the values where there is room for them.
  grid(context) {
    const { left, top, cell, high } = this.frame, { rows: R, columns: C } = this;
    context.strokeStyle = colours.rule;
    context.globalAlpha = 0.6;
    context.lineWidth = 0.5;
    context.beginPath();
    for (let r = 1; r < R; r++) context.moveTo(left, top + r * high), context.lineTo(left + C * cell, top + r * high);
    for (let c = 1; c < C; c++) context.moveTo(left + c * cell, top), context.lineTo(left + c * cell, top + R * high);
    context.stroke();
    context.globalAlpha = 1;
    if (!this.text || cell < 34) return;
    context.font = "10.5px " + colours.mono;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let r = 0; r < R; r++)
      for (let c = 0; c < C; c++) {
        context.fillStyle = Math.abs(this.colour(r, c)) > 0.6 ? colours.strong : colours.ink;
        context.fillText(this.text(r, c).slice(0, Math.floor((cell - 2) / 6.3)), left + (c + 0.5) * cell, top + (r + 0.5) * high);
      }
  }
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
