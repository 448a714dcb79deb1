// Colours of the grid by four measures, and the details of the cell under the pointer or the keyboard.
const tables = [...document.querySelectorAll("table.heat[data-model]")]; // a page may have others
const logV = Math.log(data.vocabulary);
const highestKl = Math.max(0.01, ...["a", "b"].flatMap((side) => (data[side] ? data[side].kl.flat() : [])));

// Each measure as a number from 0 (pale) to 1 (strong), and what its two ends mean.
const modes = {
  probability: { of: (m, n, l) => m.top_probs[n][l][0], ends: ["0", "1"] },
  rank: { of: (m, n, l) => 1 - Math.log(m.rank[n][l]) / logV, ends: ["last of " + data.vocabulary, "first"] },
  kl: { of: (m, n, l) => m.kl[n][l] / highestKl, ends: ["0 nats", highestKl.toFixed(1)] },
  entropy: { of: (m, n, l) => m.entropy[n][l] / logV, ends: ["0 nats", logV.toFixed(1)] },
};
const cells = (table) => [...table.tBodies[0].querySelectorAll("td")];

function colour(mode) {
  for (const table of tables.filter((t) => t.dataset.model in data)) {
    for (const td of cells(table)) {
      const value = modes[mode].of(data[table.dataset.model], ...place(td));
      td.style.setProperty("--v", value.toFixed(3));
      td.classList.toggle("strong", value > 0.66);
    }
  }
  by("low").textContent = modes[mode].ends[0];
  by("high").textContent = modes[mode].ends[1];
  document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === mode));
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
  box.append(table, ...measures(side, n, l).map((line) => element("div", line, "muted")));
  return box;
}

function measures(side, n, l) {
  const model = data[side], next = model.next_probs[n][l];
  return ["final token ranks " + model.rank[n][l], "KL from final " + model.kl[n][l].toPrecision(3),
    "entropy " + model.entropy[n][l].toPrecision(3), ...(next === null ? [] : ["p(really " + (data.in_place ? "there" : "next") + ") " + next.toPrecision(3)])];
}

const sides = ["a", "b"].filter((side) => data[side]);
const versus = (n, l) => (data.b ? ["KL(A‖B) " + data.kl_ab[n][l].toPrecision(3) + " nats"] : []);

function show(td) {
  const [n, l] = place(td), both = element("div", undefined, "sides"), head = element("div", "layer " + n + (data.in_place ? ", at " : ", after "));
  head.append(element("code", data.labels[l]));
  both.append(...sides.map((side) => candidates(side, n, l)));
  showTip([head, both, ...versus(n, l).map((line) => element("div", line))], td.getBoundingClientRect());
  unmark();
  for (const table of tables) for (const other of cells(table)) if (other.cellIndex === td.cellIndex) other.classList.add("column");
}

function words(td) {
  const [n, l] = place(td), named = (side) => data.b ? side.toUpperCase() + ": " : "";
  const said = (side) => named(side) + data[side].top_ids[n][l].slice(0, 3)
    .map((id, k) => data.words[id] + " " + data[side].top_probs[n][l][k].toFixed(3)).join(", ") + "; " + measures(side, n, l).join(", ");
  return ["layer " + n + (data.in_place ? ", at " : ", after ") + data.labels[l], ...sides.map(said), ...versus(n, l)].join(". ");
}

const unmark = () => document.querySelectorAll("td.column").forEach((td) => td.classList.remove("column"));
for (const table of tables) {
  heatTable(table, words, show);
  table.addEventListener("pointerleave", unmark);
  table.addEventListener("focusout", unmark);
}
const scrolls = tables.map((table) => table.closest(".scroll"));
for (const one of scrolls)
  one.addEventListener("scroll", () => scrolls.forEach((other) => other !== one && (other.scrollLeft = one.scrollLeft)));
document.querySelectorAll("[data-mode]").forEach((b) => b.addEventListener("click", () => colour(b.dataset.mode)));
document.querySelector(".controls").hidden = false;
