// The chat as the page shows it: a question, and under it the answer of each side with its rewards.

import * as api from "./api.js";
import { at, clamp, degrees, element, number, SIDES } from "./draw.js";
import { angleOf, arithmetic, rating, words } from "./direction.js";

export class Turn {
  constructor(question, sides) {
    this.question = question;
    this.cards = Object.fromEntries(sides.map((side) => [side, new Card(side)]));
    const answers = element("div", { className: sides.length > 1 ? "answers two" : "answers" });
    answers.append(...sides.map((side) => this.cards[side].article));
    this.section = element("section", { className: "turn" }, element("p", { className: "question" }, question), answers);
    at("turns").append(this.section);
  }

  // A side's answer; a side that was not asked has the other one's.
  answer(side) {
    return (this.cards[side] ?? this.cards[SIDES.find((other) => this.cards[other])]).text;
  }

  // Whether one of two answers can be preferred: both are there, with their rewards, and they differ.
  comparable(scored) {
    const cards = Object.values(this.cards);
    if (cards.length !== 2 || cards.some((card) => !card.text.trim() || (scored && !card.rewards))) return false;
    return cards[0].text.trim() !== cards[1].text.trim();
  }

  // Ask which is preferred; chosen(side) is called.
  offer(chosen) {
    for (const [side, card] of Object.entries(this.cards)) {
      card.prefer.hidden = false;
      card.prefer.onclick = () => chosen(side);
    }
    this.mark(null);
  }

  // Show which side is preferred; null for neither yet.
  mark(side) {
    for (const [own, { prefer }] of Object.entries(this.cards)) {
      prefer.disabled = side !== null && own !== side;
      prefer.setAttribute("aria-pressed", String(own === side));
      prefer.title = own === side ? "Press again to take it back" : "";
    }
  }

  rewards(side) {
    const other = SIDES.find((one) => one !== side);
    return { preferred: this.cards[side].rewards, other: this.cards[other].rewards };
  }

  remove() {
    this.section.remove();
  }
}

class Card {
  constructor(side) {
    this.heading = element("b");
    this.count = element("span");
    this.formula = element("code");
    this.body = element("div", { className: "text" });
    this.bars = element("div", { className: "rewards" });
    this.total = element("p", { className: "rating" });
    this.choice = element("p", { className: "choice" });
    this.prefer = element("button", { type: "button", className: "prefer" }, "I prefer this one");
    this.problem = element("p", { className: "warning" });
    this.problem.setAttribute("role", "alert");
    this.article = element(
      "article",
      { className: side },
      element("header", {}, element("span", {}, element("b", { className: "badge" }, side), this.heading), this.count),
      this.formula,
      this.body,
      this.problem,
      this.bars,
      this.total,
      this.choice,
      this.prefer,
    );
    this.article.setAttribute("aria-label", `Answer ${side}`);
    this.prefer.setAttribute("aria-label", `I prefer this one: answer ${side}`);
    this.side = side;
    this.text = "";
  }

  // Empty the card for a new answer at the dial's direction, or for the best of several.
  begin(dial, best) {
    this.text = "";
    this.v = dial.direction(this.side);
    this.dial = dial;
    this.heading.textContent = dial.objectives.length ? dial.name(this.side) : "";
    this.formula.textContent = dial.objectives.length ? dial.words(this.side) : "";
    this.node = document.createTextNode("");
    this.body.replaceChildren(this.node);
    this.bars.replaceChildren();
    this.total.replaceChildren();
    this.choice.textContent = "";
    this.rewards = null;
    this.prefer.hidden = true;
    this.warn("");
    this.count.textContent = best > 1 ? `drawing ${best} answers` : "";
    this.article.setAttribute("aria-busy", "true");
  }

  add(piece) {
    this.text += piece;
    this.node.appendData(piece);
    this.tally();
  }

  tally(note = "") {
    const n = words(this.text);
    this.count.textContent = `${n} ${n === 1 ? "word" : "words"}${note}`;
  }

  end(reason) {
    this.article.setAttribute("aria-busy", "false");
    this.tally({ length: ", cut short", stopped: ", stopped" }[reason] ?? "");
    if (!this.text.trim() && reason !== "failed") {
      this.body.replaceChildren(element("span", { className: "empty" }, reason === "stopped" ? "(stopped)" : "(an empty answer)"));
    }
  }

  warn(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  // How the best of several was chosen. The server has already scored it.
  choose({ drawn, drawn_at, rewards, mean_value }) {
    this.score(rewards);
    const { objectives, angled, signs } = this.dial;
    const v = objectives.map((name) => drawn_at[name] ?? 0);
    const where = angled ? degrees(angleOf(v)) : arithmetic(objectives, v, signs);
    this.choice.textContent = `the best of ${drawn}, drawn at ${where}; the mean of all is ${number(mean_value)}`;
  }

  score(rewards) {
    const { objectives, signs } = this.dial;
    if (!rewards || objectives.some((name) => !Number.isFinite(rewards[name]))) return;
    this.rewards = rewards;
    if (!this.bars.children.length) {
      this.bars.append(...objectives.map((name) => bar(name)));
    }
    objectives.forEach((name, k) => {
      const [, track, output] = this.bars.children[k].children;
      track.firstChild.style.width = `${clamp(rewards[name], 0, 100)}%`;
      output.textContent = number(rewards[name]);
    });
    if (!this.v) return;
    const [terms, total] = rating(objectives, this.v, rewards, signs);
    this.total.replaceChildren(`${terms} = `, element("b", {}, number(total)));
  }
}

function bar(name) {
  const track = element("div", { className: "track" }, element("div", { className: "fill" }));
  return element("div", { className: "reward", title: `${name}, in points, by the reward model` }, element("span", {}, name), track, element("output"));
}

// --- filling a card ---

const LIVE = 900; // milliseconds between two scorings of an answer that is still being written

// Fill a card with the answer to a request; returns what went wrong, if anything.
export async function fill(card, body, signal, scored) {
  const warnings = new Set();
  const live = new Scoring(card, body.messages, signal, scored);
  let reason = "stop";
  try {
    for await (const piece of api.chat(body, signal)) {
      if (piece.text) {
        card.add(piece.text);
        live.soon();
      }
      if (piece.chosen) card.choose(piece.chosen);
      if (piece.finish) reason = piece.finish;
      for (const warning of piece.warnings ?? []) card.warn([...warnings.add(warning)].join(" "));
    }
    card.end(reason);
  } catch (error) {
    const stopped = error.name === "AbortError";
    card.end(stopped ? "stopped" : "failed");
    if (!stopped) {
      card.warn(error.message);
      return error;
    }
  }
  await live.last();
  return null;
}

// Score an answer while it is written and once it is complete; one request at a time.
class Scoring {
  constructor(card, asked, signal, scored) {
    Object.assign(this, { card, asked, signal, scored, at: performance.now(), under: null });
  }

  soon() {
    if (!this.scored || this.under || performance.now() - this.at < LIVE) return;
    this.under = this.now().finally(() => (this.under = null));
  }

  async last() {
    await this.under;
    if (this.scored && this.card.text.trim()) await this.now();
  }

  async now() {
    this.at = performance.now();
    try {
      const found = await api.rewards(this.asked, this.card.text, this.signal.aborted ? undefined : this.signal);
      this.scored = found !== null;
      this.card.score(found);
    } catch (error) {
      if (error.name !== "AbortError") this.card.bars.title = error.message;
    }
  }
}
