// The files that a new video goes from: chosen, dropped, or taken from an earlier video.
import { by, button, make, say } from "/static/api.js";

const MOST = 2;
const ROLES = { picture: ["image", "last_image", "both", "edit"], video: ["extend", "edit"] };
let chosen = [];

let changed = () => {};
export const onFilesChanged = (act) => { changed = act; };

// What the server is sent: [field, file] of each file, and fields that name earlier videos.
export function filesToSend() {
  const files = [];
  const fields = {};
  for (const one of chosen) {
    if (one.field) fields[one.field] = one.id;
    else if (one.role === "both") files.push(["image", one.file], ["last_image", one.file]);
    else files.push([one.role, one.file]);
  }
  return { files, fields };
}

export function clearFiles() {
  chosen.forEach((one) => one.url && URL.revokeObjectURL(one.url));
  chosen = [];
  draw();
}

// An earlier video of the server's: field is extend_video_id or files_of_video_id.
export function takeEarlier(field, job) {
  clearFiles();
  const name = say(field === "extend_video_id" ? "file_extend" : "file_reuse", { prompt: job.prompt });
  const still = job.num_frames === 1;
  const role = field === "extend_video_id" ? (still ? "image" : "extend") : "other";
  chosen.push({ field, id: job.id, name, role });
  draw();
}

export function addFiles(list) {
  problem("");
  for (const file of list) {
    const kind = file.type.startsWith("image/") && file.type !== "image/gif" ? "picture"
      : file.type.startsWith("video/") || file.type === "image/gif" ? "video" : "";
    if (!kind) { problem(say("files_kind", { file: file.name })); continue; }
    if (chosen.length >= MOST) { problem(say("files_many")); break; }
    const taken = new Set(chosen.map((one) => one.role));
    const role = kind === "video" ? "extend" : taken.size && !taken.has("last_image") ? "last_image" : "image";
    chosen.push({ file, kind, role, name: file.name, url: URL.createObjectURL(file) });
  }
  draw();
}

function problem(text) {
  by("problem-files").textContent = text;
}

function effect() {
  const roles = chosen.map((one) => one.role).sort();
  const key = `effect_${roles.join("_")}`;
  const known = ["effect_image", "effect_last_image", "effect_image_last_image", "effect_both",
    "effect_extend", "effect_extend_last_image", "effect_edit"];
  if (!roles.length) return "";
  return say(known.includes(key) ? key : "effect_other");
}

function draw() {
  const list = by("files");
  list.replaceChildren(...chosen.map(row));
  const roles = chosen.flatMap((one) => (one.role === "both" ? ["image", "last_image"] : [one.role]));
  const twice = new Set(roles).size < roles.length;
  problem(twice ? say("files_twice") : "");
  by("effect").textContent = twice ? "" : effect();
  by("strength").hidden = !roles.includes("edit");
  changed();
}

function row(one) {
  const item = make("li");
  if (one.kind === "picture") {
    const view = make("img");
    view.src = one.url;
    view.alt = "";
    item.append(view);
  } else if (one.kind === "video") {
    const view = make("video");
    view.src = one.url;
    view.muted = true;
    view.preload = "metadata";
    view.setAttribute("aria-hidden", "true");
    view.tabIndex = -1;
    item.append(view);
  }
  item.append(make("span", one.name, "name"));
  if (one.kind) {
    const select = make("select");
    select.setAttribute("aria-label", say("role", { file: one.name }));
    for (const role of ROLES[one.kind]) {
      const option = make("option", say(`role_${role}`));
      option.value = role;
      option.selected = role === one.role;
      select.append(option);
    }
    select.addEventListener("change", () => {
      one.role = select.value;
      const place = chosen.indexOf(one);
      draw();
      by("files").querySelectorAll("select")[place]?.focus();
    });
    item.append(select);
  }
  const remove = button("×", "", () => {
    if (one.url) URL.revokeObjectURL(one.url);
    chosen = chosen.filter((other) => other !== one);
    draw();
    by("file").focus();
  });
  remove.setAttribute("aria-label", say("remove", { file: one.name }));
  item.append(remove);
  return item;
}

by("file").addEventListener("change", () => {
  addFiles(by("file").files);
  by("file").value = "";
});
const drop = by("drop");
for (const kind of ["dragover", "dragleave", "drop"])
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
