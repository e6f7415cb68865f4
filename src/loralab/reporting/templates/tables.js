// Tables that sort by a click on a head and filter by the row of fields below it. A field takes a text that a cell
// must hold, or a comparison: > 4, <= 0.5, = nf4, != 8.
const PAGE = 200; // rows shown at first

const compare = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  const numeric = a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y);
  return numeric ? x - y : String(a).localeCompare(String(b));
};

const passes = (wanted, key, text) => {
  const [, sign, rest] = wanted.trim().match(/^(<=|>=|!=|<|>|=)?\s*(.*)$/s);
  if (!rest) return true;
  if (!sign) return text.toLowerCase().includes(rest.toLowerCase());
  if (key === "") return sign === "!=";
  const number = Number(rest);
  if (sign === "=" || sign === "!=") {
    const same = text === rest || String(key) === rest || (!Number.isNaN(number) && Number(key) === number);
    return same === (sign === "=");
  }
  const [x, y] = [Number(key), number];
  if (Number.isNaN(x) || Number.isNaN(y)) return false;
  return { "<": x < y, ">": x > y, "<=": x <= y, ">=": x >= y }[sign];
};

// rows: [{keys, texts, element()}]; heads: the cells of the head's row
const sortable = (table, rows, heads, told) => {
  const body = table.tBodies[0];
  const state = { column: null, sign: 0, filters: heads.map(() => ""), all: false };

  const chosen = () => {
    const kept = rows.filter((row) => state.filters.every((wanted, at) => passes(wanted, row.keys[at], row.texts[at])));
    if (!state.sign) return kept;
    return kept.sort((one, other) => {
      const [a, b] = [one.keys[state.column], other.keys[state.column]];
      if (a === "" || b === "") return (a === "") - (b === ""); // without a value: last, whichever way the others go
      return state.sign * compare(a, b);
    });
  };

  const show = () => {
    const kept = chosen();
    const visible = state.all ? kept : kept.slice(0, PAGE);
    body.replaceChildren(...visible.map((row) => row.element()));
    if (!told) return;
    told.replaceChildren(`${kept.length} of ${rows.length} rows`);
    if (visible.length === kept.length) return;
    const more = make("button", { type: "button", onclick: () => { state.all = true; show(); } }, "show all");
    told.append(`, the first ${visible.length} shown `, more);
  };

  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const next = state.column !== column ? 1 : { 1: -1, "-1": 0, 0: 1 }[state.sign];
      for (const other of heads) other.removeAttribute("aria-sort");
      [state.column, state.sign] = [column, next];
      if (next) head.setAttribute("aria-sort", next > 0 ? "ascending" : "descending");
      show();
    });
  });

  const filter = (column, text) => { state.filters[column] = text; show(); };
  return { show, filter };
};

const filterRow = (heads, filter) =>
  make("tr", { class: "filters" }, ...heads.map((head, column) =>
    make("th", {}, head.querySelector("button")
      ? make("input", { type: "search", size: 1, "aria-label": `filter ${head.textContent.trim()}`, oninput: (event) => filter(column, event.target.value) })
      : "")));

const ofElement = (row) => ({
  keys: [...row.cells].map((cell) => cell.dataset.sort ?? cell.textContent.trim()),
  texts: [...row.cells].map((cell) => cell.textContent.trim()),
  element: () => row,
});

const rowsOf = async (table) => {
  const further = table.parentElement.parentElement.querySelector("script.rows");
  const rows = [...table.tBodies[0].rows].map(ofElement);
  if (!further) return rows;
  const body = make("tbody");
  body.innerHTML = (await embedded(further)).join(""); // rows that the page's templates made, as those above them
  return [...rows, ...[...body.rows].map(ofElement)];
};

const setUp = async (table) => {
  const heads = [...table.tHead.rows[0].cells];
  const rows = await rowsOf(table);
  const told = rows.length > 8 ? make("p", { class: "note count" }) : null;
  const { show, filter } = sortable(table, rows, heads, told);
  if (!told) return;
  table.tHead.append(filterRow(heads, filter));
  table.parentElement.after(told);
  show();
};

// All trials: the table's columns are those of the store that it shows, and those that its reader adds.
const details = (store, index, width) => {
  const terms = store.columns.map(({ key, title }) => [title, valueAt(store.values[key], index)]).filter(([, value]) => value !== null && value !== "");
  const folder = valueAt(store.values.path, index) || `../${valueAt(store.values.folder, index)}`;
  const links = (valueAt(store.values.files, index) ?? []).map((name) => make("a", { href: [...folder.split("/"), name].map(encodeURIComponent).join("/") }, name));
  const rerun = valueAt(store.values.rerun, index);
  return make("tr", { class: "detail" }, make("td", { colspan: width },
    make("p", {}, ...links.flatMap((link) => [link, " "])),
    ...(rerun ? [make("p", {}, "run it again: ", make("code", {}, rerun))] : []),
    make("dl", {}, ...terms.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, String(value))]))));
};

const shownAs = (value, number) => {
  if (value === null || value === undefined || value === "") return "-";
  return number && !Number.isInteger(Number(value)) ? Number(Number(value).toPrecision(6)).toString() : String(value);
};

const trialRow = (store, columns, index) => {
  const keys = columns.map(({ key }) => valueAt(store.values[key], index) ?? "");
  const texts = columns.map(({ number }, at) => shownAs(keys[at], number));
  let made = null;
  const element = () => {
    if (made) return made;
    const open = make("button", { type: "button", class: "open", "aria-expanded": "false", "aria-label": "all of this trial", onclick: () => {
      const after = made.nextElementSibling;
      if (after?.className === "detail") after.remove();
      else made.after(details(store, index, columns.length + 1));
      open.setAttribute("aria-expanded", String(after?.className !== "detail"));
    } }, "+");
    const cells = columns.map(({ number }, at) => make("td", { class: number ? "" : "key" }, texts[at]));
    made = make("tr", {}, make("td", { class: "key" }, open), ...cells);
    return made;
  };
  return { keys: ["", ...keys], texts: ["", ...texts], element };
};

const trialTable = (place, store, columns) => {
  const count = Math.max(...Object.values(store.values).map((column) => (Array.isArray(column) ? column.length : 1)));
  const head = (text, key) => make("th", { class: key ? "key" : "" }, make("button", { type: "button" }, text));
  const heads = [make("th", { "aria-label": "more" }), ...columns.map(({ title, number }) => head(title, !number))];
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody"));
  const told = make("p", { class: "note count" });
  const rows = Array.from({ length: count }, (_, index) => trialRow(store, columns, index));
  const { show, filter } = sortable(table, rows, heads, told);
  table.tHead.append(filterRow(heads, filter));
  place.replaceChildren(make("div", { class: "scroll" }, table), told);
  show();
  tell();
};

const setUpTrials = async () => {
  const place = document.querySelector(".trials-table");
  if (!place) return;
  const store = await trials();
  const columns = store.columns.filter(({ shown }) => shown);
  const further = store.columns.filter(({ shown }) => !shown);
  const choice = make("select", { "aria-label": "add a column" }, make("option", { value: "" }, "add a column"), ...further.map(({ title }, at) => make("option", { value: at }, title)));
  choice.addEventListener("change", () => {
    const added = further[choice.value];
    if (added && !columns.includes(added)) columns.push(added);
    choice.value = "";
    trialTable(place.querySelector("div"), store, columns);
  });
  const inside = make("div");
  place.replaceChildren(make("div", { class: "controls" }, choice), inside);
  trialTable(inside, store, columns);
};

for (const table of document.querySelectorAll("table.sortable")) setUp(table);
const folded = document.querySelector("details.all-trials");
folded?.addEventListener("toggle", setUpTrials, { once: true });
if (folded?.open) setUpTrials();

// A table that is wider than the page says so above it.
const tell = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const wide = box.scrollWidth > box.clientWidth + 1;
    const before = box.previousElementSibling;
    const told = before !== null && before.className === "more";
    if (wide && !told) box.before(make("p", { class: "more" }, "more columns to the right: scroll the table \u2192"));
    else if (!wide && told) before.remove();
  }
};
tell();
addEventListener("resize", tell);
for (const box of document.querySelectorAll("details")) box.addEventListener("toggle", tell);
