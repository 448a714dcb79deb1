// A sheet of heads, the chosen one large, and for the chosen token where its attention goes. A head's pattern is
// unpacked when it is chosen; the sheet has its own small pictures of all heads.
const { layers: N, heads: H, labels, thumb: T, widest } = data;
const L = labels.length, heads = [...Array(N * H).keys()];
const state = { view: by("a-0") && by("b-0") ? "difference" : "a", head: 0, row: L - 1, order: "" };
const name = (head) => "layer " + Math.floor(head / H) + ", head " + (head % H);
const score = (kind, head) => data.scores[kind][Math.floor(head / H)][head % H];
const signed = (w) => (state.view === "difference" && w > 0 ? "+" : "") + w.toFixed(3);

// How strong a weight's colour is, with its sign. The square root lifts the small weights, most of a pattern, above
// white; the strongest difference sets the scale of all differences, as most tunes move attention by little.
const strength = (w) => Math.sign(w) * Math.sqrt(Math.abs(w) / (state.view === "difference" ? widest || 1 : 1));

// ── the patterns ──
const unpacked = new Map(); // the last few
async function bytes(id) {
  if (!unpacked.has(id)) unpacked.set(id, inflate(by(id).textContent));
  if (unpacked.size > 64) unpacked.delete(unpacked.keys().next().value);
  return unpacked.get(id);
}
let shown = null; // weight(l, s) of the chosen head
async function load() {
  const { view, head } = state;
  const one = await bytes((view === "difference" ? "a-" : view + "-") + head);
  const other = view === "difference" ? await bytes("b-" + head) : null;
  if (head !== state.head || view !== state.view) return; // another was chosen in the meantime
  shown = (l, s) => (other ? other[l * L + s] - one[l * L + s] : one[l * L + s]) / 255;
  drawLarge();
}
const outside = (l, s) => data.causal && s > l;

// ── the sheet: all heads on one canvas ──
const thumbs = {};
const order = () => (state.order ? [...heads].sort((x, y) => score(state.order, y) - score(state.order, x)) : heads);
let ordered = heads, across = H;

function sheetPicture() {
  const gap = Math.max(1, Math.round(T / 8)), made = document.createElement("canvas"), all = thumbs[state.view];
  made.width = across * (T + gap);
  made.height = sheet.rows * (T + gap);
  const context = made.getContext("2d"), image = context.createImageData(made.width, made.height);
  ordered.forEach((head, n) => {
    const left = (n % across) * (T + gap), top = Math.floor(n / across) * (T + gap);
    for (let l = 0; l < T; l++)
      for (let s = 0; s < T; s++) {
        const w = all[(head * T + l) * T + s] / (state.view === "difference" ? 127 : 255); // of the widest: already scaled
        tint(image.data, ((top + l) * made.width + left + s) * 4, outside(l, s) ? null : Math.sign(w) * Math.sqrt(Math.abs(w)));
      }
  });
  context.putImageData(image, 0, 0);
  return made;
}

const at = (r, c) => (r * across + c < N * H ? ordered[r * across + c] : undefined);
const sheet = new HeatMap(by("sheet"), {
  rows: N, columns: H, least: N * H > 600 ? 18 : 26, most: 84,
  rowName: (r) => (state.order ? "" : r), columnName: (c) => (state.order ? "" : c),
  words: (r, c) => at(r, c) === undefined ? "" : [name(at(r, c)),
    ...Object.keys(data.scores).map((kind) => kind + " " + score(kind, at(r, c)).toFixed(3))].join("\n"),
  picture: sheetPicture,
  moved: (r, c) => at(r, c) !== undefined && choose({ head: at(r, c) }),
});

function drawSheet() {
  ordered = order();
  const n = ordered.indexOf(state.head);
  sheet.at = [Math.floor(n / across), n % across];
  sheet.marked = true;
  sheet.draw();
  sheet.reveal();
}

// ── the chosen head ──
const large = new HeatMap(by("plot"), {
  rows: L, columns: L, least: 1.5, most: 26,
  rowName: (l) => labels[l], columnName: (s) => labels[s],
  colour: (l, s) => (outside(l, s) ? null : strength(shown(l, s))),
  words: (l, s) => (!shown || outside(l, s) ? "" : labels[l] + " (" + l + ") looks at " + labels[s] + " (" + s + "): " + signed(shown(l, s))),
  moved: (l) => { state.row = l; drawRow(); },
});

function drawLarge() {
  by("which").textContent = name(state.head).replace("l", "L");
  large.at = [state.row, large.at[1]];
  large.marked = true;
  large.draw();
  drawRow();
  if (by("more").open) listLinks();
}

function drawRow() {
  const row = state.row, weights = labels.map((_, s) => (outside(row, s) ? 0 : shown(row, s)));
  by("strip").replaceChildren(...labels.map((text, s) => {
    const span = element("span", text, weights[s] < 0 ? "minus" : ""), v = Math.abs(strength(weights[s]));
    span.title = signed(weights[s]);
    span.style.setProperty("--v", v.toFixed(3));
    span.classList.toggle("strong", v > 0.66);
    span.classList.toggle("chosen", s === row);
    span.addEventListener("click", () => large.go(s, large.at[1]));
    return span;
  }));
  const best = [...weights.keys()].sort((x, y) => Math.abs(weights[y]) - Math.abs(weights[x]));
  by("readout").textContent = labels[row] + " looks at " + best.slice(0, 4).map((s) => labels[s] + " " + signed(weights[s])).join(",  ");
}

function listLinks() {
  const links = [];
  for (let l = 0; l < L; l++) for (let s = 0; s < L; s++) if (!outside(l, s)) links.push([Math.abs(shown(l, s)), l, s]);
  links.sort((x, y) => y[0] - x[0]);
  by("links").replaceChildren(...links.slice(0, 24).map(([, l, s]) => {
    const line = element("tr");
    line.append(element("td", labels[l]), element("td", labels[s]), element("td", signed(shown(l, s)), "number"));
    return line;
  }));
}
by("more").addEventListener("toggle", () => by("more").open && listLinks());

function choose(change) {
  Object.assign(state, change);
  const two = state.view === "difference";
  document.querySelectorAll("[data-view]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.view === state.view));
  document.querySelector(".scale i").classList.toggle("two", two);
  by("low").textContent = two ? "A " + widest.toFixed(2) + " more" : "0";
  by("high").textContent = two ? "B " + widest.toFixed(2) + " more" : "1";
  if ("view" in change || "order" in change) drawSheet();
  return load();
}

async function start() {
  for (const [key, text] of Object.entries(data.thumbs)) {
    const small = await inflate(text);
    thumbs[key] = key === "difference" ? new Int8Array(small.buffer) : small;
  }
  document.querySelector(".controls").hidden = document.querySelector(".workbench").hidden = false;
  const kind = data.scores.moved ? "moved" : "previous token";
  const head = heads.reduce((x, y) => (score(kind, y) > score(kind, x) ? y : x)); // start with a telling head
  await choose({ head, view: state.view });
  document.documentElement.dataset.drawn = Math.round(performance.now()); // milliseconds from opening to all drawn
}

by("order").addEventListener("change", (event) => choose({ order: event.target.value }));
document.querySelectorAll("[data-view]").forEach((b) => b.addEventListener("click", () => choose({ view: b.dataset.view })));
const all = by("all"), kinds = Object.keys(data.scores);
heatTable(all);
sortable(all, (row, column) => {
  const [layer, head] = row.cells[0].textContent.split(".").map(Number);
  return column ? data.scores[kinds[column - 1]][layer][head] : layer * H + head;
});
start();
