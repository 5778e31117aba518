"use strict";
// What the drawings share. Everything from the results becomes text or an attribute, never markup.

const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const present = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 3) => (present(value) ? value.toFixed(digits).replace("-", "−") : "–");
const signed = (value, digits = 3) => (value > 0 ? "+" : "") + fixed(value, digits);

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function html(parent, name, attributes = {}, ...children) {
  const element = set(document.createElement(name), attributes);
  element.append(...children);
  parent?.append(element);
  return element;
}

function svg(parent, name, attributes = {}, ...children) {
  const element = set(document.createElementNS("http://www.w3.org/2000/svg", name), attributes);
  element.append(...children);
  parent?.append(element);
  return element;
}

// An emptied drawing of that size.
function canvas(chart, width, height) {
  chart.replaceChildren();
  return set(chart, { width, height, viewBox: `0 0 ${width} ${height}` });
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => html(null, "option", { value }, text)));
  select.value = chosen;
}

function budgetName(fraction) {
  for (let below = 1; below <= 64; below *= 2) {
    const above = Math.round(fraction * below);
    if (Math.abs(fraction * below - above) < 1e-9) return below === 1 ? `${above}` : `${above}/${below}`;
  }
  return `${(100 * fraction).toPrecision(2)} %`;
}

// Calls redraw when an element's width changes, as when its tab is shown.
function onWidth(element, redraw) {
  let width = 0;
  new ResizeObserver(() => {
    if (!element.clientWidth || element.clientWidth === width) return;
    width = element.clientWidth;
    redraw();
  }).observe(element);
}
