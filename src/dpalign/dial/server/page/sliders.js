// Sliders: a weight from -1 to 1 for each of more than two objectives, for each side.

import { at, element, number, SIDES } from "./draw.js";

export class Sliders {
  constructor(dial) {
    this.dial = dial;
    at("sliders").hidden = false;
    this.inputs = {};
    for (const side of SIDES) {
      const group = element("fieldset", { className: side }, element("legend", {}, side));
      this.inputs[side] = this.dial.objectives.map((name, k) => {
        const input = element("input", { type: "range", min: -1, max: 1, step: 0.01 });
        const value = element("output");
        input.setAttribute("aria-label", `${side}: ${name}`);
        const read = (settled) => {
          const weights = [...this.dial.weights[side]];
          weights[k] = Number(input.value);
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
      const largest = Math.max(1, ...this.dial.weights[side].map(Math.abs));
      this.inputs[side].forEach(({ input, value }, k) => {
        const weight = this.dial.weights[side][k] / largest;
        if (Number(input.value) !== weight) input.value = weight;
        value.textContent = number(weight, 2);
      });
      this.inputs[side][0].input.closest("fieldset").hidden = !this.dial.shown.includes(side);
    }
  }
}
