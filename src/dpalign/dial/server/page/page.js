// One page over the server's own API: a dial, a chat at two directions, an address that restores both.
import * as api from "./api.js";
import { Best, Dial } from "./dial.js";
import { at, element, SIDES } from "./draw.js";
import { Front } from "./front.js";
import { readAddress, writeAddress } from "./address.js";
import { Taste } from "./taste.js";
import { fill, Turn } from "./turns.js";

const DEFAULTS = { seed: 0, temperature: 0.7 }; // the server says which temperature is its own

let contract = { objectives: [], arc: null, front: null, model: "" };
let dial = null;
let front = null;
let best = null; // how many answers each is chosen from
let turns = [];
let asking = null; // the AbortController of the answers being written
let taste = null; // the reader's own direction
let followed = 0; // the timer of "answer again as the dial turns"

const two = () => at("two").getAttribute("aria-pressed") === "true";
const sides = () => (two() && contract.objectives.length ? SIDES : ["A"]);
const numberIn = (id) => (at(id).value.trim() === "" ? undefined : at(id).valueAsNumber);

// --- the model ---

async function open() {
  try {
    contract = { objectives: [], arc: null, front: null, ...(await api.dial()) };
  } catch (error) {
    return complain(error, open);
  }
  quiet();
  DEFAULTS.temperature = contract.temperature ?? DEFAULTS.temperature;
  at("model").textContent = contract.model || "model";
  document.title = `${contract.model || "model"} \u00b7 dpalign`;
  if (dial) return;
  at("memory").checked = contract.template !== "world-v1"; // models of the small world know no second question
  front = new Front(contract);
  dial = new Dial(contract, turned);
  best = new Best(contract, () => turned(true));
  taste = new Taste(contract, dial, { learned, failed: complain });
  at("empty-taste").hidden = contract.rewards === false;
  suggest(contract.note, contract.questions ?? []);
  at("two").parentNode.hidden = !contract.objectives.length;
  restore();
}

// A model of a small language says so, and offers questions that it can answer.
function suggest(note, questions) {
  at("note").textContent = note ?? "";
  at("note").hidden = !note;
  if (questions.length) at("question").placeholder = `For example: ${questions[0]}`;
  for (const question of questions) {
    const button = element("button", { type: "button" }, question);
    button.addEventListener("click", () => !asking && !at("send").disabled && ask(question));
    at("questions").append(button);
  }
}

function turned(settled) {
  drawn();
  remember();
  clearTimeout(followed);
  // answer only the last turn again, once the dial rests
  if (settled && at("follow").checked && turns.length) followed = setTimeout(again, 300);
}

function drawn() {
  front.draw(dial);
  at("standing").textContent = dial.angled ? sides().map((side) => `${side} ${dial.name(side)}`).join("  \u00b7  ") : "";
  at("send").disabled = sides().some((side) => contract.objectives.length && !dial.direction(side));
}

function mode(both) {
  at("two").setAttribute("aria-pressed", String(both));
  at("one").setAttribute("aria-pressed", String(!both));
  at("empty-two").hidden = sides().length < 2;
  dial.show(sides());
  drawn();
}

// --- the address ---

function remember() {
  writeAddress({
    dial,
    sides: sides(),
    best: best.n,
    question: at("question").value.trim() || turns.at(-1)?.question || "",
    settings: { seed: numberIn("seed"), temperature: numberIn("temperature"), max: numberIn("max-tokens"), system: at("system").value },
    defaults: DEFAULTS,
  });
}

function restore() {
  const found = readAddress(dial);
  at("seed").value = found.seed ?? DEFAULTS.seed;
  at("temperature").value = found.temperature ?? DEFAULTS.temperature;
  at("max-tokens").value = found.max ?? "";
  at("system").value = found.system ?? "";
  if (found.system) at("settings").open = true;
  at("question").value = found.question ?? at("question").value; // keep what was typed while the page opened
  for (const side of SIDES) if (found.weights[side]) dial.weights[side] = found.weights[side];
  best.n = found.best ?? 1;
  mode(found.sides !== 1);
  grow();
}

async function copyLink() {
  remember();
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied.", at("link"));
  } catch {
    say("The link is in the address bar.", at("link"));
  }
}

// --- asking ---

function messages(side, before) {
  const system = at("system").value.trim();
  const said = system ? [{ role: "system", content: system }] : [];
  for (const turn of at("memory").checked ? before : []) {
    said.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer(side) });
  }
  return said;
}

async function ask(question) {
  const turn = new Turn(question, sides());
  turns.push(turn);
  at("question").value = "";
  grow();
  await answer(turn);
}

async function again() {
  if (!turns.length || at("send").disabled) return; // no direction, no question
  asking?.abort();
  const last = turns.pop();
  last.remove();
  taste.drop(last);
  await ask(last.question);
}

async function answer(turn) {
  quiet();
  const mine = new AbortController();
  asking?.abort();
  asking = mine;
  busy(true);
  remember();
  following = true;
  follow();
  let outcomes = [];
  let current = true;
  try {
    outcomes = await Promise.all(Object.keys(turn.cards).map((side) => write(turn, side, mine.signal)));
  } finally {
    current = asking === mine;
    if (current) {
      asking = null;
      busy(false);
    }
  }
  if (!current) return; // another question has taken its place
  const refused = outcomes.find((error) => error?.status === 401);
  if (refused) {
    turn.remove();
    turns = turns.filter((one) => one !== turn);
    at("question").value ||= turn.question;
    grow();
    remember();
    return complain(refused, () => at("question").value.trim() && at("ask").requestSubmit());
  }
  taste.ask(turn);
  at("said").textContent = Object.entries(turn.cards).map(([side, card]) => `${side}: ${card.count.textContent}`).join("; ");
}

// One side's answer; returns what went wrong.
async function write(turn, side, signal) {
  const card = turn.cards[side];
  const asked = [...messages(side, turns.slice(0, turns.indexOf(turn))), { role: "user", content: turn.question }];
  const body = { model: contract.model, messages: asked, seed: numberIn("seed") ?? DEFAULTS.seed };
  body.temperature = numberIn("temperature") ?? DEFAULTS.temperature;
  if (numberIn("max-tokens")) body.max_tokens = numberIn("max-tokens");
  if (contract.objectives.length) body.preference = dial.preference(side);
  if (best.n > 1) body.best_of = best.n;
  card.begin(dial, best.n);
  return fill(card, body, signal, contract.rewards !== false && !body.best_of);
}

// --- a person's own direction: which of two answers do you prefer? ---

// The next question is answered at the two directions whose comparison is most informative.
function learned(next) {
  quiet();
  if (!two() || !next) return;
  next.forEach((direction, place) => dial.turn(SIDES[place], dial.objectives.map((name) => direction[name]), false));
}

function useTaste() {
  mode(false);
  dial.turn("A", taste.weights);
  say(`A is at ${dial.name("A") || "it"}`, at("taste-use"));
}

// --- what goes wrong, and small words ---

function complain(error, retry) {
  at("problem").textContent = error.status === 401 ? "This server asks for an API key." : error.message;
  at("problem").hidden = false;
  if (error.status === 401) {
    at("key-form").classList.add("wanted");
    at("settings").open = true;
    at("key-note").textContent = api.key.get() ? `The server refused this key: ${error.message}` : "Enter the key that the server was started with.";
    at("key").focus();
    pending = retry;
  } else if (error.status === 0 && retry) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Try again";
    button.addEventListener("click", retry);
    at("problem").append(" ", button);
  }
}

let pending = null; // what to do once there is a key

function quiet() {
  at("problem").hidden = true;
  at("key-form").classList.remove("wanted");
}

function say(text, button) {
  const before = button.dataset.text ?? (button.dataset.text = button.textContent);
  button.textContent = text;
  at("said").textContent = text;
  setTimeout(() => (button.textContent = before), 1600);
}

function busy(now) {
  at("stop").hidden = !now;
  at("send").hidden = now;
  at("again").hidden = now || !turns.length;
  at("empty").hidden = turns.length > 0;
  at("talk").setAttribute("aria-busy", String(now));
}

function grow() {
  const box = at("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, 220)}px`;
}

// The end of the last answer stays in sight, above the question's box, until the reader scrolls away from it.
let following = false;
let height = 0; // where the reader was
const below = () => at("flow").getBoundingClientRect().bottom + at("ask").offsetHeight - innerHeight;

function follow() {
  if (following && turns.length && below() > 0) scrollBy({ top: below(), behavior: "instant" });
}

// --- listening ---

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (question && dial && !asking && !at("send").disabled) ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
});
at("question").addEventListener("input", grow);
at("question").addEventListener("change", () => dial && remember());
document.addEventListener("keydown", (event) => event.key === "Escape" && asking?.abort());
at("stop").addEventListener("click", () => asking?.abort());
at("again").addEventListener("click", again);
at("taste-use").addEventListener("click", () => taste?.found && useTaste());
at("link").addEventListener("click", () => dial && copyLink());
at("new").addEventListener("click", () => {
  asking?.abort();
  for (const turn of turns) turn.remove();
  turns = [];
  taste?.ask(null);
  busy(false);
  at("question").focus();
});
at("one").addEventListener("click", () => dial && (mode(false), remember()));
at("two").addEventListener("click", () => dial && (mode(true), remember()));
for (const id of ["seed", "temperature", "max-tokens", "system"]) at(id).addEventListener("change", () => dial && remember());
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set(at("key").value.trim());
  at("key").value = "";
  at("key-note").textContent = api.key.get() ? "Kept for this tab only." : "No key is sent.";
  at("key").placeholder = api.key.get() ? "a key is in use" : "none is sent";
  const retry = pending ?? open;
  pending = null;
  retry();
});
addEventListener("scroll", () => {
  if (below() < 80) following = true;
  else if (scrollY < height - 2) following = false;
  height = scrollY;
}, { passive: true });
new ResizeObserver(follow).observe(at("flow"));
addEventListener("hashchange", () => dial && restore());
if (api.key.get()) at("key").placeholder = "a key is in use";
open();
