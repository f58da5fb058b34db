// Tables with numbers sort, as those of the report do (`sort.js`).
for (const table of document.querySelectorAll("article table:not([class])")) {
  const rows = [...table.rows];
  const heads = [...rows[0].cells];
  heads.forEach((head, column) => {
    const numbers = rows.some((row) => /^[-+\u2212<]?\s*[.\d]/.test(row.cells[column].textContent));
    head.classList.toggle("n", numbers);
    if (head.textContent === "method") rows.forEach((row) => row.cells[column].classList.add("pinned"));
  });
  if (heads.some((head) => head.classList.contains("n"))) sortable(table);
}
