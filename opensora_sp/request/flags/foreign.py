"""Flags of other programs that people bring, and what they are called or why they are not here.

Of diffusers' and Open-Sora's scripts, VideoSys, xDiT, Wan, HunyuanVideo, CogVideoX and
SGLang-Diffusion. Names are written without dashes in front, with `-` for `_`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from opensora_sp.parallel.backend_table import DEVICES


@dataclass(frozen=True)
class Foreign:
    """One or more flags of other programs.

    use: the flags of this program that do it, none where nothing does. why: what differs, or why
    nothing does.
    """

    names: tuple[str, ...]
    use: tuple[str, ...] = ()
    why: str = ""


def _same(use: str, *names: str, why: str = "") -> Foreign:
    return Foreign(names, tuple(use.split()), why)


def _none(why: str, *names: str) -> Foreign:
    return Foreign(names, (), why)


FOREIGN: tuple[Foreign, ...] = (
    _same(
        "--num-sampling-steps",
        *("steps", "num-steps", "num-inference-steps", "inference-steps", "infer-steps"),
        *("sample-steps", "sampling-steps", "denoising-steps", "num-denoising-steps", "n-steps"),
    ),
    _same(
        "--image-size",
        *("size", "height", "width", "video-size", "sample-size", "max-area", "h", "w", "hw"),
        *("image-height", "image-width", "video-height", "video-width"),
        why="it takes height and width as two numbers, such as --image-size 480 832; or choose "
        "--resolution and --aspect-ratio",
    ),
    _same("--aspect-ratio", "ratio", "ar", why="height:width, so 9:16 is landscape"),
    _same(
        "--num-frames",
        *("frames", "frame-num", "video-length", "length", "n-frames", "num-video-frames"),
        *("duration", "seconds", "video-frames", "frame-count", "f"),
        why="a number of frames, or 2s 4s 8s 16s",
    ),
    _same(
        "--save-fps --fps",
        "frame-rate",
        "framerate",
        "frames-per-second",
        "video-fps",
        "export-fps",
        "output-fps",
        "target-fps",
        why="the first is the file's rate, the second what the model is told",
    ),
    _same(
        "--cfg-scale",
        *("cfg", "guidance-scale", "scale", "guide-scale", "sample-guide-scale", "g"),
        *("embedded-cfg-scale", "unconditional-guidance-scale", "true-cfg-scale", "text-cfg"),
    ),
    _same("--seed", "base-seed", "random-seed", "noise-seed", "manual-seed", "generator-seed"),
    _same("--prompt", "text", "caption", "prompts", "p", "input-prompt", "positive-prompt"),
    _same(
        "--prompt-path",
        *("prompt-file", "prompts-file", "txt-file", "text-file", "prompt-list", "input-file"),
        *("prompts-path", "dataset-data-path", "prompt-csv", "from-file"),
    ),
    _same(
        "--save-dir --sample-name",
        *("output", "o", "output-path", "output-dir", "outdir", "out-dir", "save-file"),
        *("save-path", "output-file", "output-video-path", "output-folder", "result-dir"),
        *("save-name", "filename", "output-name", "save-video-path", "results-dir", "save"),
        why="the folder, and the start of the file names in it",
    ),
    _same(
        "--num-sample",
        *("num-videos", "num-outputs", "num-samples", "n-samples", "num-videos-per-prompt"),
        *("num-images-per-prompt", "num-outputs-per-prompt", "n"),
    ),
    _same(
        "--image",
        *("image-path", "img", "img-path", "input-image", "init-image", "cond-image", "ref-image"),
        *("i2v-image-path", "image-or-video-path", "first-frame", "start-image", "i"),
        *("conditional-image", "image-url", "input-image-path"),
    ),
    _same("--last-image", "last-frame", "end-image", "end-frame", "tail-image", "last-frame-path"),
    _same(
        "--edit",
        "video",
        "video-path",
        "input-video",
        "init-video",
        "src-video",
        why="to make a video anew; --extend continues one",
    ),
    _same("--edit-strength", "strength", "denoising-strength", "denoise-strength"),
    _same("--reference-path", "ref", "refs", "reference", "references", "ref-path", "cond-path"),
    _same("--mask-strategy", "mask", "mask-path", "condition-strategy"),
    _same("--aes", "aesthetic-score", "aes-score"),
    _same("--flow", "motion-score", "motion-strength", "motion-bucket-id"),
    _same("--camera-motion", "camera", "camera-type"),
    _same(
        "--sequence-parallel",
        *("sp", "sp-size", "sequence-parallel-size", "context-parallel-size", "cp-size", "cp"),
        *("ulysses-degree", "ulysses-size", "ulysses", "ulysses-parallel-degree", "ring-degree"),
        *("ring-size", "ring", "sequence-parallel-degree", "context-parallel-degree"),
        *("enable-sequence-parallelism", "sp-degree", "dsp-size"),
        why="the ranks that torchrun starts are used without it; splits may be uneven",
    ),
    _same(
        "--guidance-parallel",
        *("use-cfg-parallel", "cfg-parallel", "enable-cfg-parallel", "cfg-degree", "cfg-size"),
        *("split-batch", "cfg-parallel-degree", "cfg-parallel-size"),
        why="2 puts the CFG branches on different ranks, which is what an even number does "
        "by itself",
    ),
    _same(
        "--replicas",
        "dp",
        "dp-size",
        "data-parallel-size",
        "data-parallel-degree",
        "dp-degree",
        "enable-data-parallel",
        "num-replicas",
    ),
    _none(
        "the weights are not split; --sequence-parallel shares the work, and --memory small keeps "
        "the layers in host memory",
        *("tp", "tp-size", "tensor-parallel-size", "tensor-parallel-degree", "tp-degree"),
        *("pp", "pp-size", "pipefusion-parallel-degree", "pipeline-parallel-size"),
        *("num-pipeline-patch", "use-fsdp", "fsdp", "dit-fsdp", "t5-fsdp", "use-hsdp"),
        *("hsdp-shard-dim", "use-fsdp-inference", "zero", "zero-stage"),
    ),
    _none(
        "torchrun says how many ranks there are: torchrun --nproc_per_node N --no-python "
        "opensora-sp generate ...",
        *("num-gpus", "ngpus", "gpus", "num-devices", "nproc-per-node", "nproc", "n-gpus"),
        *("world-size", "gpu-ids", "devices", "gpu", "nnodes", "node-rank", "master-addr"),
        *("master-port",),
    ),
    _same("--backend", "dist-backend", "distributed-backend"),
    _same("--timeout", "dist-timeout", "nccl-timeout"),
    _same(
        "--memory",
        *("enable-model-cpu-offload", "enable-sequential-cpu-offload", "offload", "offload-model"),
        *("cpu-offload", "use-cpu-offload", "model-cpu-offload", "dit-cpu-offload", "low-vram"),
        *("lowvram", "low-memory", "offload-mode", "group-offload", "enable-group-offload"),
        *("dit-layerwise-offload", "vae-cpu-offload", "pin-cpu-memory", "highvram", "medvram"),
        why="balanced is model offload, small is layer offload",
    ),
    _same(
        "--t5-device",
        *("t5-cpu", "text-encoder-cpu-offload", "text-encoder-offload", "text-encoder-device"),
    ),
    _same(
        "--t5-weights",
        "t5-quant",
        "t5-int8",
        "text-encoder-quant",
        "load-text-encoder-8bit",
        "load-in-8bit",
        why="int8 is for the text encoder alone",
    ),
    _same(
        "--micro-batch-size",
        *("enable-vae-tiling", "enable-vae-slicing", "enable-tiling", "enable-slicing", "tiled"),
        *("vae-tiling", "use-vae-tiling", "vae-slicing", "tiled-vae", "vae-batch-size"),
        *("vae-micro-batch-size", "decode-chunk-size", "tile-size"),
        why="frames that the VAE takes at once; --memory chooses smaller chunks by itself",
    ),
    _same(
        "--vae-decode",
        "vae-parallel",
        "use-parallel-vae",
        "enable-parallel-vae",
        "vae-sp",
        "parallel-vae",
        why="shared: all ranks decode",
    ),
    _same("--micro-frame-size", "vae-micro-frame-size", "micro-frames"),
    _same("--batch-size", "bs", "b", "train-batch-size"),
    _same(
        "--dtype",
        "precision",
        "torch-dtype",
        "weight-dtype",
        "data-type",
        "mixed-precision",
        "fp16",
        "bf16",
        "half",
        "param-dtype",
        "dit-precision",
        "vae-precision",
        why="fp32, fp16 or bf16",
    ),
    _same("--verbose", "v", "debug", "log-level", "quiet", "logging-level", why="0, 1 or 2"),
    _same("--config", "cfg-path", "config-path", "config-file", "yaml", "c"),
    _same("--print-config", "dry-run", "show-config"),
    _same(
        "--ckpt-path-dit --ckpt-path-t5 --ckpt-path-vae2d --ckpt-path-vae3d",
        *("ckpt", "ckpt-path", "ckpt-dir", "checkpoint", "checkpoint-path", "model", "model-path"),
        *("model-base", "model-id", "model-name", "pretrained-model-name-or-path", "weights"),
        *("load", "from-pretrained", "model-dir", "checkpoint-dir", "weights-path", "m"),
        *("pretrained-model-path", "transformer-path"),
        why="a directory for each of the four models",
    ),
    _same("--ckpt-path-dit", "dit-weight", "dit-path", "dit-ckpt", "ckpt-dit"),
    _same(
        "--ckpt-path-t5",
        "text-encoder-path",
        "t5-path",
        "text-encoder",
        "t5",
        "tokenizer",
        "tokenizer-path",
    ),
    _same("--ckpt-path-vae3d --ckpt-path-vae2d", "vae", "vae-path", "vae-ckpt", "vae-dir"),
    _same(
        "--model-max-length",
        "max-sequence-length",
        "max-length",
        "text-len",
        "max-tokens",
        "tokenizer-max-length",
    ),
    _same(
        "--enable-compile",
        "compile",
        "torch-compile",
        "use-torch-compile",
        "use-compile",
        "enable-torch-compile",
        "enable-compilation",
        "compile-mode",
    ),
    _same(
        "--llm-refine --prompt-generator",
        "use-prompt-extend",
        "prompt-extend",
        "prompt-extend-model",
        "prompt-extend-method",
        "refine-prompt",
        "prompt-rewrite",
        "enhance-prompt",
        "use-prompt-enhancer",
        "prompt-enhance",
        "prompt-upsampling",
        "upsample-prompt",
    ),
    _same("--loop", "loops", "num-clips", "num-segments", "num-loops"),
    _same(
        "--condition-frame-length",
        "overlap-frames",
        "overlap-history",
        "cond-frames",
        "num-condition-frames",
    ),
    _same("--align", "frame-align"),
    _same("--watermark", "add-watermark", "enable-watermark"),
    _same("--overwrite", "force", "y", "yes", "no-skip-existing"),
    _same(
        "--resume",
        "continue",
        "skip-existing",
        "resume-from",
        "resume-from-checkpoint",
        why="a run goes on where it was, and finished outputs are skipped, without any flag",
    ),
    _same(
        "--attention",
        "use-flash-attn",
        "enable-flash-attn",
        "flash-attention",
        "xformers",
        "enable-xformers-memory-efficient-attention",
        "attention-backend",
        "attn-mode",
        "enable-xformers",
        "use-xformers",
        "sdpa",
        "attn-backend",
        "attention-type",
        why="without it the fastest attention kernel of the device is chosen",
    ),
    _same("--layernorm-kernel", "enable-layernorm-kernel", "use-fused-layernorm"),
    _same(
        "--device",
        "use-cpu",
        "cpu",
        "cuda",
        "accelerator",
        "no-cuda",
        "platform",
        why=f"{', '.join(DEVICES[:-1])} or {DEVICES[-1]}; by default the first that is there",
    ),
    _same("--guidance", "cfg-batch", "sequential-cfg", why="serial: one branch after the other"),
    _none(
        "Open-Sora 1.2 is guided by a learnt empty caption, not by a second text: say in --prompt "
        "what is to be seen",
        *("negative-prompt", "neg-prompt", "neg", "n-prompt", "negative", "uncond-prompt"),
        *("negative-prompts", "sample-neg-prompt", "negative-prompt-file"),
    ),
    _none(
        "adapters are not read: merge them into the transformer's weights and give the result as "
        "--ckpt-path-dit",
        *("lora", "lora-path", "lora-scale", "lora-weights", "lora-dir", "loras", "use-lora"),
        *("lora-alpha", "lora-rank", "lora-nickname", "adapter", "adapters", "lora-weight"),
    ),
    _none(
        "there is one sampler, Open-Sora 1.2's rectified flow",
        *("scheduler", "sampler", "sample-solver", "solver", "sample-scheduler", "flow-solver"),
        *("eta", "sigmas", "denoise-type", "use-karras-sigmas"),
    ),
    _none(
        "the timestep shift follows from the size and length, as the model was trained",
        *("shift", "flow-shift", "sample-shift", "time-shift", "flow-reverse", "shift-scale"),
        *("use-timestep-transform",),
    ),
    _same(
        "--step-cache",
        *("use-teacache", "teacache", "teacache-thresh", "enable-teacache", "use-cache", "cache"),
        *("use-fbcache", "use-fora", "enable-pab", "pab", "use-pab", "cache-dit", "deepcache"),
        *("enable-cache", "fast-mode", "cache-type", "step-caching", "enable-cache-dit"),
        why="near-lossless or fast leaves steps out; it changes the video",
    ),
    _none(
        "only the text encoder can be quantised (--t5-weights int8)",
        *("quant", "quantize", "quantization", "use-fp8", "fp8", "int8", "int4", "quantize-type"),
        *("load-in-4bit", "fp8-gemm", "use-fp8-gemm", "use-fp8-t5-encoder", "dit-quant"),
        *("transformer-quant", "quant-type"),
    ),
    _none(
        "there is one model, Open-Sora 1.2; what is made follows from the flags that are given",
        *("task", "model-type", "model-config", "pipeline", "cond-type", "generate-type", "mode"),
        *("model-resolution", "class-name", "version-type", "type"),
    ),
    _none(
        "size, length and frame rate are always told to the model, as it was trained",
        "multi-resolution",
    ),
    _none(
        "the frames that --loop carries over are kept as they are; --mask-strategy has an edit "
        "ratio for references",
        "condition-frame-edit",
    ),
    _none(
        "nothing is trained: this program only generates",
        *("data-path", "outputs", "lr", "wandb", "start-from-scratch", "warmup-steps"),
        *("record-time", "epochs", "grad-checkpoint", "ema-decay"),
    ),
    _none("nothing is filtered or checked for safety", "enable-safety-checker", "safety-checker"),
    _none(
        "opensora-sp serve is the command that keeps the models loaded and listens (opensora-sp "
        "serve --help)",
        *("port", "host", "server", "share", "listen", "gradio", "serve"),
    ),
    _none(
        "Hugging Face is never asked at run time: opensora-sp download fetches weights",
        "hf-token",
        "token",
        "revision",
        "cache-dir",
        "local-files-only",
        "hub-token",
        "trust-remote-code",
        "variant",
    ),
)


def explain(name: str) -> str | None:
    """What to write in place of a flag of another program, None where it is not known.

    name: with its dashes, as typed; underscores count as dashes.
    """
    key = name.lstrip("-").replace("_", "-").lower()
    entry = _BY_NAME.get(key) or _BY_NAME.get(key.removeprefix("no-"))
    if entry is None:
        return None
    why = f": {entry.why}" if entry.why else ""
    if not entry.use:
        return f"not supported{why}"
    return f"here it is {' and '.join(entry.use)}{why}"


def _named() -> Iterator[tuple[str, Foreign]]:
    for entry in FOREIGN:
        for name in entry.names:
            yield name, entry


_BY_NAME: Mapping[str, Foreign] = dict(_named())
