// The matrix of composition on a canvas, and the table of heads, which sorts.
const { layers: N, heads: H, matrices } = data;
const M = N * H, all = by("all");
const label = (head) => Math.floor(head / H) + "." + (head % H);
for (const one of Object.values(matrices)) {
  one.steps = Uint8Array.from(atob(one.bytes), (c) => c.charCodeAt(0));
  one.widest = Math.max(Math.abs(one.low), Math.abs(one.high)) || 1;
}
let kind = "K";
const value = (row, column) => {
  const one = matrices[kind];
  return one.low + (one.steps[row * M + column] / 255) * (one.high - one.low);
};
const below = (row, column) => Math.floor(column / H) < Math.floor(row / H);

if (Object.keys(matrices).length) {
  document.querySelector(".controls").hidden = document.querySelector(".plot").hidden = false;
  const map = new HeatMap(by("plot"), {
    rows: M, columns: M, least: 1, most: 24, every: H, rowName: label, columnName: label,
    colour: (row, column) => (below(row, column) ? value(row, column) / matrices[kind].widest : null),
    words: (row, column) => below(row, column) ? label(row) + " reads " + label(column) + " by " + kind + ": " + value(row, column).toFixed(3) : "",
  });
  const choose = (to) => {
    kind = to;
    document.querySelectorAll("[data-kind]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.kind === kind));
    by("low").textContent = (-matrices[kind].widest).toFixed(2);
    by("high").textContent = "+" + matrices[kind].widest.toFixed(2);
    map.draw();
  };
  document.querySelectorAll("[data-kind]").forEach((b) => b.addEventListener("click", () => choose(b.dataset.kind)));
  choose("K");
}

const names = Object.keys(data.scores), rows = [...all.tBodies[0].rows];
const score = (name, head) => data.scores[name][Math.floor(head / H)][head % H];
rows.forEach((row, head) => [...row.cells].slice(1).forEach((box, i) => {
  const v = names[i].startsWith("norm") ? 0 : score(names[i], head);
  box.style.setProperty("--v", Math.abs(v).toFixed(3));
  box.classList.toggle("minus", v < 0);
  box.classList.toggle("strong", Math.abs(v) > 0.6);
}));
heatTable(all);
sortable(all, (row, column) => (column ? score(names[column - 1], rows.indexOf(row)) : rows.indexOf(row)));
