"use strict";
// Columns that sort, and search and filters of the documents. All texts stand in the page; the script only orders, hides
// and shows them.
(() => {
  const number = (text) => { const found = text.match(/[-+]?[\d.]+(e[-+]?\d+)?/); return found ? +found[0] : null; };
  for (const table of document.querySelectorAll("table.sortable")) {
    const [heads, body] = [[...table.tHead.rows[0].cells], table.tBodies[0]];
    const rows = [...body.rows];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.ariaSort === "ascending";
        heads.forEach((other) => { other.ariaSort = null; });
        head.ariaSort = down ? "descending" : "ascending";
        const text = (row) => row.cells[column].textContent;
        const order = (a, b) => {
          const [x, y] = column ? [number(text(a)), number(text(b))] : [text(a), text(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
        };
        body.append(...rows.toSorted(order));
      });
    });
  }
})();
(() => {
  if (!document.getElementById("controls")) return;
  const [controls, search, methods, differ, shown] = ["controls", "search", "methods", "differ", "shown"]
    .map((id) => document.getElementById(id));
  const tasks = [...document.querySelectorAll(".task")].map((task) => ({
    task,
    documents: [...task.querySelectorAll(".document")].map((element) => ({
      element,
      text: element.textContent.toLowerCase(),
      answers: [...element.querySelectorAll(".answer")].map((answer) => ({
        answer, method: answer.dataset.method.toLowerCase(), said: answer.querySelector(".said").textContent,
      })),
    })),
  }));
  const words = (input) => input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const filter = () => {
    const [wanted, names] = [words(search), words(methods)];
    let [all, left] = [0, 0];
    for (const { task, documents } of tasks) {
      let here = 0;
      for (const { element, text, answers } of documents) {
        const said = new Set();
        for (const a of answers) {
          a.answer.hidden = !names.every((word) => a.method.includes(word));
          if (!a.answer.hidden) said.add(a.said);
        }
        element.hidden = said.size < (differ.checked ? 2 : 1) || !wanted.every((word) => text.includes(word));
        here += element.hidden ? 0 : 1;
      }
      task.hidden = here === 0;
      if (here && (wanted.length || differ.checked)) task.open = true;
      all += documents.length;
      left += here;
    }
    shown.textContent = `${left} of ${all} documents`;
  };
  controls.hidden = false;
  [search, methods, differ].forEach((control) => control.addEventListener("input", filter));
  filter();
})();
