"use strict";
// The filter of answers, as the board's links have it: `#task=...&row=...&differ=1`. All texts stand in the page.
const form = document.querySelector("form");
const wanted = () => new URLSearchParams(location.hash.slice(1));
const show = () => {
  const [tasks, row, differ] = [wanted().getAll("task"), wanted().get("row") ?? "", wanted().has("differ")];
  const filtered = tasks.length > 0 || row !== "" || differ;
  for (const task of document.querySelectorAll(".task")) {
    const asked = !tasks.length || tasks.includes(task.dataset.task);
    for (const question of task.querySelectorAll(".document")) {
      const answers = [...question.querySelectorAll("tr")];
      const chosen = answers.filter((answer) => !row || answer.dataset.row === row);
      for (const answer of answers) answer.hidden = !chosen.includes(answer) && !answer.classList.contains("dense");
      question.hidden = !asked || !chosen.some((answer) => !differ || answer.classList.contains("differs"));
      question.open ||= row !== "";
    }
    task.hidden = !task.querySelector(".document:not([hidden])");
    task.open ||= filtered;
  }
  [form.row.value, form.differ.checked] = [row, differ];
  const left = `${document.querySelectorAll(".document:not([hidden])").length} documents of `;
  form.querySelector("output").textContent = filtered ? left + (tasks.join(", ") || "all tasks") : "";
  if (tasks.length) document.querySelector("#answers").scrollIntoView();
};
form.hidden = false;
form.addEventListener("change", () => {
  const next = [...wanted().getAll("task").map((task) => ["task", task]), ["row", form.row.value]];
  location.hash = new URLSearchParams(form.differ.checked ? [...next, ["differ", "1"]] : next);
});
form.addEventListener("reset", () => { location.hash = "answers"; });
addEventListener("hashchange", show);
show();
