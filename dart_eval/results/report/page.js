"use strict";
// Sorting and filtering of the table, copying of commands, and the sample explorer. Names and texts only ever become
// text nodes.
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, kind) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  document.querySelectorAll(".needs-script").forEach((element) => { element.hidden = false; });

  // -- the table
  const table = $("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator("en", { numeric: true });

  const compare = (column) => (a, b) => {
    const x = a.cells[column], y = b.cells[column];
    if (x.dataset.order === undefined) return collator.compare(x.textContent, y.textContent);
    return Number(x.dataset.order) - Number(y.dataset.order);
  };
  const sort = (head, column) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const empty = (row) => row.cells[column].dataset.order === "";
    const by = compare(column);
    const full = rows.filter((row) => !empty(row)).sort((a, b) => (down ? -by(a, b) : by(a, b)));
    body.append(...full, ...rows.filter(empty)); // what is no number stays at the end either way
  };
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(head, column));
  });

  const text = new Map(rows.map((row) => [
    row, [...row.cells].filter((c) => !c.classList.contains("command")).map((c) => c.textContent).join(" ").toLowerCase(),
  ]));
  const filter = () => {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const few = table.classList.contains("few");
    let shown = 0;
    for (const row of rows) {
      const kept = words.every((word) => text.get(row).includes(word));
      row.classList.toggle("filtered", !kept);
      if (kept && !(few && row.classList.contains("member"))) shown += 1;
    }
    $("shown").textContent = shown + (shown === 1 ? " row" : " rows");
  };
  $("filter").addEventListener("input", filter);
  if ($("members")) {
    $("members").addEventListener("change", (event) => {
      table.classList.toggle("few", !event.target.checked);
      filter();
    });
  }
  filter();

  const copy = async (button) => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch { // no clipboard for this page: select the text, so that the keyboard can copy it
      getSelection().selectAllChildren(code);
      button.textContent = "marked: copy it with the keyboard";
    }
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  };
  body.addEventListener("click", (event) => {
    if (event.target.classList.contains("copy")) copy(event.target);
  });

  // -- the explorer
  if (!$("data")) return;
  const data = JSON.parse($("data").textContent);
  const task = $("task"), first = $("first"), second = $("second"), differ = $("differ");
  let documents = [];
  let at = 0;
  data.tasks.forEach((t, i) => task.add(new Option(t.name, i)));

  const choose = () => { // the cells that answered this task; dense and the last one at first, or those chosen before
    const kept = [first.value, second.value];
    const known = new Set(data.tasks[task.value].documents.flatMap((d) => Object.keys(d.answers)));
    const cells = Object.keys(data.cells).filter((c) => known.has(c)).sort((a, b) => a - b);
    [first, second].forEach((select, i) => {
      const name = kept[i] && data.cells[kept[i]];
      select.replaceChildren(...cells.map((c) => new Option(data.cells[c], c)));
      select.value = cells.find((c) => data.cells[c] === name) ?? (i ? cells[cells.length - 1] : cells[0]);
    });
  };
  const differs = (d) => {
    const a = d.answers[first.value], b = d.answers[second.value];
    if (!a || !b) return false;
    if (a.text !== undefined || b.text !== undefined) return a.text !== b.text;
    if (a.chosen !== null || b.chosen !== null) return a.chosen !== b.chosen;
    return JSON.stringify(a.scores) !== JSON.stringify(b.scores);
  };
  const select = () => { // the documents to go through
    documents = data.tasks[task.value].documents.filter((d) => d.answers[first.value] || d.answers[second.value]);
    if (differ.checked) documents = documents.filter(differs);
    at = 0;
    show();
  };
  const number = (x) => (x === null ? "-" : x.toFixed(3).replace("-", "\u2212"));

  const facts = (answer) => {
    const list = make("ul", undefined, "small");
    answer.facts.forEach(([name, value]) => list.append(make("li", name + " " + value)));
    return list;
  };
  const side = (cell, d) => {
    const box = make("div"), answer = d.answers[cell.value];
    box.append(make("h3", data.cells[cell.value]));
    if (!answer) {
      box.append(make("p", "This cell did not answer this document.", "note"));
      return box;
    }
    if (answer.text !== undefined) box.append(make("pre", answer.text === "" ? "(nothing)" : answer.text));
    box.append(facts(answer));
    return box;
  };
  const choices = (d, answers) => { // candidates with the log-likelihoods of both cells
    const scroll = make("div", undefined, "scroll"), made = make("table"), head = make("tr"), rowsOf = make("tbody");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Candidates");
    [["candidate", ""], ["log-likelihood, " + data.cells[first.value], "n"], ["log-likelihood, " + data.cells[second.value], "n"]]
      .forEach(([name, kind]) => {
        const cell = make("th", name, kind);
        cell.scope = "col";
        head.append(cell);
      });
    const count = Math.max(...answers.map((a) => (a && a.scores ? a.scores.length : 0)));
    for (let i = 0; i < count; i += 1) {
      const right = d.target === i, row = make("tr", undefined, right ? "right" : "");
      const name = make("td", d.choices && d.choices[i] !== undefined ? d.choices[i].trim() : "candidate " + (i + 1), "choice");
      if (right) name.append(make("span", "  right answer", "mark"));
      row.append(name);
      answers.forEach((a) => {
        const score = a && a.scores ? a.scores[i] : undefined;
        const cell = make("td", score === undefined ? "-" : number(score), "n");
        if (a && a.chosen === i) cell.prepend(make("span", "chosen ", "mark"));
        row.append(cell);
      });
      rowsOf.append(row);
    }
    const top = make("thead");
    top.append(head);
    made.append(top, rowsOf);
    scroll.append(made);
    return scroll;
  };
  const show = () => {
    const box = $("document"), d = documents[at];
    box.replaceChildren();
    $("previous").disabled = at === 0;
    $("next").disabled = at >= documents.length - 1;
    if (!d) {
      $("position").textContent = differ.checked ? "The two differ nowhere." : "No documents.";
      box.hidden = true;
      return;
    }
    box.hidden = false;
    const which = d.filter ? ", filter " + d.filter : "";
    $("position").textContent = (at + 1) + " of " + documents.length + (differ.checked ? " that differ" : "")
      + " (document " + d.id + which + ")";
    if (d.prompt) {
      box.append(make("h3", "Prompt"), make("pre", d.prompt));
      box.lastChild.tabIndex = 0;
    }
    const answers = [d.answers[first.value], d.answers[second.value]];
    if (answers.some((a) => a && a.scores && a.scores.length > 1)) {
      box.append(make("h3", "Candidates"), choices(d, answers));
    } else if (typeof d.target === "string" && d.target && d.target !== d.prompt) {
      box.append(make("h3", "Reference"), make("pre", d.target));
    }
    const pair = make("div", undefined, "pair");
    pair.append(side(first, d), side(second, d));
    box.append(pair);
  };
  const move = (step) => {
    at = Math.min(documents.length - 1, Math.max(0, at + step));
    show();
  };
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  task.addEventListener("change", () => { choose(); select(); });
  [first, second, differ].forEach((control) => control.addEventListener("change", select));
  choose();
  select();
})();
