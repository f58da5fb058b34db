"use strict";
// Search and filters of the documents. All texts stand in the page; the script only hides and shows them.
(() => {
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
