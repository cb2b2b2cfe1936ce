// The dial: which prompt, which policy, which direction. Everything shown comes from #answers as text.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("answers").textContent);
  const at = (id) => document.getElementById(id);
  const MINUS = "\u2212";
  const state = { prompt: 0, steered: data.steered[0], plain: data.plain[0], direction: 0 };

  const number = (x, digits = 1) => (x === null || x === undefined ? "\u2013" : x.toFixed(digits).replace("-", MINUS));
  const colour = (system) => `var(--${data.colours[system] || "ink"})`;
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    Object.assign(made, properties);
    made.append(...children);
    return made;
  }

  function shape(parent, name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  // --- what is chosen ---

  const prompt = () => data.prompts[state.prompt];
  const stops = () => prompt().dials[state.steered] || [];
  // directions are kept by their place in the evaluation grid, so that another prompt or policy stays at the same one
  const place = () => {
    const distances = stops().map((stop) => Math.abs(stop.index - state.direction));
    return distances.indexOf(Math.min(...distances));
  };
  const stop = () => stops()[place()];

  function turnTo(index) {
    const chosen = stops()[clamp(index, 0, stops().length - 1)];
    if (chosen && chosen.index !== state.direction) {
      state.direction = chosen.index;
      show();
    }
  }

  // --- the arc: the directions where they lie, the first objective to the right, the second upwards ---

  const RADIUS = 100;
  const bearings = () => stops().map((one) => (one.angle * Math.PI) / 180);
  const onArc = (angle, radius = RADIUS) => [radius * Math.cos(angle), -radius * Math.sin(angle)];

  function drawArc() {
    const svg = at("arc");
    svg.replaceChildren();
    if (!data.angled) return drawStops(svg);
    const angles = bearings();
    if (!angles.length) return;
    const [first, last] = [angles[0], angles[angles.length - 1]];
    const curve = Array.from({ length: 65 }, (_, i) => onArc(first + ((last - first) * i) / 64));
    const corners = [[0, 0], ...curve];
    const [xs, ys] = [0, 1].map((axis) => corners.map((corner) => corner[axis]));
    const box = [Math.min(...xs) - 6, Math.min(...ys) - 18, Math.max(...xs) + 26, Math.max(...ys) + 16];
    svg.setAttribute("viewBox", `${box[0]} ${box[1]} ${box[2] - box[0]} ${box[3] - box[1]}`);
    const path = curve.map((point) => point.map((x) => x.toFixed(2)).join(",")).join(" L");
    shape(svg, "path", { class: "wedge", d: `M0,0 L${path} Z` });
    shape(svg, "path", { class: "track", d: `M${path}` });
    for (const angle of angles) {
      const [x, y] = onArc(angle);
      shape(svg, "circle", { class: "stop", cx: x, cy: y, r: 1.4 });
    }
    shape(svg, "text", { x: 0, y: -5 }, `${data.objectives[0]} \u2192`);
    const down = last < first;
    shape(svg, "text", { x: 0, y: down ? box[3] - 3 : box[1] + 6 }, `${down ? "\u2193 less" : "\u2191 more"} ${data.objectives[1]}`);
    const here = angles[place()];
    const [x, y] = onArc(here);
    const [hx, hy] = onArc(here, RADIUS - 6);
    shape(svg, "line", { class: "arrow", x1: 0, y1: 0, x2: hx, y2: hy });
    shape(svg, "circle", { class: "head", cx: 0, cy: 0, r: 2 });
    shape(svg, "circle", { class: "handle", cx: x, cy: y, r: 5.4 });
    const [tx, ty] = onArc(here, RADIUS + 10);
    shape(svg, "text", { class: "angle", x: tx, y: ty + 2.8 }, stop().name);
    shape(svg, "path", { class: "grip", d: `M${path}` });
    svg.style.setProperty("--chosen", colour(state.steered));
    svg.setAttribute("aria-valuemax", angles.length - 1);
    svg.setAttribute("aria-valuenow", place());
    svg.setAttribute("aria-valuetext", `${stop().name}: ${stop().arithmetic}`);
  }

  // three objectives and more have no angle: their directions are a list
  function drawStops(svg) {
    svg.parentNode.hidden = true;
    at("strip").parentNode.hidden = true;
    at("stops").hidden = false;
    const buttons = stops().map((one, i) => {
      const button = element("button", { type: "button" }, one.arithmetic);
      button.setAttribute("aria-pressed", String(i === place()));
      button.addEventListener("click", () => turnTo(i));
      return button;
    });
    at("stops").replaceChildren(...buttons);
    at("stops").style.setProperty("--chosen", colour(state.steered));
  }

  function turnToPointer(event) {
    const svg = at("arc");
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const distances = bearings().map((angle) => {
      const [x, y] = onArc(angle);
      return Math.hypot(x - point.x, y - point.y);
    });
    turnTo(distances.indexOf(Math.min(...distances)));
  }

  function listen() {
    const svg = at("arc");
    let dragging = false;
    svg.addEventListener("pointerdown", (event) => {
      if (!event.target.classList.contains("grip")) return;
      dragging = true;
      svg.setPointerCapture(event.pointerId);
      svg.focus({ preventScroll: true });
      turnToPointer(event);
      event.preventDefault();
    });
    svg.addEventListener("pointermove", (event) => dragging && turnToPointer(event));
    for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => (dragging = false));
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowDown: 1, PageDown: 3, ArrowLeft: -1, ArrowUp: -1, PageUp: -3 };
      const target = { Home: 0, End: stops().length - 1 }[event.key] ?? (steps[event.key] && place() + steps[event.key]);
      if (target === undefined) return;
      turnTo(target);
      event.preventDefault();
    });
  }

  // --- this prompt at all directions ---

  const measured = (answer) => (data.true && answer.true_rewards) || answer.rewards;

  function drawStrip() {
    const name = data.objectives[Math.min(1, data.objectives.length - 1)];
    at("strip-title").textContent = `This prompt: ${name} of the answer at each direction`;
    const tallest = Math.max(1, ...stops().map((one) => measured(one)[name]));
    const bars = stops().map((one, i) => {
      const value = measured(one)[name];
      const bar = element("i");
      bar.style.height = `${clamp((82 * value) / tallest, 0.5, 82)}%`;
      const button = element("button", { type: "button", tabIndex: -1, title: `${one.name}: ${name} ${number(value)}` }, bar, value.toFixed(0));
      button.setAttribute("aria-pressed", String(i === place()));
      button.addEventListener("click", () => turnTo(i));
      return button;
    });
    at("strip").replaceChildren(...bars);
    at("strip").style.setProperty("--chosen", colour(state.steered));
  }

  // --- the averages, as in the figure of the front ---

  function drawMeans() {
    const svg = at("means");
    svg.replaceChildren();
    const own = data.means[state.steered];
    if (!own) return (svg.parentNode.hidden = true);
    const beside = data.means[state.plain] || [];
    const all = [...own, ...beside, ...data.true_front];
    const [width, height, pad] = [260, 178, 14];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const scale = (axis, low, high) => {
      const values = all.map((point) => point[axis]);
      const [least, most] = [Math.min(...values), Math.max(...values)];
      return (point) => low + ((point[axis] - least) / (most - least || 1)) * (high - low);
    };
    const x = scale(1, pad, width - pad);
    const y = scale(0, height - pad - 14, pad + 6);
    const path = (points) => points.map((point, i) => `${i ? "L" : "M"}${x(point).toFixed(1)},${y(point).toFixed(1)}`).join("");
    shape(svg, "path", { d: `M${pad - 8},6 V${height - 14} H${width - 4}`, fill: "none", stroke: "var(--line)" });
    if (data.true_front.length) {
      shape(svg, "path", { d: path(data.true_front), fill: "none", stroke: "var(--front)", "stroke-width": 1.3, "stroke-dasharray": "5 3" });
    }
    shape(svg, "path", { d: path(own), fill: "none", stroke: colour(state.steered), "stroke-width": 1.6, "stroke-opacity": 0.6 });
    for (const point of own) shape(svg, "circle", { cx: x(point), cy: y(point), r: 2.4, fill: colour(state.steered) });
    for (const point of beside) {
      shape(svg, "rect", { x: x(point) - 3.5, y: y(point) - 3.5, width: 7, height: 7, fill: colour(state.plain) });
    }
    if (beside.length === 1) {
      const late = x(beside[0]) > width * 0.6;
      shape(svg, "text", { x: x(beside[0]) + (late ? -8 : 8), y: y(beside[0]) + 3.5, "text-anchor": late ? "end" : "start" }, state.plain);
    }
    const here = stop() && own[stop().index];
    if (here) shape(svg, "circle", { cx: x(here), cy: y(here), r: 6, fill: colour(state.steered), stroke: "var(--page)", "stroke-width": 2 });
    shape(svg, "text", { x: width - 4, y: height - 2, "text-anchor": "end" }, `${data.objectives[1]} \u2192`);
    shape(svg, "text", { x: pad - 2, y: 12 }, `\u2191 ${data.objectives[0]}`);
  }

  // --- the answers ---

  function rewardBar(name, answer) {
    const value = measured(answer)[name];
    const fill = element("div", { className: "fill" });
    fill.style.width = `${clamp(value, 0, 100)}%`;
    const track = element("div", { className: "track" }, fill);
    let title = `${name}: ${number(value)}`;
    if (data.true && answer.true_rewards) {
      const tick = element("div", { className: "tick" });
      tick.style.left = `${clamp(answer.rewards[name], 0, 100)}%`;
      track.append(tick);
      title = `${name}: true ${number(value)}, judged ${number(answer.rewards[name])}`;
    }
    return element("div", { className: "reward", title }, element("span", {}, name), track, element("output", {}, number(value)));
  }

  function rating(answer, weights) {
    let total = 0;
    let terms = "";
    data.objectives.forEach((name, k) => {
      const value = measured(answer)[name];
      total += weights[k] * value;
      const small = Math.abs(weights[k]) < 0.0005;
      const negative = small ? data.senses[k] < 0 : weights[k] < 0;
      const joint = terms ? (negative ? ` ${MINUS} ` : " + ") : negative ? MINUS : "";
      terms += `${joint}${Math.abs(weights[k]).toFixed(3)} \u00d7 ${number(value)}`;
    });
    return element("div", { className: "rating" }, `${terms} = `, element("b", {}, number(total)));
  }

  function fill(article, heading, answer, system) {
    article.style.setProperty("--chosen", colour(system));
    if (!answer) {
      article.replaceChildren(element("p", { className: "empty" }, "No answer to this prompt."));
      return;
    }
    const count = answer.words === 1 ? "1 word" : `${answer.words} words`;
    const header = element("header", {}, element("b", {}, heading), element("span", {}, count));
    const empty = answer.response.trim() === "";
    const text = element("div", { className: empty ? "text empty" : "text" }, empty ? "(an empty answer)" : answer.response);
    const bars = data.objectives.map((name) => rewardBar(name, answer));
    article.replaceChildren(header, text, ...bars, rating(answer, stop().weights));
  }

  // --- the page ---

  function show() {
    at("prompt-text").textContent = prompt().prompt;
    const chosen = stop();
    at("formula").textContent = chosen ? chosen.arithmetic : "";
    fill(at("steered"), chosen && `${state.steered} at ${chosen.name}`, chosen, state.steered);
    if (state.plain) fill(at("plain"), `${state.plain}, at every direction`, chosen && prompt().plain[state.plain], state.plain);
    at("plain").hidden = !state.plain;
    drawArc();
    drawStrip();
    drawMeans();
  }

  function choose(id, key, options) {
    const select = at(id);
    select.append(...options.map(([value, label]) => element("option", { value, textContent: label })));
    select.addEventListener("change", () => {
      state[key] = key === "prompt" ? Number(select.value) : select.value;
      show();
    });
    select.parentNode.hidden = options.length < 2;
  }

  const short = (text) => (text.length > 90 ? `${text.slice(0, 88)}\u2026` : text).replace(/\s+/g, " ");
  choose("choose-prompt", "prompt", data.prompts.map((one, i) => [i, `${i + 1}. ${short(one.prompt)}`]));
  choose("choose-steered", "steered", data.steered.map((name) => [name, name]));
  choose("choose-plain", "plain", data.plain.map((name) => [name, name]));
  listen();
  show();
})();
