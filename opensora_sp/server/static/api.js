// Words, small helpers and calls to the server.
const words = JSON.parse(document.body.dataset.words);

export const has = (key) => key in words;
export const say = (key, values = {}) =>
  (words[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
export const by = (id) => document.getElementById(id);

export function make(tag, text = "", kind = "") {
  const one = document.createElement(tag);
  if (text) one.textContent = text;
  if (kind) one.className = kind;
  return one;
}

// A button of a card. Its full name says which video it is for, as a screen reader has no picture.
export function button(text, about, act) {
  const one = make("button", text);
  one.type = "button";
  if (about) one.setAttribute("aria-label", say("of", { action: text, prompt: about }));
  one.addEventListener("click", act);
  return one;
}

// Said in the live region for screen readers, and shown for some seconds.
let silence = 0;
export function announce(text) {
  by("said").textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => { by("said").textContent = ""; }, 8000);
}

export function time(seconds) {
  if (seconds < 90) return say("seconds", { n: Math.max(1, Math.ceil(seconds)) });
  if (seconds < 5400) return say("minutes", { n: Math.round(seconds / 60) });
  return say("hours", { n: (seconds / 3600).toFixed(1) });
}

// Small ones keep a digit that is not 0.
export const gigabytes = (mb) => Math.max(mb / 1000, 0.01).toFixed(mb < 100 ? 2 : 1);

export class Refused extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

// The server's answer. Raises Refused with its words, and TypeError where it does not answer.
export async function call(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  let error = {};
  try { error = (await answer.json()).error ?? {}; } catch { /* not JSON */ }
  if (answer.status === 401 && path !== "/login") document.dispatchEvent(new Event("signed-out"));
  throw new Refused(answer.status, error.message ?? String(answer.status), error.param ?? null);
}

export const words_of = (error) =>
  error instanceof TypeError ? say("offline") : error.message;

// Asks in words; true for yes. Leaving it by Escape is no.
export function confirmed(question, yes) {
  const box = by("confirm");
  by("confirm-text").textContent = say(question);
  by("confirm-yes").textContent = say(yes);
  box.returnValue = "no";
  box.showModal();
  by("confirm-no").focus();
  return new Promise((done) =>
    box.addEventListener("close", () => done(box.returnValue === "yes"), { once: true }));
}
