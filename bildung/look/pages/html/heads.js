// A grid of all heads coloured by one score, all scores in a table that sorts, and the chosen head's pattern.
const { layers: N, heads: H, labels, scores } = data;
const names = Object.keys(scores), L = labels.length, all = by("all");
const bytes = data.patterns && Uint8Array.from(atob(data.patterns), (c) => c.charCodeAt(0));
const value = (name, head) => scores[name][Math.floor(head / H)][head % H];
const label = (head) => Math.floor(head / H) + "." + (head % H);
const best = (name) => [...Array(N * H).keys()].reduce((x, y) => (value(name, y) > value(name, x) ? y : x));
const state = { score: names[0], head: best(names[0]) };

const grid = new HeatMap(by("grid"), {
  rows: N, columns: H, least: 14, most: 44, highest: 22,
  rowName: (n) => n, columnName: (h) => h,
  colour: (n, h) => scores[state.score][n][h],
  text: (n, h) => (Math.abs(scores[state.score][n][h]) >= 0.005 ? scores[state.score][n][h].toFixed(2).replace("0.", ".") : ""),
  words: (n, h) => ["layer " + n + ", head " + h, ...names.map((name) => name + " " + scores[name][n][h].toFixed(3))].join("\n"),
  moved: (n, h) => choose({ head: n * H + h }),
});

const rows = [...all.tBodies[0].rows];
rows.forEach((row, head) => {
  [...row.cells].slice(1).forEach((box, i) => {
    const v = value(names[i], head);
    box.style.setProperty("--v", Math.min(1, Math.abs(v)).toFixed(3));
    box.classList.toggle("minus", v < 0);
    box.classList.toggle("strong", Math.abs(v) > 0.6);
  });
  row.addEventListener("click", () => choose({ head }));
});
heatTable(all);
sortable(all, (row, column) => (column ? value(names[column - 1], rows.indexOf(row)) : rows.indexOf(row)));

const weight = (l, s) => bytes[(state.head * L + l) * L + s] / 255;
const pattern = bytes && new HeatMap(by("plot"), {
  rows: L, columns: L, least: 6, most: 16,
  rowName: (l) => labels[l], columnName: (s) => labels[s],
  colour: (l, s) => (s > l ? null : Math.sqrt(weight(l, s))), // small weights above white
  words: (l, s) => (s > l ? "" : labels[l] + " (" + l + ") looks at " + labels[s] + " (" + s + "): " + weight(l, s).toFixed(3)),
});

function choose(change) {
  rows[state.head].removeAttribute("aria-selected");
  Object.assign(state, change);
  rows[state.head].setAttribute("aria-selected", "true");
  by("meaning").textContent = data.meaning[state.score];
  by("which").textContent = "Layer " + label(state.head).replace(".", ", head ") +
    (data.key_value_heads[H - 1] < H - 1 ? ", key-value head " + data.key_value_heads[state.head % H] : "");
  by("readout").textContent = names.map((name) => name + " " + value(name, state.head).toFixed(3)).join(",  ");
  Object.assign(grid, { at: [Math.floor(state.head / H), state.head % H], marked: true });
  grid.draw("score" in change);
  if (pattern) pattern.draw();
}
by("score").addEventListener("change", (event) => choose({ score: event.target.value }));
document.querySelector(".controls").hidden = document.querySelector(".workbench").hidden = false;
by("score").value = state.score;
choose({ score: state.score });
