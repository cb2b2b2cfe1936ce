// The dial: an arc with a handle for each side over two objectives, sliders over more.
// A direction is kept as weights in the order of the objectives; over two they lie on the circle.

import { at, clamp, degrees, element, number, set, shape, SIDES } from "./draw.js";
import { angleOf, arithmetic, near, ofAngle, senses, unit, within } from "./direction.js";

const RADIUS = 100;
const on = (angle, radius = RADIUS) => [radius * Math.cos((angle * Math.PI) / 180), -radius * Math.sin((angle * Math.PI) / 180)];

export class Dial {
  // contract: what /v1/dial says; changed(settled) is called at every turn, settled once a turn has ended
  constructor(contract, changed) {
    this.objectives = contract.objectives;
    this.arc = contract.arc;
    this.changed = changed;
    this.angled = this.objectives.length === 2;
    this.signs = senses(this.objectives, this.arc);
    this.shown = SIDES;
    this.weights = { A: this.start(0), B: this.start(1) };
    this.readings = {};
    at("dial").hidden = !this.objectives.length;
    if (!this.objectives.length) return;
    if (this.angled) this.buildArc();
    else this.buildSliders();
    for (const side of SIDES) this.buildReading(side);
    this.draw();
  }

  start(place) {
    if (!this.angled) return this.objectives.map((_, k) => (k === place % this.objectives.length ? 1 : 0));
    const [low, high] = this.arc ?? [-45, 0];
    return ofAngle(place ? low : high);
  }

  direction(side) {
    return unit(this.weights[side]);
  }

  angle(side) {
    return angleOf(this.weights[side]);
  }

  // What a request carries.
  preference(side) {
    const v = this.direction(side);
    return Object.fromEntries(this.objectives.map((name, k) => [name, Number(v[k].toFixed(6))]));
  }

  name(side) {
    return this.angled ? degrees(this.angle(side)) : "";
  }

  words(side) {
    const v = this.direction(side);
    return v ? arithmetic(this.objectives, v, this.signs) : "no direction";
  }

  warning(side) {
    if (!this.direction(side)) return "All weights are zero: that is no direction. Weigh at least one objective.";
    if (!this.angled || !this.arc || within(this.angle(side), this.arc)) return "";
    return `Outside the range this model was trained on, ${degrees(this.arc[0])} to ${degrees(this.arc[1])}: its answers there are a guess.`;
  }

  show(sides) {
    this.shown = sides;
    if (this.objectives.length) this.draw();
  }

  turn(side, weights, settled = true) {
    this.weights[side] = weights;
    this.draw();
    this.changed(settled);
  }

  turnTo(side, angle, settled = true) {
    this.turn(side, ofAngle(angle), settled);
  }

  // --- the arc ---

  // The part of the circle that is drawn: the trained range and somewhat more, or all of it where that is not enough.
  view() {
    const [low, high] = this.arc ? [this.arc[0] - 30, this.arc[1] + 30] : [-90, 90];
    const middle = (low + high) / 2;
    const enough = high - low < 300 && this.shown.every((side) => within(this.angle(side), [low, high]));
    return enough ? [low, high] : [middle - 180, middle + 180];
  }

  buildArc() {
    const svg = at("arc");
    svg.removeAttribute("hidden");
    this.face = shape(svg, "g");
    this.grip = shape(svg, "path", { class: "grip" });
    this.handles = {};
    for (const side of SIDES) {
      const handle = shape(svg, "g", { class: `handle ${side}`, role: "slider", tabindex: 0, "aria-label": `Direction ${side}` });
      const arrow = shape(handle, "line", { class: "arrow", x1: 0, y1: 0 });
      const knob = shape(handle, "circle", { class: "knob", r: 7 });
      const letter = shape(handle, "text", { class: "letter", "text-anchor": "middle" }, side);
      const label = shape(handle, "text", { class: "angle" });
      this.handles[side] = { handle, arrow, knob, letter, label };
      handle.addEventListener("keydown", (event) => this.onKey(side, event));
      // the handle in use lies on top; it is the other that moves, for a moved element loses the focus
      handle.addEventListener("focus", () => {
        const other = this.handles[SIDES.find((one) => one !== side)].handle;
        if (handle.nextElementSibling === other) svg.insertBefore(other, handle);
      });
    }
    this.listen(svg);
  }

  listen(svg) {
    let dragged = null;
    const angleAt = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const [low, high] = this.view();
      const angle = near(angleOf([point.x, -point.y]), (low + high) / 2);
      return Math.round(clamp(angle, low, high));
    };
    svg.addEventListener("pointerdown", (event) => {
      if (!event.target.closest(".grip, .handle")) return;
      const angle = angleAt(event);
      const own = SIDES.find((side) => this.handles[side].handle.contains(event.target));
      const away = (side) => Math.abs(near(this.angle(side), angle) - angle);
      dragged = own ?? [...this.shown].sort((a, b) => away(a) - away(b))[0];
      svg.setPointerCapture(event.pointerId);
      this.handles[dragged].handle.focus({ preventScroll: true });
      if (!own) this.turnTo(dragged, angle, false);
      event.preventDefault();
    });
    // a finger on the arc turns, and does not scroll: touch-action does not reach into every browser's SVG
    svg.addEventListener("touchstart", (event) => event.target.closest(".grip, .handle") && event.preventDefault(), { passive: false });
    svg.addEventListener("pointermove", (event) => dragged && this.turnTo(dragged, angleAt(event), false));
    for (const end of ["pointerup", "pointercancel"]) {
      svg.addEventListener(end, () => {
        if (dragged) this.changed(true);
        dragged = null;
      });
    }
  }

  onKey(side, event) {
    const [low, high] = this.arc ?? this.view();
    const step = event.shiftKey ? 5 : 1;
    const here = near(this.angle(side), (low + high) / 2);
    const steps = { ArrowRight: step, ArrowUp: step, PageUp: 10, ArrowLeft: -step, ArrowDown: -step, PageDown: -10 };
    const target = { Home: low, End: high }[event.key] ?? (steps[event.key] && Math.round(here + steps[event.key]));
    if (target === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.turnTo(side, target);
  }

  drawFace([low, high]) {
    const svg = at("arc");
    const curve = (from, to, radius = RADIUS) =>
      Array.from({ length: 73 }, (_, i) => on(from + ((to - from) * i) / 72, radius));
    const path = (points) => points.map((point) => point.map((x) => x.toFixed(2)).join(",")).join(" L");
    const trained = this.arc ?? [low, high];
    const corners = [[0, 0], ...curve(low, high)];
    const [xs, ys] = [0, 1].map((axis) => corners.map((corner) => corner[axis]));
    const box = [Math.min(...xs) - 4, Math.min(...ys) - 14, Math.max(...xs) + 30, Math.max(...ys) + 14];
    if (high - low > 300) box[0] -= 20;
    svg.setAttribute("viewBox", [box[0], box[1], box[2] - box[0], box[3] - box[1]].map((x) => x.toFixed(1)).join(" "));
    this.face.replaceChildren();
    shape(this.face, "path", { class: "wedge", d: `M0,0 L${path(curve(...trained))} Z` });
    shape(this.face, "path", { class: "beyond", d: `M${path(curve(low, high))}` });
    shape(this.face, "path", { class: "track", d: `M${path(curve(...trained))}` });
    for (let angle = Math.ceil(trained[0] / 15) * 15; angle <= trained[1]; angle += 15) {
      const [[x1, y1], [x2, y2]] = [on(angle, RADIUS - 1.3), on(angle, RADIUS - 5)];
      shape(this.face, "line", { class: "tick", x1, y1, x2, y2 });
    }
    shape(this.face, "circle", { class: "hub", cx: 0, cy: 0, r: 2 });
    this.drawAxes(box);
    this.grip.setAttribute("d", `M${path(curve(low, high))}`);
  }

  // What the two ways of the plane mean: the first objective to the right, the second upwards.
  drawAxes(box) {
    const [first, second] = this.objectives;
    shape(this.face, "text", { class: "axis", x: 5, y: -4 }, `${first} \u2192`);
    if (box[1] < -40) shape(this.face, "text", { class: "axis", x: box[0] + 1, y: box[1] + 8 }, `\u2191 more ${second}`);
    if (box[3] > 40) shape(this.face, "text", { class: "axis", x: box[0] + 1, y: box[3] - 3 }, `\u2193 less ${second}`);
  }

  drawHandles([low, high]) {
    const middle = (low + high) / 2;
    const angles = Object.fromEntries(SIDES.map((side) => [side, near(this.angle(side), middle)]));
    const close = this.shown.length === 2 && Math.abs(angles.A - angles.B) < 9;
    for (const side of SIDES) {
      const { handle, arrow, knob, letter, label } = this.handles[side];
      if (this.shown.includes(side)) handle.removeAttribute("hidden");
      else handle.setAttribute("hidden", "");
      const [x, y] = on(angles[side]);
      const [hx, hy] = on(angles[side], RADIUS - 7);
      // labels that would cover each other stand apart, each on its own side
      const apart = close ? (angles[side] > angles[side === "A" ? "B" : "A"] || (angles.A === angles.B && side === "A") ? 5 : -5) : 0;
      const [tx, ty] = on(angles[side] + apart, RADIUS + 11);
      set(arrow, { x2: hx, y2: hy });
      set(knob, { cx: x, cy: y });
      set(letter, { x, y: y + 2.6 });
      set(label, { x: tx, y: ty + 3.2, "text-anchor": tx < -20 ? "end" : "start" });
      label.textContent = degrees(this.angle(side));
      const outside = this.warning(side) ? "; outside the trained range" : "";
      set(handle, {
        "aria-valuemin": low,
        "aria-valuemax": high,
        "aria-valuenow": Number(angles[side].toFixed(1)),
        "aria-valuetext": `${degrees(this.angle(side))}: ${this.words(side)}${outside}`,
      });
    }
  }

  // --- sliders ---

  buildSliders() {
    at("sliders").hidden = false;
    this.inputs = {};
    for (const side of SIDES) {
      const group = element("fieldset", { className: side }, element("legend", {}, side));
      this.inputs[side] = this.objectives.map((name, k) => {
        const input = element("input", { type: "range", min: -1, max: 1, step: 0.01 });
        const value = element("output");
        input.setAttribute("aria-label", `${side}: ${name}`);
        const read = (settled) => {
          const weights = [...this.weights[side]];
          weights[k] = Number(input.value);
          this.turn(side, weights, settled);
        };
        input.addEventListener("input", () => read(false));
        input.addEventListener("change", () => read(true));
        group.append(element("label", {}, element("span", {}, name), input, value));
        return { input, value };
      });
      at("sliders").append(group);
    }
  }

  drawSliders() {
    for (const side of SIDES) {
      const largest = Math.max(1, ...this.weights[side].map(Math.abs));
      this.inputs[side].forEach(({ input, value }, k) => {
        const weight = this.weights[side][k] / largest;
        if (Number(input.value) !== weight) input.value = weight;
        value.textContent = number(weight, 2);
      });
      this.inputs[side][0].input.closest("fieldset").hidden = !this.shown.includes(side);
    }
  }

  // --- in words ---

  buildReading(side) {
    const formula = element("code", { className: "formula" });
    const warning = element("p", { className: "warning" });
    warning.setAttribute("role", "status");
    const row = element("div", { className: "line" }, element("b", { className: "badge" }, side));
    let input = null;
    if (this.angled) {
      input = element("input", { type: "number", step: "any", min: -360, max: 360 });
      input.setAttribute("aria-label", `Direction ${side} in degrees`);
      input.addEventListener("change", () => {
        if (input.value !== "" && Number.isFinite(input.valueAsNumber)) this.turnTo(side, input.valueAsNumber);
        else this.draw();
      });
      row.append(element("span", { className: "entry" }, input, "\u00b0"));
    }
    row.append(formula);
    const whole = element("div", { className: `reading ${side}` }, row, warning);
    at("readings").append(whole);
    this.readings[side] = { whole, formula, warning, input };
  }

  draw() {
    if (this.angled) {
      const view = this.view();
      if (String(view) !== this.drawn) this.drawFace(view);
      this.drawn = String(view);
      this.drawHandles(view);
    } else {
      this.drawSliders();
    }
    for (const side of SIDES) {
      const { whole, formula, warning, input } = this.readings[side];
      whole.hidden = !this.shown.includes(side);
      // it breaks between terms, never within one
      const terms = this.words(side).split(/ (?=[-+] )/);
      formula.replaceChildren(...terms.flatMap((term) => [element("span", {}, term), " "]));
      warning.textContent = this.warning(side);
      warning.hidden = !warning.textContent;
      if (input && document.activeElement !== input) input.value = Number(this.angle(side).toFixed(1)) || 0;
    }
  }
}
