// One answer: its text piece by piece, its warnings, its rewards.

import * as api from "./api.js";

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

// The rewards of an answer, while it is written and once it is whole; one request at a time.
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
