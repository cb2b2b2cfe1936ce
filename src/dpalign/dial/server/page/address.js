// The address restores what a reader sees: directions, best of how many answers, question, seed, temperature. It never
// holds a key.

import { angleOf, ofAngle, unit } from "./direction.js";

export function writeAddress({ dial, sides, best, question, settings, defaults }) {
  const found = new URLSearchParams();
  if (dial.objectives.length) {
    for (const side of sides) found.set(side.toLowerCase(), written(dial, side));
  }
  if (sides.length === 1) found.set("sides", "1");
  if (best > 1) found.set("best", best);
  if (question) found.set("q", question);
  const kept = { seed: settings.seed, t: settings.temperature, max: settings.max, system: settings.system.trim() || undefined };
  const usual = { seed: defaults.seed, t: defaults.temperature };
  for (const [name, value] of Object.entries(kept)) {
    if (value !== undefined && value !== usual[name]) found.set(name, value);
  }
  // not location.hash: a turn of the dial must add no step to the history
  history.replaceState(null, "", `#${found}`);
}

function written(dial, side) {
  if (dial.angled) return String(Number(angleOf(dial.weights[side]).toFixed(2)));
  return dial.objectives.map((name, k) => `${name}:${Number(dial.weights[side][k].toFixed(3))}`).join(",");
}

// Take from the address what this model understands; leave everything else as it is.
export function readAddress(dial) {
  const found = new URLSearchParams(location.hash.slice(1));
  const number = (name, least, most = Infinity) => {
    const value = Number(found.get(name));
    return found.get(name) && value >= least && value <= most ? value : undefined;
  };
  return {
    weights: { A: read(dial, found.get("a")), B: read(dial, found.get("b")) },
    sides: number("sides", 1, 2),
    best: number("best", 1),
    question: found.get("q") ?? undefined,
    seed: number("seed", 0),
    temperature: number("t", 0, 2),
    max: number("max", 1),
    system: found.get("system") ?? undefined,
  };
}

function read(dial, text) {
  if (!text || !dial.objectives.length) return undefined;
  if (dial.angled && Number.isFinite(Number(text))) return ofAngle(Number(text));
  const given = Object.fromEntries(text.split(",").map((term) => term.split(":")));
  if (Object.keys(given).some((name) => !dial.objectives.includes(name))) return undefined;
  const weights = dial.objectives.map((name) => Number(given[name] ?? 0));
  return unit(weights) ?? undefined;
}
