// The arithmetic of directions: angles in degrees over two objectives, weights over any number.

import { MINUS, number } from "./draw.js";

// Scaled to length 1; null if all weights are zero or one is not finite.
export function unit(weights) {
  const largest = Math.max(...weights.map(Math.abs));
  if (!(largest > 0) || !Number.isFinite(largest)) return null;
  const scaled = weights.map((w) => w / largest);
  const norm = Math.hypot(...scaled);
  return scaled.map((w) => w / norm);
}

export const ofAngle = (angle) => [Math.cos((angle * Math.PI) / 180), Math.sin((angle * Math.PI) / 180)];
export const angleOf = ([x, y]) => (Math.atan2(y, x) * 180) / Math.PI;

// The same angle, written within half a turn of another one.
export const near = (angle, other) => angle + 360 * Math.round((other - angle) / 360);

export function within(angle, [low, high]) {
  const close = near(angle, (low + high) / 2);
  return close >= low - 1e-6 && close <= high + 1e-6;
}

// The sign that an objective has in the middle of the trained range: the sign to show for a weight of 0.
export function senses(objectives, arc, trained) {
  const middle = objectives.length === 2 && arc ? ofAngle((arc[0] + arc[1]) / 2) : trained?.center;
  return objectives.map((_, k) => (middle && middle[k] < -1e-9 ? -1 : 1));
}

// --- three objectives or more; trained is their distribution as dpa.json has it, null where it is unknown ---

const dot = (a, b) => a.reduce((sum, w, k) => sum + w * b[k], 0);
const RIM = 0.01; // degrees inside the cone's rim: a request carries rounded weights

// A side's start: the trained direction nearest to one objective alone.
export function towards(k, count, trained) {
  if (trained?.distribution === "fixed") return unit(trained.listed[k % trained.listed.length]);
  const axis = Array.from({ length: count }, (_, i) => (i === k % count ? 1 : 0));
  if (trained?.distribution !== "cone") return axis;
  const center = unit(trained.center);
  const wanted = axis.map((w, i) => (center[i] < 0 ? -w : w));
  const angle = ((trained.angle - RIM) * Math.PI) / 180;
  const near = dot(wanted, center);
  const aside = unit(wanted.map((w, i) => w - near * center[i]));
  if (near >= Math.cos(angle) || !aside) return wanted;
  return center.map((w, i) => Math.cos(angle) * w + Math.sin(angle) * aside[i]);
}

export function among(v, trained) {
  if (trained?.distribution === "cone") return dot(v, unit(trained.center)) >= Math.cos((trained.angle * Math.PI) / 180) - 1e-6;
  return trained?.distribution !== "simplex" || v.every((w) => w >= -1e-6);
}

// Set one weight and scale the others so that the length is 1. If all others are zero nothing changes.
export function withWeight(weights, k, value) {
  const others = Math.hypot(...weights.filter((_, i) => i !== k));
  const share = others > 0 ? Math.sqrt(Math.max(0, 1 - value * value)) / others : 0;
  return weights.map((w, i) => (i === k ? value : w * share));
}

// A sum over the objectives; term(shown, k) writes one of them, whose weight is shown without its sign.
function sum(v, signs, minus, term) {
  return v.reduce((text, weight, k) => {
    const shown = Math.abs(weight).toFixed(2);
    const negative = Number(shown) === 0 ? signs[k] < 0 : weight < 0;
    const sign = text ? (negative ? ` ${minus} ` : " + ") : negative ? minus : "";
    return text + sign + term(shown, k);
  }, "");
}

// As the paper writes it (Fig. 1): "helpfulness*0.97 - verbosity*0.26".
export const arithmetic = (objectives, v, signs) => sum(v, signs, "-", (shown, k) => `${objectives[k]}*${shown}`);

// v . r with its terms: ["0.97 x 60.1 - 0.26 x 40.0", 47.9].
export function rating(objectives, v, rewards, signs) {
  const terms = sum(v, signs, MINUS, (shown, k) => `${shown} \u00d7 ${number(rewards[objectives[k]])}`);
  return [terms, objectives.reduce((total, name, k) => total + v[k] * rewards[name], 0)];
}

export const words = (text) => text.split(/\s+/).filter(Boolean).length;
