// The page: it signs in, lists what is there, and follows the server's events.
import { by, call, has, say, words_of } from "/static/api.js";
import { gone, known, oldest, show } from "/static/cards.js";
import { estimateSoon, queueMoved, setUpForm } from "/static/form.js";

const PAGE = 24;
const POLL_MS = 2000;
let stream = null;
let poll = 0;
let broken = 0;

function state(name) {
  const key = name.split(":")[0];
  by("state").textContent = has(key) ? say(key) : name;
}

// The newest page of all videos. Shown ones that are newer than its end and not in it are gone.
async function refresh() {
  const found = await (await call(`/v1/videos?limit=${PAGE}&order=desc`)).json();
  const ids = new Set(found.data.map((job) => job.id));
  const end = found.data.at(-1)?.created_at ?? 0;
  for (const job of known())
    if (!ids.has(job.id) && (!found.has_more || job.created_at > end)) gone(job.id);
  found.data.forEach(show);
  by("older").hidden = by("older").dataset.done === "yes" || !found.has_more;
}

async function older() {
  const found = await (await call(`/v1/videos?limit=${PAGE}&order=desc&after=${oldest()}`)).json();
  const first = found.data.find((job) => !["queued", "in_progress"].includes(job.status));
  found.data.forEach(show);
  by("older").dataset.done = found.has_more ? "" : "yes";
  by("older").hidden = !found.has_more;
  if (first) by("made").querySelector(`[data-id="${first.id}"] button`)?.focus();
}

// One stream for all videos. The browser connects again by itself; where that fails, it is asked
// every two seconds.
function follow() {
  stream?.close();
  stream = new EventSource("/v1/events");
  stream.addEventListener("open", () => {
    broken = 0;
    clearInterval(poll);
    poll = 0;
    again();
  });
  stream.addEventListener("video", (event) => {
    const job = JSON.parse(event.data);
    show(job);
    if (!["queued", "in_progress"].includes(job.status)) queueMoved();
  });
  stream.addEventListener("deleted", (event) => {
    gone(JSON.parse(event.data).id);
    queueMoved();
  });
  stream.addEventListener("state", (event) => state(JSON.parse(event.data)));
  stream.addEventListener("error", () => {
    broken += 1;
    if (stream.readyState === EventSource.CLOSED) setTimeout(() => { if (!signedOut()) follow(); }, POLL_MS);
    if (broken > 1 && !poll) poll = setInterval(again, POLL_MS);
    if (broken > 1) state(say("offline"));
  });
}

async function again() {
  try {
    await refresh();
    if (poll) state((await (await fetch("/ready")).json()).status);
  } catch (error) {
    if (error.status !== 401) state(words_of(error));
  }
}

const signedOut = () => !by("login").hidden;

function askToken() {
  stream?.close();
  clearInterval(poll);
  poll = 0;
  by("login").hidden = false;
  by("work").hidden = true;
  if (by("logout")) by("logout").hidden = true;
  by("token").focus();
}

function start() {
  by("login").hidden = true;
  by("work").hidden = false;
  if (by("logout")) by("logout").hidden = false;
  follow();
  estimateSoon();
}

by("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const headers = { "content-type": "application/json" };
  const body = JSON.stringify({ token: by("token").value });
  try {
    await call("/login", { method: "POST", headers, body });
    by("token").value = "";
    by("token-problem").textContent = "";
    start();
    by("prompt").focus();
  } catch (error) {
    by("token-problem").textContent = error.status === 401 ? say("new_token") : words_of(error);
  }
});
by("logout")?.addEventListener("click", async () => {
  await call("/login", { method: "DELETE" });
  known().forEach((job) => gone(job.id));
  askToken();
});
document.addEventListener("signed-out", askToken);
by("older").addEventListener("click", () => older().catch((error) => state(words_of(error))));

setUpForm(show);
try {
  await refresh();
  start();
} catch (error) {
  if (error.status !== 401) {
    state(words_of(error));
    start();
  }
}
