// A card for every video: waiting, being made, or made. A card that plays is never built anew.
import { announce, button, by, call, confirmed, gigabytes, has, make, say, time, words_of } from "/static/api.js";
import { fill } from "/static/form.js";
import { Preview } from "/static/preview.js";

const cards = new Map(); // id → { job, item, preview, parts }
const live = (job) => job.status === "queued" || job.status === "in_progress";

export const known = () => [...cards.values()].map((one) => one.job);
// The made video that is the last of the gallery: older ones follow it.
export const oldest = () => by("made").lastElementChild?.dataset.id ?? null;

export function show(job) {
  const before = cards.get(job.id);
  if (before && JSON.stringify(before.job) === JSON.stringify(job)) return;
  if (before && live(before.job) && live(job)) {
    before.job = job;
    update(before);
    place(before);
    return;
  }
  const held = before?.item.contains(document.activeElement);
  before?.preview?.end();
  const one = { job, item: before?.item ?? make("li"), preview: null, parts: null };
  one.item.dataset.id = job.id;
  one.item.dataset.status = job.status;
  cards.set(job.id, one);
  one.item.replaceChildren(...(live(job) ? liveParts(one) : madeParts(job)));
  if (live(job)) update(one);
  place(one);
  if (before && !live(job)) announce(say(`said_${job.status}`, { prompt: job.prompt }));
  if (held) one.item.querySelector("button, a")?.focus();
}

export function gone(id) {
  const one = cards.get(id);
  if (!one) return;
  const held = one.item.contains(document.activeElement);
  one.preview?.end();
  one.item.remove();
  cards.delete(id);
  empties();
  if (held) by("gallery").focus();
}

// Waiting ones by when they came, the one that is made first; made ones newest first.
function place(one) {
  const { job, item } = one;
  const list = by(live(job) ? "queue" : "made");
  const key = (other) => (live(other)
    ? [other.status === "in_progress" ? 0 : 1, other.queue_position ?? 0, other.created_at]
    : [-other.created_at]);
  const before = (a, b) => {
    const [x, y] = [key(a), key(b)];
    for (let i = 0; i < x.length; i++) if (x[i] !== y[i]) return x[i] < y[i];
    return false;
  };
  const next = [...list.children].find((other) =>
    other !== item && before(job, cards.get(other.dataset.id).job)) ?? null;
  const after = item.nextElementSibling;
  if (item.parentElement !== list || after !== next) {
    const focused = item.contains(document.activeElement) ? document.activeElement : null;
    list.insertBefore(item, next);
    focused?.focus();
  }
  empties();
}

function empties() {
  by("no-queue").hidden = by("queue").children.length > 0;
  by("no-gallery").hidden = by("made").children.length > 0;
}

const facts = (job, ...more) =>
  [job.size.replace("x", "×"), job.seconds && say("seconds", { n: Number(job.seconds).toFixed(1) }),
    say("seed", { seed: job.seed }), ...more].filter(Boolean).join(" · ");

function liveParts(one) {
  const { job } = one;
  const bar = make("progress");
  bar.max = 100;
  bar.setAttribute("aria-label", say("progress", { prompt: job.prompt }));
  const said = make("p", "", "stage");
  one.preview = new Preview(job);
  one.parts = { bar, said };
  const actions = make("div", "", "actions");
  actions.append(button(say("cancel"), job.prompt, () =>
    remove(one.job, one.job.status === "in_progress" ? "cancel" : "")));
  return [one.preview.canvas, make("h3", job.prompt), make("p", facts(job), "soft"), bar, said, actions];
}

function update(one) {
  const { job, parts, item } = one;
  item.dataset.status = job.status;
  const making = job.status === "in_progress";
  parts.bar.hidden = !making;
  parts.bar.value = job.progress;
  const detail = [];
  if (making) {
    detail.push(say(job.stage));
    if (job.step) detail.push(say("step", { step: job.step, steps: job.steps }));
    if (job.eta_s != null && job.step < job.steps) detail.push(say("left", { time: time(job.eta_s) }));
    one.preview.want(job.preview);
  } else {
    const before = job.queue_position;
    detail.push(say("queued"), before > 0 ? say("place", { place: before }) : say("next"));
    if (job.eta_s != null) detail.push(say("left", { time: time(job.eta_s) }));
  }
  parts.said.textContent = detail.join(" · ");
}

function madeParts(job) {
  const parts = [];
  const file = `/v1/videos/${job.id}/content`;
  const still = job.num_frames === 1;
  if (job.status === "completed") {
    const view = make(still ? "img" : "video");
    if (still) {
      view.alt = job.prompt;
      view.loading = "lazy";
    } else {
      view.controls = true;
      view.loop = true;
      view.playsInline = true;
      view.preload = "none";
      view.poster = `${file}?variant=thumbnail`;
      view.setAttribute("aria-label", job.prompt);
    }
    const [width, height] = job.size.split("x");
    view.width = width;
    view.height = height;
    view.src = file;
    parts.push(view);
  }
  parts.push(make("h3", job.prompt));
  const took = job.inference_time_s == null ? "" : time(job.inference_time_s);
  parts.push(make("p", facts(job, say(job.status), took), "soft"));
  if (job.error) parts.push(make("p", job.error.message, "problem"));
  if (job.notes?.length) parts.push(make("p", say("unread", { notes: job.notes.join(" ") }), "soft"));
  parts.push(details(job), actions(job, file, still));
  return parts;
}

function actions(job, file, still) {
  const row = make("div", "", "actions");
  if (job.status === "completed") {
    const link = make("a", say("download"), "button");
    link.href = file;
    link.download = job.file_name ? `${job.id}-${job.file_name}` : job.id;
    link.setAttribute("aria-label", say("of", { action: say("download"), prompt: job.prompt }));
    row.append(link, button(say(still ? "start_from" : "continue"), job.prompt, () =>
      fill(job, {}, "extend_video_id")));
  }
  const files = job.files?.length ? "files_of_video_id" : null;
  const drawn = () => ({ seed: Math.floor(Math.random() * 2 ** 31) });
  row.append(
    button(say("again"), job.prompt, () => fill(job, {}, files)),
    button(say("vary"), job.prompt, () => fill(job, drawn(), files)),
    button(say("delete"), job.prompt, () => remove(job, "delete")));
  return row;
}

function details(job) {
  const box = make("details");
  box.append(make("summary", say("details")));
  const list = make("dl");
  const line = (name, value) => list.append(make("dt", name), make("dd", value));
  for (const [name, value] of Object.entries(job.settings ?? {}))
    line(has(`set_${name}`) ? say(`set_${name}`) : name, String(value));
  const inSeconds = (value) => say("seconds", { n: value.toFixed(value < 10 ? 2 : 0) });
  for (const [stage, seconds] of Object.entries(job.stage_durations ?? {})) {
    const name = `stage_${stage.replaceAll(" ", "_")}`;
    if (has(name)) line(say(name), inSeconds(seconds));
  }
  if (job.inference_time_s != null) line(say("total"), inSeconds(job.inference_time_s));
  if (job.peak_memory_mb != null) line(say("peak"), `${gigabytes(job.peak_memory_mb)} GB`);
  box.append(list);
  return box;
}

async function remove(job, question) {
  if (question && !(await confirmed(`ask_${question}`, `yes_${question}`))) return;
  try {
    await call(`/v1/videos/${job.id}`, { method: "DELETE" });
    gone(job.id);
    announce(say("said_deleted"));
  } catch (error) {
    if (error.status === 404) gone(job.id);
    else announce(words_of(error));
  }
}
