"""Which features go together: one table, applied to every request and printed in docs/flags.md."""

from opensora_sp.base.errors import UserError
from opensora_sp.media.watermark import SMALLEST_HEIGHT, SMALLEST_WIDTH, fits
from opensora_sp.parallel.backend_table import BACKENDS
from opensora_sp.request import sizes
from opensora_sp.request.flags.shortcuts import TYPED
from opensora_sp.request.flags.table import declared_flags
from opensora_sp.request.rules import REQUEST_COMBINATIONS, Combination, Values


def _is_default(values: Values, key: str) -> bool:
    return bool(values[key] == declared_flags()[key].default)


def _moved(values: Values) -> bool:
    return not (_is_default(values, "resolution") and _is_default(values, "aspect_ratio"))


def _typed(values: Values) -> list[str]:
    return [k for k in TYPED if values[k] is not None]


def _too_small_for_a_mark(values: Values) -> bool:
    size = sizes.resolve_size(values["resolution"], values["aspect_ratio"], values["image_size"])
    # What is decoded is rounded down to multiples of 8, as both limits are: the answer is the same.
    return not fits(*size)


def _styled(values: Values) -> bool:
    """Whether the mark is not the plain one: where that has no room, the request is refused."""
    own = any(values[f"watermark_{name}"] is not None for name in ("text", "size", "font"))
    return own or values["label"] == "cn"


COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        features="--prompt + --prompt-path",
        outcome="note",
        meets=lambda v: bool(v["prompt"]) and v["prompt_path"] is not None,
        text="--prompt-path {prompt_path!r} is not read, because --prompt is given",
    ),
    Combination(
        features="--prompt + --start-index / --end-index",
        outcome="note",
        meets=lambda v: bool(v["prompt"]) and (v["start_index"] > 0 or v["end_index"] is not None),
        text="--start-index and --end-index have no effect: they count the lines of --prompt-path",
    ),
    Combination(
        features="--start-index + --end-index",
        outcome="refused",
        meets=lambda v: v["end_index"] is not None and v["end_index"] <= v["start_index"],
        text="--end-index {end_index} is not above --start-index {start_index}: no line is left",
    ),
    Combination(
        features="--image-size + --resolution / --aspect-ratio",
        outcome="note",
        meets=lambda v: v["image_size"] is not None and _moved(v),
        text="--image-size wins over --resolution {resolution} --aspect-ratio {aspect_ratio}",
    ),
    Combination(
        features="one frame + --fps",
        outcome="note",
        meets=lambda v: v["num_frames"] == 1 and not _is_default(v, "fps"),
        text="--fps {fps} has no effect on one frame: the model is told 120",
    ),
    *REQUEST_COMBINATIONS,
    Combination(
        features="--loop + frames that are not whole chunks",
        outcome="note",
        meets=lambda v: (
            v["loop"] > 1
            and v["loop_carry"] == "latents"
            and (v["num_frames"] % 17 != 0 or v["micro_frame_size"] != 17)
        ),
        text="--loop {loop} with --loop-carry latents joins clips without a jump only when "
        "--num-frames is a multiple of 17 (2s, 4s, 8s and 16s are): here it is {num_frames}, in "
        "chunks of {micro_frame_size}; --loop-carry frames fits any length",
    ),
    Combination(
        features="typed references + --reference-path / --mask-strategy",
        outcome="refused",
        meets=lambda v: bool(_typed(v)) and bool(v["reference_path"] or v["mask_strategy"]),
        text="--image, --last-image, --extend and --edit are written for you as --reference-path "
        "and --mask-strategy: give one or the other",
    ),
    Combination(
        features="--edit + --image / --last-image / --extend",
        outcome="refused",
        meets=lambda v: v["edit"] is not None and len(_typed(v)) > 1,
        text="--edit {edit!r} makes every frame anew from one video: leave --image, --last-image "
        "and --extend out",
    ),
    Combination(
        features="--image + --extend",
        outcome="refused",
        meets=lambda v: v["image"] is not None and v["extend"] is not None,
        text="--image {image!r} and --extend {extend!r} both give the first frames: choose one",
    ),
    Combination(
        features="one frame + --last-image / --extend",
        outcome="refused",
        meets=lambda v: (
            v["num_frames"] == 1 and (v["last_image"] is not None or v["extend"] is not None)
        ),
        text="--last-image and --extend need a video, but --num-frames is 1: give more frames",
    ),
    Combination(
        features="--edit + --edit-strength 1",
        outcome="note",
        meets=lambda v: v["edit"] is not None and v["edit_strength"] == 1,
        text="--edit {edit!r} is not used: --edit-strength 1 makes everything anew",
    ),
    Combination(
        features="--allow-private without --allow-remote",
        outcome="note",
        meets=lambda v: v["allow_private"] and not v["allow_remote"],
        text="--allow-private has no effect without --allow-remote",
    ),
    Combination(
        features="--edit-strength without --edit",
        outcome="note",
        meets=lambda v: v["edit"] is None and not _is_default(v, "edit_strength"),
        text="--edit-strength {edit_strength} has no effect without --edit",
    ),
    Combination(
        features="--loop-carry without --loop",
        outcome="note",
        meets=lambda v: v["loop"] == 1 and not _is_default(v, "loop_carry"),
        text="--loop-carry {loop_carry} has no effect with one clip",
    ),
    Combination(
        features="--cfg-scale 1 + --guidance",
        outcome="note",
        meets=lambda v: v["cfg_scale"] == 1 and not _is_default(v, "guidance"),
        text="--guidance {guidance} has no effect: --cfg-scale 1 needs no unconditional branch",
    ),
    Combination(
        features="--cfg-scale 1 + --guidance-parallel 2",
        outcome="refused",
        meets=lambda v: v["cfg_scale"] == 1 and v["guidance_parallel"] == 2,
        text="--guidance-parallel 2 needs two CFG branches, but --cfg-scale 1 has one: "
        "leave --guidance-parallel out",
    ),
    Combination(
        features="--device + --backend",
        outcome="refused",
        meets=lambda v: (
            None not in (v["device"], v["backend"])
            and not BACKENDS[v["backend"]].serves(v["device"])
        ),
        text="--backend {backend} does not serve --device {device}: leave --backend out",
    ),
    Combination(
        features="--launcher colossalai + --timeout",
        outcome="note",
        meets=lambda v: v["launcher"] == "colossalai" and not _is_default(v, "timeout"),
        text="--timeout {timeout:g} has no effect on collectives with --launcher colossalai, which "
        "takes none: --heartbeat-timeout and --deadlines still hold",
    ),
    Combination(
        features="--device cpu + --dtype fp16",
        outcome="note",
        meets=lambda v: v["device"] == "cpu" and v["dtype"] == "fp16",
        text="--dtype fp16 is slow on a CPU; fp32 or bf16 is faster",
    ),
    Combination(
        features="--prompt-as-path + --sample-name",
        outcome="note",
        meets=lambda v: v["prompt_as_path"] and v["sample_name"] is not None,
        text="--sample-name {sample_name!r} is put before each prompt in the file names",
    ),
    Combination(
        features="--resume + --overwrite",
        outcome="refused",
        meets=lambda v: v["resume"] and v["overwrite"],
        text="--resume goes on with what is there and --overwrite begins it again: choose one",
    ),
    Combination(
        features="--prompt-generator without --llm-refine",
        outcome="note",
        meets=lambda v: v["prompt_generator"] is not None and not v["llm_refine"],
        text="--prompt-generator {prompt_generator!r} has no effect without --llm-refine true",
    ),
    Combination(
        features="--watermark + a small picture",
        outcome="note",
        meets=lambda v: v["watermark"] and not _styled(v) and _too_small_for_a_mark(v),
        text="--watermark {watermark} has no effect: pictures under "
        f"{SMALLEST_HEIGHT}x{SMALLEST_WIDTH} (height x width) are too small for it",
    ),
    Combination(
        features="--watermark + --label cn",
        outcome="note",
        meets=lambda v: v["watermark"] and v["label"] == "cn",
        text="--watermark {watermark} adds nothing to --label cn, which has a mark of its own",
    ),
    Combination(
        features="--label-producer without --label cn",
        outcome="note",
        meets=lambda v: v["label_producer"] is not None and v["label"] != "cn",
        text="--label-producer {label_producer} has no effect without --label cn",
    ),
)


def check_combinations(values: Values) -> list[str]:
    """The notes of every combination that is met; raises UserError at the first refused one."""
    notes = []
    for combination in COMBINATIONS:
        if combination.meets(values):
            said = combination.text.format(**values)
            if combination.outcome == "refused":
                raise UserError(said)
            notes.append(said)
    return notes
