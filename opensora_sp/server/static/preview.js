// What a video will look like, while it is denoised: a strip of frames, played on a canvas.
import { make, say } from "/static/api.js";

const FRAME_MS = 250;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Preview {
  constructor(job) {
    this.id = job.id;
    const [width, height] = job.size.split("x").map(Number);
    this.shape = width / height;
    this.canvas = make("canvas", "", "preview");
    this.canvas.hidden = true;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", say("preview", { prompt: job.prompt }));
    this.shown = 0;
    this.frame = 0;
    this.timer = 0;
  }

  // The strip of a step; 0 where there is none yet.
  want(step) {
    if (!step || step === this.shown) return;
    this.shown = step;
    const strip = new Image();
    strip.src = `/v1/videos/${this.id}/preview?step=${step}`;
    strip.decode().then(() => this.play(strip), () => { /* it has ended meanwhile */ });
  }

  play(strip) {
    this.strip = strip;
    this.count = Math.max(1, Math.round(strip.width / (strip.height * this.shape)));
    this.canvas.width = strip.width / this.count;
    this.canvas.height = strip.height;
    this.canvas.hidden = false;
    this.canvas.dataset.step = this.shown;
    this.draw();
    this.timer ||= setInterval(() => { if (!still.matches) { this.frame++; this.draw(); } }, FRAME_MS);
  }

  draw() {
    const { width, height } = this.canvas;
    this.canvas.getContext("2d").drawImage(
      this.strip, (this.frame % this.count) * width, 0, width, height, 0, 0, width, height);
  }

  end() {
    clearInterval(this.timer);
  }
}
