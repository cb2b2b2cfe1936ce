// A person's own direction: which of two answers do they prefer? A choice is kept with its turn, by the answers' rewards.

import * as api from "./api.js";
import { at } from "./draw.js";

const ENOUGH = 12; // more choices add little (docs/results.md)

export class Taste {
  // dial shows the estimate; learned(next) hears which two directions to compare next, failed(error) what went wrong
  constructor(contract, dial, { learned, failed }) {
    Object.assign(this, { dial, learned, failed });
    this.scored = contract.rewards !== false;
    this.choices = []; // {turn, side, preferred, other}
    this.found = null; // the server's estimate
    this.turn = null; // the turn whose answers are being compared
    at("taste-forget").addEventListener("click", () => this.learn([]));
  }

  // Ask which of a turn's two answers is preferred; null asks nothing.
  ask(turn) {
    this.turn = turn?.comparable(this.scored) ? turn : null;
    if (this.turn && this.scored) turn.offer((side) => this.choose(turn, side));
    this.draw();
  }

  // Choose a side; choosing it again takes the choice back.
  choose(turn, side) {
    const others = this.choices.filter((one) => one.turn !== turn);
    const taken = this.chosen(turn) === side;
    this.learn(taken ? others : [...others, { turn, side, ...turn.rewards(side) }]);
  }

  chosen(turn) {
    return this.choices.find((one) => one.turn === turn)?.side ?? null;
  }

  // A turn that is answered again no longer counts.
  drop(turn) {
    if (this.turn === turn) this.turn = null;
    if (this.chosen(turn)) this.learn(this.choices.filter((one) => one.turn !== turn));
    this.draw();
  }

  async learn(choices) {
    const before = this.choices;
    this.choices = choices;
    this.mark([...before, ...choices]);
    try {
      const found = choices.length ? await api.taste(choices.map(({ preferred, other }) => ({ preferred, other }))) : null;
      if (this.choices !== choices) return; // another choice was made meanwhile
      this.found = found && { ...found, count: choices.length };
    } catch (error) {
      if (this.choices !== choices) return;
      this.choices = before;
      this.mark([...before, ...choices]);
      return this.failed(error);
    }
    this.draw();
    this.learned(this.found?.next);
  }

  mark(choices) {
    for (const { turn } of choices) turn.mark(this.chosen(turn));
  }

  // The weights of the estimate.
  get weights() {
    return this.found && this.dial.objectives.map((name) => this.found.preference[name]);
  }

  draw() {
    const open = this.turn && !this.chosen(this.turn);
    at("taste").hidden = !this.turn && !this.found;
    at("taste-ask").hidden = !open;
    at("taste-ask").textContent = !this.scored
      ? "To find your own direction by choosing, the page needs a reward model: dpa serve --reward"
      : this.found
        ? "Which do you prefer?"
        : `Which do you prefer? Go by the texts, not by the points. About ${ENOUGH} choices find your own direction.`;
    for (const id of ["taste-own", "taste-use", "taste-forget"]) at(id).hidden = !this.found;
    this.dial.own = this.found && { v: this.weights, within: this.found.within };
    this.dial.draw();
    if (!this.found) return;
    const { count, words } = this.found;
    const left = ENOUGH - count;
    at("taste-words").textContent = `after ${count} ${count === 1 ? "choice" : "choices"}: ${words}.`;
    at("taste-more").textContent = left > 0 ? `About ${left} more will do.` : "That will do.";
  }
}
