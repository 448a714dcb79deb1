"use strict";
// A chosen node shows its edges alone and lists them.
const svg = document.querySelector("svg"), nodes = [...svg.querySelectorAll("g")], paths = [...svg.querySelectorAll("path")];
let chosen = "";

function choose(name) {
  chosen = name === chosen ? "" : name;
  svg.classList.toggle("chosen", Boolean(chosen));
  for (const node of nodes) node.setAttribute("aria-pressed", node.dataset.node === chosen);
  const own = paths.filter((path) => [path.dataset.from, path.dataset.to].includes(chosen));
  for (const path of paths) path.classList.toggle("on", own.includes(path));
  document.getElementById("readout").textContent = own.map((path) => path.textContent).reverse().join(",  ");
}

for (const node of nodes) {
  node.addEventListener("click", () => choose(node.dataset.node));
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(node.dataset.node);
  });
}
