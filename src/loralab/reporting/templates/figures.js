// The charts: Vega-Lite specifications with named rows. Each has a legend that filters, and its own controls; a change
// makes its rows anew and draws it again.
const LIGHT = ["#0072b2", "#d55e00", "#00846a", "#b14f89", "#a87400", "#3c8fc4", "#5f6670"];
const DASHES = ["", "7 3", "2 3", "10 3 2 3"];
const SHAPES = ["M-5,0A5,5,0,1,0,5,0A5,5,0,1,0,-5,0Z", "M-4.5,-4.5h9v9h-9Z", "M0,-6L6,0L0,6L-6,0Z", "M0,-5.5L6,5H-6Z"];
const LEGENDS = ["color", "shape", "size", "strokeDash", "strokeWidth"];
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The colours of a file, which is on white, as this page's theme has them.
const themed = (text) => {
  const pairs = LIGHT.map((colour, index) => [colour, colourOf(`--c${index}`)]);
  pairs.push(["#5c6570", colourOf("--soft")], ["#e6e9ed", colourOf("--rule")], ['"stroke":"white"', `"stroke":"${colourOf("--ground")}"`]);
  return pairs.reduce((all, [from, to]) => all.replaceAll(from, to), text);
};

const encodings = (spec) => [spec, ...(spec.layer ?? [])].map((part) => part.encoding).filter(Boolean);

const middle = (values) => {
  const ordered = values.filter(Number.isFinite).sort((a, b) => a - b);
  if (!ordered.length) return null;
  const cut = Math.floor(ordered.length / 100);
  const [low, high] = [ordered[cut], ordered[ordered.length - 1 - cut]];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.02 || 1e-6;
  return [low - margin, high + margin];
};

// Of the curves' store, the same rows as the ones that the file was drawn from, for what is chosen.
const points = (about, line) => line.step.map((step, at) => ({ ...about, step, value: line.value[at], ...(line.low ? { low: line.low[at], high: line.high[at] } : {}) }));
const curveRows = (store, state) => {
  const stored = store.metrics[state.metric];
  const kind = (state.means && stored.means.length) || !stored.seeds.length ? "means" : "seeds";
  const rows = { lines: [], raw: [], bands: [], ends: [] };
  for (const line of stored[kind]) {
    const about = { line: line.line, group: line.group, by: line.by };
    const smooth = line.smooth?.[state.smooth];
    const drawn = points(about, smooth ?? line);
    rows.lines.push(...drawn);
    if (smooth) rows.raw.push(...points(about, line));
    if (line.low) rows.bands.push(...points(about, line));
    if (line.broken) rows.ends.push(drawn[drawn.length - 1]);
  }
  return rows;
};

const scaled = (column, index, divisor) => {
  const value = valueAt(column, index);
  return value === null || value === undefined || value === "" ? null : Number(value) / divisor;
};

const front = (rows, x, y) => {
  if (!x.better || !y.better) return [];
  const [sx, sy] = [x, y].map(({ better }) => (better === "lower" ? 1 : -1));
  const kept = [];
  for (const row of [...rows].sort((a, b) => sx * (a.x - b.x) || sy * (a.y - b.y)))
    if (!kept.length || sy * row.y < sy * kept[kept.length - 1].y) kept.push(row);
  return kept;
};

const exploreRows = async (store, state) => {
  const [x, y] = [store.quantities[state.x], store.quantities[state.y]];
  const rows = [];
  const add = (name, group, at) => {
    const row = { name, group, x: at(state.x, x), y: at(state.y, y) };
    if (row.x !== null && row.y !== null) rows.push(row);
  };
  if (!state.seeds)
    store.means.name.forEach((name, index) => add(name, store.means.group[index], (key, one) => scaled(store.means.values[key], index, one.divisor)));
  else {
    const { values } = await trials();
    for (let index = 0; index < values.arm.length || (!Array.isArray(values.arm) && index < values.trial.length); index++) {
      if (valueAt(values.set, index) !== store.set || valueAt(values.status, index) !== "completed") continue;
      const [arm, size] = [valueAt(values.arm, index), valueAt(values["pack.size"], index) ?? 1];
      add(`${arm}, seed ${valueAt(values.seed, index)}`, store.groups[arm], (key, one) => (one.alone && size > 1 ? null : scaled(values[key], index, one.divisor)));
    }
  }
  return { points: rows };
};

const rowsFor = async (figure, state) => {
  if (figure.kind === "curves") return curveRows(figure.store, state);
  if (figure.kind === "explore") return exploreRows(figure.store, state);
  return figure.spec.datasets;
};

const visible = (figure, state, rows) => {
  const keeps = (row) => figure.legends.every(({ field }) => !(field in row) || !state.hidden[field].has(row[field]));
  return Object.fromEntries(Object.entries(rows).map(([name, all]) => [name, all.filter(keeps)]));
};

// A title in lines of so many letters.
const wrapped = (title, room) => title.split(" ").reduce((lines, word) => {
  const last = lines[lines.length - 1];
  if (last && last.length + word.length < room) lines[lines.length - 1] = `${last} ${word}`;
  else lines.push(word);
  return lines;
}, []);

const specified = async (figure, state, width) => {
  const datasets = visible(figure, state, await rowsFor(figure, state));
  const spec = JSON.parse(themed(JSON.stringify({ ...figure.spec, datasets: {} })));
  spec.datasets = datasets;
  const channel = (name, change) => encodings(spec).forEach((encoding) => encoding[name] && change(encoding[name]));
  if (figure.kind === "curves") {
    const domain = middle([...datasets.lines, ...datasets.raw].map(({ value }) => value).concat(datasets.bands.flatMap(({ low, high }) => [low, high])));
    channel("y", (y) => { y.title = state.metric; if (domain) y.scale.domain = domain; });
  }
  if (figure.kind === "explore") {
    const [x, y] = [figure.store.quantities[state.x], figure.store.quantities[state.y]];
    spec.datasets.front = front(datasets.points, x, y);
    for (const [name, { title }] of [["x", x], ["y", y]]) channel(name, (one) => { one.title = title; });
    for (const encoding of encodings(spec)) encoding.tooltip?.forEach((one) => { one.title = { "x": x.title, "y": y.title }[one.field] ?? one.title; });
  }
  for (const name of figure.axes) {
    if (state.log.has(name)) channel(name, (one) => { one.scale = { type: "log", nice: false, ...(one.scale?.padding ? { padding: one.scale.padding } : {}), ...(one.scale?.domain?.every((end) => end > 0) ? { domain: one.scale.domain } : {}) }; });
  }
  for (const encoding of encodings(spec)) for (const [name, one] of Object.entries(encoding)) if (LEGENDS.includes(name)) one.legend = null;
  const filled = ({ data, encoding }) => // a layer without rows, or without what it draws of them, is left out
    spec.datasets[(data ?? spec.data).name].some((row) => [encoding.x, encoding.y].every((one) => !one?.field || (row[one.field] ?? null) !== null));
  if (spec.layer?.some(filled)) spec.layer = spec.layer.filter(filled);
  channel("x", (x) => { if (x.title) x.title = wrapped(x.title, (width - 20) / 6.8); });
  channel("y", (y) => { if (y.title) y.title = wrapped(y.title, 42); });
  spec.width = "container";
  spec.autosize = { type: "fit-x", contains: "padding" };
  const label = { labelColor: colourOf("--soft"), titleColor: colourOf("--ink") };
  const narrow = width < 500 ? { axisX: { titleAnchor: "end" } } : {};
  const legend = { ...spec.config.legend, ...label };
  spec.config = { ...spec.config, ...narrow, legend, background: "transparent", axis: { ...spec.config.axis, ...label, labelLimit: Math.max(90, Math.min(260, width * 0.4)) } };
  return spec;
};

const symbol = (kind, index) => {
  const box = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "path");
  box.setAttribute("viewBox", kind === "dash" ? "0 -7 28 14" : "-7 -7 14 14");
  box.style.width = kind === "dash" ? "28px" : "14px";
  drawn.setAttribute("d", kind === "dash" ? "M0,0H28" : SHAPES[["both", "shape"].includes(kind) ? index % 4 : 0]);
  if (kind === "dash") drawn.setAttribute("stroke-dasharray", DASHES[index % 4]);
  drawn.setAttribute("class", kind === "dash" ? "plain-line" : kind === "shape" ? "plain" : `c${index % 7}`);
  box.append(drawn);
  return box;
};
const FIXED = [2, 1, 6]; // colours of better, worse, not told apart

const legendOf = (figure, state, redraw) => figure.legends.map(({ field, kind, names }) => {
  const buttons = names.map((name, index) =>
    make("button", { type: "button", "aria-pressed": "true", onclick: (event) => choose(name, event.detail > 1) }, symbol(kind === "fixed" ? "colour" : kind, kind === "fixed" ? FIXED[index] : index), name));
  const choose = (name, alone) => {
    const hidden = state.hidden[field];
    if (alone) names.forEach((other) => (other === name ? hidden.delete(other) : hidden.add(other)));
    else if (!hidden.delete(name)) hidden.add(name);
    if (hidden.size === names.length) hidden.clear(); // nothing left to see: all again
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(!hidden.has(names[index]))));
    redraw();
  };
  return make("div", { class: "legend", title: "click: hide or show; double click: this one alone" }, ...buttons);
});

const check = (text, state, key, redraw) => make("label", {}, make("input", { type: "checkbox", onchange: (event) => {
  if (state[key] instanceof Set) state[key][event.target.checked ? "add" : "delete"](text.axis);
  else state[key] = event.target.checked;
  redraw();
} }), ` ${text.words ?? text}`);

const choice = (words, options, state, key, redraw) => make("label", {}, `${words} `, make("select", { onchange: (event) => { state[key] = event.target.value; redraw(); } },
  ...options.map(([value, text]) => make("option", { value, selected: String(state[key]) === value }, text))));

const controlsOf = (figure, state, redraw) => {
  const made = [];
  if (figure.kind === "curves") {
    const { metrics } = figure.store;
    if (Object.keys(metrics).length > 1) made.push(choice("", Object.keys(metrics).map((name) => [name, name]), state, "metric", redraw));
    made.push(choice("smoothing", [["null", "none"], ["0.8", "0.8"], ["0.95", "0.95"]], state, "smooth", redraw));
    if (Object.values(metrics).some(({ seeds, means }) => seeds.length && means.length)) made.push(check("means and ranges", state, "means", redraw));
  }
  if (figure.kind === "explore") {
    const names = Object.entries(figure.store.quantities).map(([key, { title }]) => [key, title]);
    made.push(choice("across", names, state, "x", redraw), choice("up", names, state, "y", redraw), check("each trial", state, "seeds", redraw));
  }
  for (const axis of figure.axes) made.push(check({ axis, words: figure.axes.length > 1 ? `log ${axis}` : "log axis" }, state, "log", redraw));
  return made;
};

const save = async (view, name, kind) => make("a", { href: await view.toImageURL(kind, 2), download: `${name}.${kind}` }).click();

const setUpFigure = async (element) => {
  const figure = await embedded(element.querySelector("script"));
  const { store } = figure;
  const state = { hidden: {}, log: new Set(), means: false, seeds: false, metric: store.metric, smooth: store.smooth ?? null, x: store.x, y: store.y };
  for (const { field } of figure.legends) state.hidden[field] = new Set();
  const box = element.querySelector(".plot");
  let [view, turn] = [null, 0];
  const draw = async () => {
    const mine = ++turn;
    const spec = await specified(figure, state, box.clientWidth);
    await vega();
    if (mine !== turn) return;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const many = Object.values(spec.datasets).some((rows) => rows.length > 4000);
    const made = await vegaEmbed(box, spec, { actions: false, renderer: many ? "canvas" : "svg", tooltip: { theme: dark ? "dark" : "light" } });
    view?.finalize();
    view = made.view;
    element.view = view;
    element.dataset.drawn = String(turn);
  };
  const saving = ["svg", "png"].map((kind) => make("button", { type: "button", class: "save", onclick: () => save(view, figure.name, kind) }, kind.toUpperCase()));
  const controls = controlsOf(figure, state, draw);
  box.before(...legendOf(figure, state, draw), make("div", { class: "controls" }, ...controls, make("span", { class: "saves" }, ...saving)));
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
};

// Drawn when they come near, so that a long page opens at once.
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting || target.dataset.begun) continue;
    target.dataset.begun = "true";
    setUpFigure(target);
  }
}, { rootMargin: "800px" });
for (const element of document.querySelectorAll("figure[data-figure]")) near.observe(element);
