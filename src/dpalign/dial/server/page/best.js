// How many answers are drawn for each that is shown: the server's best_of, where it has a reward model to choose.

import { at, clamp, element } from "./draw.js";

export class Best {
  // contract: what /v1/dial says; changed() is called when another number is chosen
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

  // An address may name a number that is not offered; more than the server draws are as many as it draws.
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
