// Filters, columns that sort (`sort.js`) and values of points. All texts stand in the page; the script only orders, hides and
// shows them.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

all("table.sortable").forEach(sortable);

// -- filters: methods and bytes read everywhere, words and differences among the documents ----------------------------
const form = one("#filter");
const [boxes, level] = [all("input", form), one("#filter select")];
const [search, differ] = [one("#search"), one("#differ")];
const marked = all("main [data-method], main [data-read]").map((element) => ({
  element,
  method: element.closest("[data-method]")?.dataset.method,
  read: element.dataset.read,
}));
const reads = [...level.options].map((option) => option.value).filter(Boolean);
const nearest = (read) => reads.reduce((a, b) => (Math.abs(b - read) < Math.abs(a - read) ? b : a));
const tasks = all(".task").map((task) => ({
  task,
  documents: all(".document", task).map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
    replies: all(".reply", element).map((reply) => ({ reply, said: reply.querySelector(".said").textContent })),
  })),
}));
const filter = () => {
  const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  for (const { element, method, read } of marked) {
    const other = wanted.size > 0 && method !== undefined && !wanted.has(method);
    element.toggleAttribute("hidden", other || (level.value !== "" && read !== undefined && nearest(read) !== level.value));
  }
  for (const line of all(".line")) { // a line without all of its points would lead elsewhere
    const [dots, left] = [all(".dot", line), all(".dot:not([hidden])", line)];
    for (const path of all(".join", line)) path.toggleAttribute("hidden", left.length < dots.length);
    for (const path of all(".thread", line)) path.toggleAttribute("hidden", dots.at(-1) !== left.at(-1));
    line.toggleAttribute("hidden", line.hasAttribute("hidden") || !left.length);
  }
  for (const chart of all(".chart")) chart.hidden = !chart.querySelector(".line:not([hidden])");
  one("#filter button").hidden = !wanted.size && !level.value;
  one("#filter summary span").textContent = wanted.size ? [...wanted].join(", ") : "all";
  if (search) documents();
};
const documents = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let [count, left] = [0, 0];
  for (const { task, documents } of tasks) {
    let here = 0;
    for (const { element, text, replies } of documents) {
      const said = new Set(replies.filter(({ reply }) => !reply.hidden).map((reply) => reply.said));
      element.hidden = said.size < (differ.checked ? 2 : 1) || !words.every((word) => text.includes(word));
      here += element.hidden ? 0 : 1;
    }
    task.hidden = here === 0;
    if (here && (words.length || differ.checked)) task.open = true;
    count += documents.length;
    left += here;
  }
  one("#shown").textContent = `${left} of ${count} documents`;
};
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
document.addEventListener("click", (event) => { if (!form.contains(event.target)) one("#filter details").open = false; });
if (search) {
  one("#controls").hidden = false;
  [search, differ].forEach((control) => control.addEventListener("input", documents));
}

// -- values of points: under the mouse, by touch, and with the arrow keys ---------------------------------------------
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
let here = null;
const show = (dot) => {
  here?.classList.remove("here");
  here = dot;
  tip.hidden = !dot;
  if (!dot) return;
  dot.classList.add("here");
  tip.textContent = dot.getAttribute("aria-label");
  const [at, box] = [dot.lastElementChild.getBoundingClientRect(), tip.getBoundingClientRect()];
  tip.style.left = `${Math.max(4, Math.min(at.left - box.width / 2, document.documentElement.clientWidth - box.width - 4))}px`;
  tip.style.top = `${at.top - box.height - 8 < 0 ? at.bottom + 8 : at.top - box.height - 8}px`;
};
const REACH = 24; // pixels
for (const drawing of all(".chart")) {
  const dots = () => all(".dot", drawing).filter((dot) => !dot.closest("[hidden]"));
  drawing.querySelector(".dot")?.setAttribute("tabindex", "0");
  const near = (event) => {
    const found = dots().map((dot) => {
      const box = dot.lastElementChild.getBoundingClientRect();
      return [Math.hypot((box.left + box.right) / 2 - event.clientX, (box.top + box.bottom) / 2 - event.clientY), dot];
    }).sort(([a], [b]) => a - b)[0];
    show(found && found[0] < REACH ? found[1] : null);
  };
  ["pointermove", "pointerdown"].forEach((name) => drawing.addEventListener(name, near));
  drawing.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(null); });
  drawing.addEventListener("focusin", (event) => show(event.target.closest(".dot")));
  drawing.addEventListener("focusout", () => show(null));
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step && dots()[dots().indexOf(event.target) + step];
    if (step) event.preventDefault();
    next?.focus();
  });
}
addEventListener("scroll", () => show(null), { passive: true });
addEventListener("pointerdown", (event) => { if (!event.target.closest(".chart")) show(null); });

filter();
