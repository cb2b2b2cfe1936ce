// Making elements, and writing numbers the way the report does. Text enters the page as text, never as HTML.

export const MINUS = "\u2212";
export const SIDES = ["A", "B"];

export const at = (id) => document.getElementById(id);
export const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

export function number(x, digits = 1) {
  if (x === null || x === undefined || Number.isNaN(x)) return "\u2013";
  const text = x.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", MINUS);
}

// -15 as the dial shows it; a tenth only where there is one
export function degrees(angle) {
  const rounded = Math.round(angle * 10) / 10;
  return `${number(rounded, Number.isInteger(rounded) ? 0 : 1)}\u00b0`;
}

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

export function shape(parent, name, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  set(made, attributes);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

export function set(made, attributes) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
}
