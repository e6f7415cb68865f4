"use strict";
// What the page carries in a script element: JSON, packed with gzip where it is large.
const embedded = async (element) => {
  if (!element.hasAttribute("data-gzip")) return JSON.parse(element.textContent);
  const bytes = Uint8Array.from(atob(element.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

// Vega, which a large page carries packed.
let vegaRead = null;
const vega = () => {
  const element = document.querySelector("#vega");
  vegaRead ??= element.hasAttribute("data-gzip") ? embedded(element).then((text) => { document.head.append(make("script", {}, text)); }) : Promise.resolve();
  return vegaRead;
};

// An element with its attributes and what is in it; a text is put in as a text, whatever it holds.
const make = (name, attributes = {}, ...inside) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...inside);
  return element;
};

// A store's column is a list, or one value of all rows.
const valueAt = (column, index) => (Array.isArray(column) ? column[index] : column?.all);
const unfolded = (store) => {
  for (const [name, column] of Object.entries(store.values)) if (column.as) store.values[name] = store.values[column.as];
  return store;
};
let trialsRead = null;
const trials = () => {
  const element = document.querySelector("script.trials");
  trialsRead ??= element ? embedded(element).then(unfolded) : Promise.resolve(null);
  return trialsRead;
};
