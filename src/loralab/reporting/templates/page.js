"use strict";
// Sort a table by a column: the first click ascends, the second descends, the third restores the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  const keyOf = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    const numeric = a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y);
    return numeric ? x - y : a.localeCompare(b);
  };

  // Rows without a value stay last, whichever way the others go.
  const ordered = (column, sign) =>
    original.slice().sort((one, other) => {
      const [a, b] = [keyOf(one, column), keyOf(other, column)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * compare(a, b);
    });

  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      for (const other of heads) other.removeAttribute("aria-sort");
      const next = now === null ? "ascending" : now === "ascending" ? "descending" : null;
      if (next) head.setAttribute("aria-sort", next);
      const rows = next ? ordered(column, next === "ascending" ? 1 : -1) : original;
      body.append(...rows);
    });
  });
}

// A table that is wider than the page says so above it.
const tell = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const wide = box.scrollWidth > box.clientWidth + 1;
    const before = box.previousElementSibling;
    const told = before !== null && before.className === "more";
    if (wide && !told) {
      const words = document.createElement("p");
      words.className = "more";
      words.textContent = "more columns to the right: scroll the table \u2192";
      box.before(words);
    } else if (!wide && told) before.remove();
  }
};
tell();
addEventListener("resize", tell);
for (const folded of document.querySelectorAll("details")) folded.addEventListener("toggle", tell);
