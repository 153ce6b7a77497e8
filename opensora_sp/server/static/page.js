"use strict";
const words = JSON.parse(document.body.dataset.words);
const say = (key, values = {}) =>
  (words[key] || key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
const by = (id) => document.getElementById(id);
const make = (tag, text, kind) => {
  const one = document.createElement(tag);
  if (text) one.textContent = text;
  if (kind) one.className = kind;
  return one;
};
const jobs = new Map();
const cards = new Map();

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(options.headers || {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  let message = `${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not JSON */ }
  throw new Error(message);
}

function button(text, act) {
  const one = make("button", text);
  one.type = "button";
  one.addEventListener("click", act);
  return one;
}

async function source(job, variant) {
  const answer = await call(`/v1/videos/${job.id}/content?variant=${variant}`);
  return URL.createObjectURL(await answer.blob());
}

function again(job, changes) {
  const form = by("new");
  form.prompt.value = job.prompt;
  if (form.seed) form.seed.value = changes.seed ?? job.seed ?? 42;
  form.prompt.focus();
}

async function keepGoing(job) {
  const answer = await call(`/v1/videos/${job.id}/content`);
  const file = new File([await answer.blob()], "video.mp4", { type: "video/mp4" });
  const transfer = new DataTransfer();
  transfer.items.add(file);
  by("reference").files = transfer.files;
  again(job, {});
}

function fill(card, job) {
  card.replaceChildren();
  const live = job.status === "queued" || job.status === "in_progress";
  if (job.status === "completed") {
    const picture = job.num_frames === 1;
    const view = make(picture ? "img" : "video");
    if (picture) view.alt = job.prompt;
    else { view.controls = true; view.loop = true; view.preload = "none";
      view.setAttribute("aria-label", job.prompt);
      source(job, "thumbnail").then((url) => { view.poster = url; }).catch(() => {}); }
    const load = () => source(job, "video").then((url) => { view.src = url; }).catch(() => {});
    if (picture) load();
    else view.addEventListener("play", () => { if (!view.src) load().then(() => view.play()); });
    if (!picture) load();
    card.append(view);
  }
  card.append(make("p", job.prompt));
  const facts = [say(job.status), `${job.size}`, `${Number(job.seconds).toFixed(1)} s`, say("seed", { seed: job.seed })];
  if (job.status === "completed")
    facts.push(say("took", { seconds: job.inference_time_s.toFixed(1) }));
  if (job.status === "queued" && job.queue_position)
    facts.push(say("place", { place: job.queue_position }));
  card.append(make("p", facts.join(" · "), "soft"));
  if (job.status === "in_progress") {
    const bar = make("progress");
    bar.max = 100; bar.value = job.progress;
    bar.setAttribute("aria-label", say("in_progress"));
    const detail = [say(job.stage)];
    if (job.step) detail.push(say("step", { step: job.step, steps: job.steps }));
    if (job.eta_s) detail.push(say("left", { seconds: Math.ceil(job.eta_s) }));
    card.append(bar, make("p", detail.join(" · "), "soft"));
  }
  if (job.error) card.append(make("p", job.error.message, "bad"));
  const actions = make("div", "", "actions");
  const drop = async () => {
    try { await call(`/v1/videos/${job.id}`, { method: "DELETE" }); gone(job.id); }
    catch (error) { by("said").textContent = error.message; }
  };
  if (job.status === "completed") {
    actions.append(button(say("download"), async () => {
      const link = make("a");
      link.href = await source(job, "video");
      link.download = job.file_name ? `${job.id}-${job.file_name}` : job.id;
      link.click();
    }));
    if (job.num_frames > 1) actions.append(button(say("continue"), () => keepGoing(job)));
  }
  if (!live) {
    actions.append(button(say("again"), () => again(job, {})));
    actions.append(button(say("vary"), () =>
      again(job, { seed: Math.floor(Math.random() * 1e6) })));
  }
  actions.append(button(say(live ? "cancel" : "delete"), drop));
  card.append(actions);
}

function gone(id) {
  jobs.delete(id);
  cards.get(id)?.remove();
  cards.delete(id);
  empties();
}

function empties() {
  by("no-queue").hidden = by("queue").children.length > 0;
  by("no-gallery").hidden = by("made").children.length > 0;
}

function show(job) {
  const before = jobs.get(job.id);
  if (before && JSON.stringify(before) === JSON.stringify(job)) return;
  jobs.set(job.id, job);
  const card = cards.get(job.id) || make("li");
  cards.set(job.id, card);
  card.dataset.status = job.status;
  const live = job.status === "queued" || job.status === "in_progress";
  const list = by(live ? "queue" : "made");
  if (card.parentElement !== list) list[live ? "append" : "prepend"](card);
  fill(card, job);
  empties();
}

async function refresh() {
  try {
    const found = await (await call("/v1/videos?limit=100&order=desc")).json();
    const ids = new Set(found.data.map((job) => job.id));
    for (const id of [...jobs.keys()]) if (!ids.has(id)) gone(id);
    found.data.reverse().forEach(show);
    const ready = await fetch("/ready");
    const state = (await ready.json()).status;
    by("state").textContent = words[state] || state;
  } catch (error) {
    by("state").textContent = error instanceof TypeError ? say("offline") : error.message;
  }
}

async function watch() {
  for (;;) {
    await refresh();
    const live = [...jobs.values()].some((job) => ["queued", "in_progress"].includes(job.status));
    await new Promise((done) => setTimeout(done, live ? 700 : 2500));
  }
}

by("new").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const body = new FormData(form);
  const file = by("reference").files[0];
  if (file) body.append(by("use").value, file);
  const main = form.querySelector("button.main");
  main.disabled = true;
  try {
    show(await (await call("/v1/videos", { method: "POST", body })).json());
    by("said").textContent = say("sent");
  } catch (error) { by("said").textContent = error.message; }
  main.disabled = false;
});

by("reference").addEventListener("change", () => {
  const file = by("reference").files[0];
  const picture = file && file.type.startsWith("image/");
  by("dropped").hidden = !picture;
  if (picture) by("dropped").src = URL.createObjectURL(file);
});
for (const kind of ["dragover", "dragleave", "drop"])
  by("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    by("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") {
      by("reference").files = event.dataTransfer.files;
      by("reference").dispatchEvent(new Event("change"));
    }
  });
by("token-form")?.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", by("token").value);
  refresh();
});
watch();
