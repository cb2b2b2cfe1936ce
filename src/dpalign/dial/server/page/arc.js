// The arc: the directions of two objectives on a circle, with a handle for each side.

import { at, clamp, degrees, set, shape, SIDES } from "./draw.js";
import { angleOf, near, within } from "./direction.js";

const RADIUS = 100;
const on = (angle, radius = RADIUS) => [radius * Math.cos((angle * Math.PI) / 180), -radius * Math.sin((angle * Math.PI) / 180)];
const curve = (from, to, radius = RADIUS) => Array.from({ length: 73 }, (_, i) => on(from + ((to - from) * i) / 72, radius));
const path = (points) => points.map((point) => point.map((x) => x.toFixed(2)).join(",")).join(" L");

export class Arc {
  constructor(dial) {
    this.dial = dial;
    const svg = at("arc");
    svg.removeAttribute("hidden");
    this.face = shape(svg, "g");
    this.grip = shape(svg, "path", { class: "grip" });
    this.own = shape(svg, "g");
    this.handles = {};
    for (const side of SIDES) {
      const handle = shape(svg, "g", { class: `handle ${side}`, role: "slider", tabindex: 0, "aria-label": `Direction ${side}` });
      const arrow = shape(handle, "line", { class: "arrow", x1: 0, y1: 0 });
      const knob = shape(handle, "circle", { class: "knob", r: 7 });
      const letter = shape(handle, "text", { class: "letter", "text-anchor": "middle" }, side);
      const label = shape(handle, "text", { class: "angle" });
      this.handles[side] = { handle, arrow, knob, letter, label };
      handle.addEventListener("keydown", (event) => this.onKey(side, event));
      // the handle in use lies on top: the other element is moved, because a moved element loses the focus
      handle.addEventListener("focus", () => {
        const other = this.handles[SIDES.find((one) => one !== side)].handle;
        if (handle.nextElementSibling === other) svg.insertBefore(other, handle);
      });
    }
    this.listen(svg);
  }

  // The part of the circle to draw: the trained range and a little more, or the whole circle if a side is outside.
  view() {
    const [low, high] = this.dial.arc ? [this.dial.arc[0] - 30, this.dial.arc[1] + 30] : [-90, 90];
    const middle = (low + high) / 2;
    const enough = high - low < 300 && this.dial.shown.every((side) => within(this.dial.angle(side), [low, high]));
    return enough ? [low, high] : [middle - 180, middle + 180];
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
      const away = (side) => Math.abs(near(this.dial.angle(side), angle) - angle);
      dragged = own ?? [...this.dial.shown].sort((a, b) => away(a) - away(b))[0];
      svg.setPointerCapture(event.pointerId);
      this.handles[dragged].handle.focus({ preventScroll: true });
      if (!own) this.dial.turnTo(dragged, angle, false);
      event.preventDefault();
    });
    // a finger on the arc turns, and does not scroll: touch-action does not reach into every browser's SVG
    svg.addEventListener("touchstart", (event) => event.target.closest(".grip, .handle") && event.preventDefault(), { passive: false });
    svg.addEventListener("pointermove", (event) => dragged && this.dial.turnTo(dragged, angleAt(event), false));
    for (const end of ["pointerup", "pointercancel"]) {
      svg.addEventListener(end, () => {
        if (dragged) this.dial.changed(true);
        dragged = null;
      });
    }
  }

  onKey(side, event) {
    const [low, high] = this.dial.arc ?? this.view();
    const step = event.shiftKey ? 5 : 1;
    const here = near(this.dial.angle(side), (low + high) / 2);
    const steps = { ArrowRight: step, ArrowUp: step, PageUp: 10, ArrowLeft: -step, ArrowDown: -step, PageDown: -10 };
    const target = { Home: low, End: high }[event.key] ?? (steps[event.key] && Math.round(here + steps[event.key]));
    if (target === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.dial.turnTo(side, target);
  }

  drawFace([low, high]) {
    const svg = at("arc");
    const trained = this.dial.arc ?? [low, high];
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

  // The two axes: the first objective to the right, the second upwards.
  drawAxes(box) {
    const [first, second] = this.dial.objectives;
    shape(this.face, "text", { class: "axis", x: 5, y: -4 }, `${first} \u2192`);
    if (box[1] < -40) shape(this.face, "text", { class: "axis", x: box[0] + 1, y: box[1] + 8 }, `\u2191 more ${second}`);
    if (box[3] > 40) shape(this.face, "text", { class: "axis", x: box[0] + 1, y: box[3] - 3 }, `\u2193 less ${second}`);
  }

  drawHandles([low, high]) {
    const middle = (low + high) / 2;
    const angles = Object.fromEntries(SIDES.map((side) => [side, near(this.dial.angle(side), middle)]));
    const close = this.dial.shown.length === 2 && Math.abs(angles.A - angles.B) < 9;
    for (const side of SIDES) {
      const { handle, arrow, knob, letter, label } = this.handles[side];
      if (this.dial.shown.includes(side)) handle.removeAttribute("hidden");
      else handle.setAttribute("hidden", "");
      const [x, y] = on(angles[side]);
      const [hx, hy] = on(angles[side], RADIUS - 7);
      // labels that would overlap move apart
      const apart = close ? (angles[side] > angles[side === "A" ? "B" : "A"] || (angles.A === angles.B && side === "A") ? 5 : -5) : 0;
      const [tx, ty] = on(angles[side] + apart, RADIUS + 11);
      set(arrow, { x2: hx, y2: hy });
      set(knob, { cx: x, cy: y });
      set(letter, { x, y: y + 2.6 });
      set(label, { x: tx, y: ty + 3.2, "text-anchor": tx < -20 ? "end" : "start" });
      label.textContent = degrees(this.dial.angle(side));
      const outside = this.dial.warning(side) ? "; outside the trained range" : "";
      set(handle, {
        "aria-valuemin": low,
        "aria-valuemax": high,
        "aria-valuenow": Number(angles[side].toFixed(1)),
        "aria-valuetext": `${degrees(this.dial.angle(side))}: ${this.dial.words(side)}${outside}`,
      });
    }
  }

  // The reader's own direction, estimated from their choices, with its uncertainty.
  drawOwn([low, high]) {
    this.own.replaceChildren();
    if (!this.dial.own) return;
    const { v, within: around } = this.dial.own;
    const [from, to] = this.dial.arc ?? [low, high];
    const angle = near(angleOf(v), (low + high) / 2);
    const [first, last] = [Math.max(from, angle - around), Math.min(to, angle + around)];
    const radius = RADIUS - 12; // inside the arc, where no handle covers it
    shape(this.own, "path", { class: "own", d: `M${path(curve(first, last, radius))}` });
    const [[x1, y1], [x2, y2], [x, y]] = [radius - 5, radius + 5, radius - 9].map((one) => on(angle, one));
    shape(this.own, "line", { class: "own-mark", x1, y1, x2, y2 });
    shape(this.own, "text", { class: "own-name", x, y: y + 2.4, "text-anchor": x < 0 ? "start" : "end" }, "you");
  }

  draw() {
    const view = this.view();
    if (String(view) !== this.drawn) this.drawFace(view);
    this.drawn = String(view);
    this.drawOwn(view);
    this.drawHandles(view);
  }
}
