// A chosen node shows its edges alone and lists them; arrow keys go from node to node, row by row.
const svg = document.querySelector("svg"), nodes = [...svg.querySelectorAll("g")], paths = [...svg.querySelectorAll("path")];
let chosen = "";
const edgesOf = (name) => paths.filter((path) => [path.dataset.from, path.dataset.to].includes(name)).reverse();
const listed = (name) => edgesOf(name).map((path) => path.textContent).join(",  ");

function choose(name) {
  chosen = name === chosen ? "" : name;
  svg.classList.toggle("chosen", Boolean(chosen));
  for (const node of nodes) node.setAttribute("aria-pressed", node.dataset.node === chosen);
  const own = edgesOf(chosen);
  for (const path of paths) path.classList.toggle("on", own.includes(path));
  by("readout").textContent = listed(chosen);
  say(chosen ? own.length + " edges of " + chosen + ": " + listed(chosen) : "all edges");
}

// The nearest node in the direction of the key.
const middle = (node) => [Number(node.querySelector("text").getAttribute("x")), Number(node.querySelector("text").getAttribute("y"))];
function towards(node, key) {
  const [x, y] = middle(node), side = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const far = (other) => {
    const [dx, dy] = [middle(other)[0] - x, middle(other)[1] - y], along = dx * side[0] + dy * side[1];
    return along <= 0 || (side[0] && dy) ? Infinity : along + 2 * Math.abs(side[0] ? dy : dx) / 10;
  };
  return nodes.filter((other) => far(other) < Infinity).sort((a, b) => far(a) - far(b))[0];
}

nodes.forEach((node, index) => {
  node.setAttribute("tabindex", index ? "-1" : "0");
  node.addEventListener("click", () => choose(node.dataset.node));
  node.addEventListener("focus", () => say(node.dataset.node + ", " + edgesOf(node.dataset.node).length + " edges"));
  node.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(node.dataset.node);
    } else if (event.key.startsWith("Arrow")) {
      event.preventDefault();
      const next = towards(node, event.key);
      if (!next) return;
      node.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    }
  });
});
for (const path of paths) {
  const text = path.textContent;
  path.addEventListener("pointermove", (event) => showTip(element("p", text), { left: event.clientX, top: event.clientY, bottom: event.clientY + 6 }));
  path.addEventListener("pointerleave", hideTip);
}
