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
