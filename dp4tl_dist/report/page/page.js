"use strict";
// Theme: what the system prefers, until the switch is used. Storage is closed to some local files.
const root = document.documentElement;
const stored = () => { try { return localStorage.getItem("dp4tl-theme"); } catch { return null; } };
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("dp4tl-theme", root.dataset.theme); } catch { /* the choice lasts as long as the page */ }
});

// Sorting: numbers by value, text by the reader's alphabet, what is pending always last.
for (const button of document.querySelectorAll("button.sort")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.v;
  const compare = head.classList.contains("num")
    ? (a, b) => Number(value(a)) - Number(value(b))
    : (a, b) => value(a).localeCompare(value(b));
  const rows = [...table.tBodies[0].rows];
  const known = rows.filter((row) => value(row) !== "").sort((a, b) => (up ? 1 : -1) * compare(a, b));
  table.tBodies[0].append(...known, ...rows.filter((row) => value(row) === ""));
});

const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// CSV: full values, quoted; text that a spreadsheet would run as a formula is kept text by an apostrophe.
const cell = (text, isText) => `"${(isText && /^[=+\-@\t\r]/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`;
for (const button of document.querySelectorAll("button.csv")) button.addEventListener("click", () => {
  const table = document.querySelector(`table[data-name="${CSS.escape(button.dataset.for)}"]`);
  const heads = [...table.tHead.rows[0].cells];
  const lines = [heads.map((head) => cell(head.textContent, true))];
  for (const row of table.tBodies[0].rows)
    lines.push([...row.cells].map((td, i) => cell(td.dataset.v, !heads[i].classList.contains("num"))));
  save(`${button.dataset.for}.csv`, "text/csv", lines.map((line) => line.join(",")).join("\r\n") + "\r\n");
});
for (const button of document.querySelectorAll("button.save")) button.addEventListener("click", () => {
  save(`${button.dataset.for}.json`, "application/json", document.getElementById(button.dataset.for).textContent + "\n");
});

// A link into something folded unfolds it.
const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target && target.parentElement; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", unfold);
unfold();
// On paper nothing can be unfolded: words are, and tables are left out.
addEventListener("beforeprint", () => {
  for (const item of document.querySelectorAll("figure details")) item.open = false;
  for (const item of document.querySelectorAll("details.words")) item.open = true;
});
