// Tables with numbers sort by a click on the head of a column: up, then down. Cells sort by their first number.
"use strict";
const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const number = (text) => {
  const parts = text.replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1").match(/([-+]?\d*\.?\d+(?:e[-+]?\d+)?)\s?([kMGT](?=B?\b))?/);
  return parts ? parts[1] * (UNITS[parts[2]] ?? 1) : Infinity;
};
for (const table of document.querySelectorAll("article table:not([class])")) {
  const rows = [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const text = (row) => row.cells[column].textContent.trim();
    const numbers = rows.some((row) => /^[-+\u2212<]?\s*[.\d]/.test(text(row)));
    [head, ...rows.map((row) => row.cells[column])].forEach((cell) => {
      cell.classList.toggle("n", numbers);
      cell.classList.toggle("pinned", head.textContent === "method");
    });
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const last = (row) => numbers && number(text(row)) === Infinity; // in either order
      const compare = (a, b) => (numbers ? number(text(a)) - number(text(b)) || 0 : text(a).localeCompare(text(b)));
      table.tBodies[0].append(...rows.sort((a, b) => last(a) - last(b) || order * compare(a, b)));
    });
  });
}
