"use strict";
// The filter of answers, as the board's links have it: `#task=...&row=...&differ=1`. All texts stand in the page.
const form = document.querySelector("form");
const wanted = () => new URLSearchParams(location.hash.slice(1));
let filtered = false;
const show = () => {
  const [tasks, row, differ] = [wanted().getAll("task"), wanted().get("row") ?? "", wanted().has("differ")];
  const before = filtered;
  filtered = tasks.length > 0 || row !== "" || differ;
  if (!filtered && !before) return;
  for (const task of document.querySelectorAll(".task")) {
    const asked = !tasks.length || tasks.includes(task.dataset.task);
    for (const question of task.querySelectorAll(".document")) {
      const answers = [...question.querySelectorAll("tr")];
      const chosen = answers.filter((answer) => !row || answer.dataset.row === row);
      for (const answer of answers) answer.hidden = !chosen.includes(answer) && !answer.classList.contains("dense");
      question.hidden = !asked || !chosen.some((answer) => !differ || answer.classList.contains("differs"));
      question.open = !question.hidden && row !== "";
    }
    task.hidden = !task.querySelector(".document:not([hidden])");
    task.open = filtered && !task.hidden;
  }
  [form.row.value, form.differ.checked] = [row, differ];
  const left = document.querySelectorAll(".document:not([hidden])").length;
  form.querySelector("output").textContent = filtered ? `${left} documents of ${tasks.join(", ") || "all tasks"}` : "";
  if (tasks.length) document.querySelector("#answers").scrollIntoView();
};
form.hidden = false;
form.addEventListener("change", () => {
  const next = wanted().getAll("task").map((task) => ["task", task]);
  if (form.row.value) next.push(["row", form.row.value]);
  if (form.differ.checked) next.push(["differ", "1"]);
  location.hash = next.length ? new URLSearchParams(next) : "answers";
});
form.addEventListener("reset", () => { location.hash = "answers"; });
addEventListener("hashchange", show);
show();
