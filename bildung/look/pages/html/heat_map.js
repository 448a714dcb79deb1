"use strict";
// A heat map on a canvas; look.js, which follows, makes one of every <figure class="map">.
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
