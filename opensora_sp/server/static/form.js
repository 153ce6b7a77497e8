// The form: what is sent, what the server says of it beside its fields, and what it will cost.
import { announce, by, call, gigabytes, say, time, words_of } from "/static/api.js";
import { clearFiles, filesToSend, onFilesChanged, takeEarlier } from "/static/files.js";

const form = by("new");
const WAIT_MS = 500;
// Fields of the API that are shown at a field of the page with another name.
const PLACES = { seconds: "num_frames", aspect_ratio: "size", image_size: "size",
  input_reference: "files", image: "files", last_image: "files", extend: "files", edit: "files",
  reference: "files", extend_video_id: "files", files_of_video_id: "files", mask_strategy: "files" };

// Only what differs from what the server would take anyway, and what is always chosen.
function fields() {
  const body = {};
  for (const one of form.elements) {
    if (!one.name || one.name === "shape" || one.value === "") continue;
    if (one.type === "radio" || one.type === "checkbox") {
      if (one.checked) body[one.name] = one.value;
    } else if (one.name === "edit_strength") {
      if (!by("strength").hidden) body[one.name] = one.value;
    } else if (["prompt", "seed", "size"].includes(one.name) || one.value !== one.defaultValue) {
      body[one.name] = one.value;
    }
  }
  const shape = form.elements.shape.value;
  if (body.size) delete body.resolution;
  else body[shape.includes(":") ? "aspect_ratio" : "size"] = shape;
  return body;
}

function problem(param, text) {
  const name = PLACES[param] ?? param;
  const place = form.querySelector(`[data-problem="${CSS.escape(name ?? "other")}"]`) ?? by("problem-other");
  place.textContent = text;
  const field = form.querySelector(`[aria-describedby~="${place.id}"]`);
  if (!field || place.id === "problem-other") return null;
  field.setAttribute("aria-invalid", "true");
  const folded = field.closest("details");
  if (folded) folded.open = true;
  return field;
}

function forget() {
  form.querySelectorAll("[data-problem]").forEach((one) => {
    if (one.id !== "problem-files") one.textContent = "";
  });
  form.querySelectorAll("[aria-invalid]").forEach((one) => one.removeAttribute("aria-invalid"));
}

export function setUpForm(sent) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    forget();
    if (!form.prompt.value.trim()) {
      problem("prompt", say("need_prompt")).focus();
      return;
    }
    const body = new FormData();
    const { files, fields: earlier } = filesToSend();
    for (const [name, value] of Object.entries({ ...fields(), ...earlier })) body.append(name, value);
    for (const [name, file] of files) body.append(name, file);
    by("send").disabled = true;
    try {
      sent(await (await call("/v1/videos", { method: "POST", body })).json());
      clearFiles();
      announce(say("sent"));
    } catch (error) {
      const field = problem(error.param, words_of(error));
      (field?.matches("fieldset") ? field.querySelector("input:checked") : field)?.focus();
    }
    by("send").disabled = false;
    by("send").blur();
    if (document.activeElement === document.body) form.prompt.focus({ preventScroll: true });
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  by("dice").addEventListener("click", () => {
    form.seed.value = Math.floor(Math.random() * 2 ** 31);
  });
  form.addEventListener("input", estimateSoon);
  onFilesChanged(estimateSoon);
  estimateSoon();
}

// The form as it was for an earlier video; changes wins over what that was made with.
export function fill(job, changes = {}, earlier = null) {
  forget();
  form.reset();
  form.prompt.value = job.prompt;
  const settings = { seed: job.seed, ...job.settings, ...changes };
  const shape = settings.aspect_ratio ?? settings.size;
  for (const [name, value] of Object.entries(settings)) {
    const radio = form.querySelector(`input[type=radio][name="${CSS.escape(name)}"][value="${CSS.escape(String(value))}"]`);
    const field = form.elements[name];
    if (radio) radio.checked = true;
    else if (field instanceof RadioNodeList || !field || name === "size") continue;
    else if (field.type === "checkbox") field.checked = ["true", "1", "on", true].includes(value);
    else field.value = value;
  }
  const known = form.querySelector(`input[name="shape"][value="${CSS.escape(shape ?? "")}"]`);
  if (known) known.checked = true;
  else if (settings.size) form.elements.size.value = settings.size;
  if (earlier) takeEarlier(earlier, job);
  else clearFiles();
  form.prompt.focus();
  form.scrollIntoView({ block: "start" });
  announce(say("filled"));
  estimateSoon();
}

// What it will cost, from the server. A server without estimates is asked once.
let timer = 0;
let asked = 0;
let estimates = true;
let waits = false; // whether what is shown depends on the jobs before it

export function estimateSoon() {
  clearTimeout(timer);
  if (estimates) timer = setTimeout(estimate, WAIT_MS);
}

// A job has left the queue. What was refused stays beside its field.
export function queueMoved() {
  if (waits && !form.querySelector("[aria-invalid]")) estimateSoon();
}

async function estimate() {
  const number = ++asked;
  const place = by("estimate");
  const unread = by("unread");
  const body = { ...fields() };
  body.prompt ||= "-";
  let found;
  try {
    const headers = { "content-type": "application/json" };
    const answer = await fetch("/v1/videos/estimate",
      { method: "POST", headers, body: JSON.stringify(body) });
    if ([401, 404, 405].includes(answer.status)) {
      estimates = answer.status === 401;
      place.textContent = unread.textContent = "";
      return;
    }
    found = await answer.json();
  } catch { place.textContent = unread.textContent = ""; return; }
  if (number !== asked) return; // a later one is on its way
  forget();
  waits = found.queue_s > 1;
  unread.textContent = found.notes?.length ? say("unread", { notes: found.notes.join(" ") }) : "";
  if (found.error) {
    place.textContent = "";
    problem(found.error.param, found.error.message);
    return;
  }
  const parts = [];
  if (found.fits === false) parts.push(say("estimate_misfit"));
  if (found.estimated_s != null) parts.push(say("estimate", { time: time(found.estimated_s) }));
  if (waits) parts.push(say("estimate_wait", { time: time(found.queue_s) }));
  if (found.peak_memory_mb != null)
    parts.push(say("estimate_memory", { size: gigabytes(found.peak_memory_mb) }));
  place.textContent = parts.join(" · ");
}
