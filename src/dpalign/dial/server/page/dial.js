// The dial: both sides' directions in numbers and words; an arc for two objectives, sliders for more.
// A direction is a list of weights in the order of the objectives.

import { Arc } from "./arc.js";
import { at, clamp, degrees, element, number, SIDES } from "./draw.js";
import { among, angleOf, arithmetic, ofAngle, senses, towards, unit, withWeight, within } from "./direction.js";

export class Dial {
  // contract: the reply of /v1/dial; changed(settled) is called at every turn, with settled = true at its end
  constructor(contract, changed) {
    this.objectives = contract.objectives;
    this.arc = contract.arc;
    this.trained = contract.trained ?? null;
    this.lengths = Object.entries(contract.verbosity ?? {});
    this.changed = changed;
    this.angled = this.objectives.length === 2;
    this.signs = senses(this.objectives, this.arc, this.trained);
    this.shown = SIDES;
    this.own = null; // the reader's own direction: {v, within}, in degrees around it
    this.weights = { A: this.start(0), B: this.start(1) };
    this.readings = {};
    at("dial").hidden = !this.objectives.length;
    if (!this.objectives.length) return;
    this.face = this.angled ? new Arc(this) : new Sliders(this);
    for (const side of SIDES) this.buildReading(side);
    this.draw();
  }

  start(place) {
    if (!this.angled) return towards(place, this.objectives.length, this.trained);
    const [low, high] = this.arc ?? [-45, 0];
    return ofAngle(place ? low : high);
  }

  direction(side) {
    return unit(this.weights[side]);
  }

  angle(side) {
    return angleOf(this.weights[side]);
  }

  // The direction as a request's fields.
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
    const v = this.direction(side);
    if (!v) return "All weights are zero: that is no direction. Weigh at least one objective.";
    if (!this.angled && !among(v, this.trained)) {
      return `Outside the directions this model was trained on, ${this.range()}: its answers there are a guess.`;
    }
    if (!this.angled || !this.arc || within(this.angle(side), this.arc)) return "";
    return `Outside the range this model was trained on, ${degrees(this.arc[0])} to ${degrees(this.arc[1])}: its answers there are a guess.`;
  }

  // The trained directions of three objectives or more, in words.
  range() {
    if (this.trained.distribution === "simplex") return "weights of 0 and above";
    const middle = arithmetic(this.objectives, unit(this.trained.center), this.signs);
    return `within ${degrees(this.trained.angle)} of ${middle}`;
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
    const levels = this.buildLengths(side);
    const lengths = element("div", { className: "lengths" }, "answers", ...levels.map(({ button }) => button));
    lengths.hidden = !levels.length;
    const whole = element("div", { className: `reading ${side}` }, row, lengths, warning);
    at("readings").append(whole);
    this.readings[side] = { whole, formula, levels, warning, input };
  }

  // A button for each measured length of answers: OpenAI's low, medium and high.
  buildLengths(side) {
    const names = { low: "short", medium: "medium", high: "long" };
    return this.lengths.map(([level, { angle, words }]) => {
      const title = `verbosity ${level}: about ${Math.round(words)} words, at ${degrees(angle)}`;
      const button = element("button", { type: "button", title }, names[level]);
      button.setAttribute("aria-label", `${side}: ${names[level]} answers`);
      button.addEventListener("click", () => this.turnTo(side, angle));
      return { angle, button };
    });
  }

  draw() {
    this.face.draw();
    for (const side of SIDES) {
      const { whole, formula, levels, warning, input } = this.readings[side];
      whole.hidden = !this.shown.includes(side);
      // it breaks between terms, never within one
      const terms = this.words(side).split(/ (?=[-+] )/);
      formula.replaceChildren(...terms.flatMap((term) => [element("span", {}, term), " "]));
      for (const { angle, button } of levels) button.setAttribute("aria-pressed", String(Math.abs(this.angle(side) - angle) < 0.05));
      warning.textContent = this.warning(side);
      warning.hidden = !warning.textContent;
      if (input && document.activeElement !== input) input.value = Number(this.angle(side).toFixed(1)) || 0;
    }
  }
}

// Sliders for three objectives or more, for each side. The weights keep length 1: moving one scales the others.
class Sliders {
  constructor(dial) {
    this.dial = dial;
    this.held = null; // the weights when the drag began: a slider moved back restores them all
    at("sliders").hidden = false;
    this.inputs = {};
    for (const side of SIDES) {
      const group = element("fieldset", { className: side }, element("legend", {}, side));
      this.inputs[side] = this.dial.objectives.map((name, k) => {
        const input = element("input", { type: "range", min: -1, max: 1, step: 0.01 });
        const value = element("output");
        input.setAttribute("aria-label", `${side}: ${name}`);
        const read = (settled) => {
          this.held ??= this.dial.weights[side];
          const weights = withWeight(this.held, k, Number(input.value));
          if (settled) this.held = null;
          this.dial.turn(side, weights, settled);
        };
        input.addEventListener("input", () => read(false));
        input.addEventListener("change", () => read(true));
        group.append(element("label", {}, element("span", {}, name), input, value));
        return { input, value };
      });
      at("sliders").append(group);
    }
  }

  draw() {
    for (const side of SIDES) {
      const v = this.dial.direction(side);
      this.inputs[side].forEach(({ input, value }, k) => {
        const weight = this.dial.weights[side][k];
        if (Number(input.value) !== weight) input.value = weight;
        value.textContent = number(v ? v[k] : 0, 2);
      });
      this.inputs[side][0].input.closest("fieldset").hidden = !this.dial.shown.includes(side);
    }
  }
}

// How many answers the server draws for each one shown (best_of). It needs a reward model to choose.
export class Best {
  // contract: the reply of /v1/dial; changed() is called when another number is chosen
  constructor(contract, changed) {
    this.most = contract.max_best_of || 1;
    this.box = at("best");
    const offered = [2, 4, 8, 16].filter((n) => n < this.most);
    for (const n of [1, ...offered, this.most]) this.offer(n);
    this.box.disabled = this.most < 2;
    this.box.addEventListener("change", () => {
      this.draw();
      changed();
    });
    this.draw();
  }

  offer(n) {
    if ([...this.box.options].some((one) => Number(one.value) === n)) return;
    this.box.append(element("option", { value: n }, n === 1 ? "one answer" : `the best of ${n}`));
  }

  get n() {
    return Number(this.box.value);
  }

  // An address may name a number that is not offered. The server's maximum is the limit.
  set n(wanted) {
    const n = clamp(Math.round(wanted), 1, this.most);
    this.offer(n);
    this.box.value = n;
    this.draw();
  }

  draw() {
    at("best-note").textContent = this.box.disabled
      ? "The best of several needs a reward model: dpa serve --reward"
      : this.n > 1
        ? "Drawn around the direction, chosen by the reward model; it comes when all are drawn."
        : "";
  }
}
