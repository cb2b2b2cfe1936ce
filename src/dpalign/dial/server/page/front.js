// The model's measured front: mean rewards at each evaluated direction, with A and B on it.

import { at, degrees, number, shape } from "./draw.js";
import { angleOf, near, unit } from "./direction.js";

const [WIDTH, HEIGHT] = [320, 188];
const value = (found) => (found !== null && typeof found === "object" ? found.mean ?? found.value : found);

export class Front {
  constructor(contract) {
    this.objectives = contract.objectives;
    this.angled = this.objectives.length === 2;
    this.points = (contract.front ?? [])
      .map((point) => ({
        v: unit(this.objectives.map((name) => point.direction[name] ?? 0)),
        at: this.objectives.map((name) => value(point.rewards[name])),
      }))
      .filter((point) => point.v && point.at.every(Number.isFinite));
    if (this.angled) this.points.sort((a, b) => angleOf(b.v) - angleOf(a.v));
    this.known = this.points.length > 1 && this.objectives.length > 1;
    at("front").hidden = !this.known;
  }

  // A direction's place: between its measured neighbours, or at the nearest one; null outside the measured range.
  place(v) {
    if (!this.angled) {
      const closeness = this.points.map((point) => point.v.reduce((sum, w, k) => sum + w * v[k], 0));
      return this.points[closeness.indexOf(Math.max(...closeness))].at;
    }
    const angles = this.points.map((point) => angleOf(point.v));
    const here = near(angleOf(v), (angles[0] + angles[angles.length - 1]) / 2);
    for (let i = 1; i < angles.length; i++) {
      if (here > angles[i - 1] + 0.05 || here < angles[i] - 0.05) continue;
      const part = angles[i - 1] === angles[i] ? 0 : (angles[i - 1] - here) / (angles[i - 1] - angles[i]);
      return [0, 1].map((axis) => this.points[i - 1].at[axis] + part * (this.points[i].at[axis] - this.points[i - 1].at[axis]));
    }
    return null;
  }

  draw(dial) {
    if (!this.known) return;
    const svg = at("front-plot");
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    const [x, y] = this.scales(svg);
    const pen = (points) => points.map(([first, second], i) => `${i ? "L" : "M"}${x(second).toFixed(1)},${y(first).toFixed(1)}`).join("");
    // directions have neighbours only along an arc
    if (this.angled) shape(svg, "path", { class: "curve", d: pen(this.points.map((point) => point.at)) });
    for (const point of this.points) {
      const dot = shape(svg, "circle", { class: "measured", cx: x(point.at[1]), cy: y(point.at[0]), r: 2.6 });
      const name = this.angled ? `${degrees(angleOf(point.v))}: ` : "";
      shape(dot, "title", {}, name + this.objectives.map((what, k) => `${what} ${number(point.at[k])}`).join(", "));
    }
    const said = [];
    const off = [];
    for (const side of [...dial.shown].reverse()) {
      const v = dial.direction(side);
      const place = v && this.place(v);
      if (!place) {
        off.push(side);
        continue;
      }
      shape(svg, "circle", { class: `stand ${side}`, cx: x(place[1]), cy: y(place[0]), r: 7.5 });
      shape(svg, "text", { class: "letter", x: x(place[1]), y: y(place[0]) + 3.4, "text-anchor": "middle" }, side);
      said.unshift(`${side}: ${this.objectives.map((what, k) => `${what} ${number(place[k])}`).join(", ")}`);
    }
    svg.setAttribute("aria-label", `Mean rewards at every direction that was measured. ${said.join("; ")}`);
    at("front-note").textContent = off.length ? `${off.reverse().join(" and ")} not measured there` : "mean rewards, measured";
  }

  scales(svg) {
    const [left, right, top, bottom] = [34, WIDTH - 14, 22, HEIGHT - 34];
    const scale = (axis, from, to) => {
      const values = this.points.map((point) => point.at[axis]);
      const [least, most] = [Math.min(...values), Math.max(...values)];
      const margin = Math.max(0.5, (most - least) * 0.1);
      const [low, high] = [least - margin, most + margin];
      return [(value) => from + ((value - low) / (high - low)) * (to - from), steps(low, high)];
    };
    const [y, rows] = scale(0, bottom, top);
    const [x, columns] = scale(1, left, right);
    for (const row of rows) {
      shape(svg, "line", { class: "grid", x1: left, x2: right, y1: y(row), y2: y(row) });
      shape(svg, "text", { class: "label", x: left - 6, y: y(row) + 3.5, "text-anchor": "end" }, number(row, 0));
    }
    for (const column of columns) {
      shape(svg, "text", { class: "label", x: x(column), y: bottom + 15, "text-anchor": "middle" }, number(column, 0));
    }
    shape(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    shape(svg, "text", { class: "label", x: right, y: HEIGHT - 4, "text-anchor": "end" }, `${this.objectives[1]} \u2192`);
    shape(svg, "text", { class: "label", x: 2, y: 11 }, `\u2191 ${this.objectives[0]}`);
    return [x, y];
  }
}

// Round numbers between two others.
function steps(low, high) {
  const rough = (high - low) / 5;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * size).find((one) => one >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}
