"use strict";
// Columns that sort: up, down, as it was. Columns whose head has the class `n` sort by their first number.
const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const number = (text) => {
  const found = text.replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1").match(/([-+]?\d*\.?\d+(?:e[-+]?\d+)?)\s?([kMGT](?=B?\b))?/);
  return found ? found[1] * (UNITS[found[2]] ?? 1) : null;
};
const sorts = new Map(); // table -> its rows as they were, and how it is sorted
const sort = (table, column, order) => {
  const heads = [...table.tHead.rows[0].cells];
  if (!heads[column]) return;
  const { rows } = sorts.get(table);
  sorts.set(table, { rows, column, order });
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  if (order) heads[column].setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
  const keyed = rows.map((row) => [row, row.cells[column].textContent.trim()]);
  const numbers = heads[column].classList.contains("n");
  const key = (text) => (!numbers ? text.toLowerCase() : number(text));
  const compare = ([, a], [, b]) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * order;
  };
  table.tBodies[0].append(...(order ? keyed.sort(compare) : keyed).map(([row]) => row));
};
const sortable = (table) => {
  sorts.set(table, { rows: [...table.tBodies[0].rows], column: 0, order: 0 });
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = sorts.get(table);
      sort(table, column, now.column !== column ? 1 : { 0: 1, 1: -1, [-1]: 0 }[now.order]);
    });
  });
};
