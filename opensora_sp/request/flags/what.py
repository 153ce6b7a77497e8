"""The flags that say what to generate: half of the table in flag_table.py."""

from opensora_sp.base.value_types import ValueType, boolean, integer, number, path, text
from opensora_sp.request.flags.flag import Group, flag
from opensora_sp.request.request import REQUEST_TYPES, SETTINGS_TYPES


def _looked_up(metavar: str, allowed: str) -> ValueType:
    """Text that is looked up in the size table later."""
    return ValueType(metavar, allowed, str, text(empty=False).legal)


_R, _S = REQUEST_TYPES, SETTINGS_TYPES
_BOOL = boolean()

REQUEST_GROUPS: tuple[Group, ...] = (
    (
        "What to generate",
        (
            flag("--prompt", _R["prompt"], None, "one or more prompts, one output each", nargs="+"),
            flag("--prompt-path", path("FILE"), None, "one prompt a line; or .csv, .json, .jsonl"),
            flag("--start-index", integer(0), 0, "first line or entry of the file, from 0"),
            flag("--end-index", integer(1), None, "line to stop before", shown_default="the end"),
            flag("--num-sample", _S["num_sample"], 1, "outputs per prompt, numbered -0, -1, ..."),
            flag("--seed", _R["seed"], 42, "one seed means one video on any device or rank count"),
        ),
    ),
    (
        "Size and length",
        (
            flag(
                "--resolution",
                _looked_up("NAME", "a resolution of the size table"),
                "240p",
                "row of the size table",
            ),
            flag(
                "--aspect-ratio",
                _looked_up("H:W", "an aspect ratio of the size table"),
                "9:16",
                "height:width, so 9:16 is landscape",
            ),
            flag(
                "--image-size",
                _R["height"],
                None,
                "height and width in pixels; wins over the two flags above",
                nargs=2,
            ),
            flag(
                "--num-frames",
                _looked_up("N|DURATION", "a number of frames or a duration of the table"),
                51,
                "2s 4s 8s 16s (51 102 204 408 frames), image (1), or a number of frames",
            ),
            flag("--fps", _R["fps"], 24, "frame rate told to the model; always 120 for one frame"),
            flag(
                "--save-fps",
                _R["save_fps"],
                24,
                "frame rate of the file",
            ),
            flag(
                "--frame-interval",
                integer(1, 1000),
                1,
                "accepted; --save-fps alone decides the frame rate of the file",
                note="--frame-interval {value} has no effect: --save-fps decides the file's rate",
            ),
        ),
    ),
    (
        "Sampling",
        (
            flag("--num-sampling-steps", _R["steps"], 30, "denoising steps"),
            flag("--cfg-scale", _R["cfg_scale"], 7.0, "guidance scale; 1 is no guidance"),
            flag(
                "--guidance",
                _S["guidance"],
                "auto",
                "guidance halves on a rank: together (auto), or serial: one by one, less memory",
            ),
        ),
    ),
    (
        "Prompt scores",
        (
            flag("--aes", _R["aes"], 6.5, "aesthetic score written into the prompt, or none"),
            flag("--flow", _R["flow"], None, "motion score written into the prompt"),
            flag("--camera-motion", _R["camera_motion"], None, "such as 'pan left', or none"),
            flag(
                "--llm-refine",
                _BOOL,
                False,
                "rewrite prompts with --prompt-generator at OPENAI_BASE_URL; needs OPENAI_API_KEY",
                feature="llm-refine",
            ),
            flag(
                "--prompt-generator",
                _S["prompt_generator"],
                None,
                "the language model that --llm-refine asks; there is no default",
                feature="llm-refine",
                shown_default="OPENAI_MODEL",
            ),
        ),
    ),
    (
        "References and loops",
        (
            flag(
                "--reference-path",
                text(metavar="PATHS"),
                None,
                "images or videos, one entry per prompt, joined by ; within an entry",
                nargs="+",
                feature="references",
            ),
            flag(
                "--mask-strategy",
                text(metavar="STRATEGY"),
                None,
                "loop,ref,ref_start,target_start,length,edit_ratio, one entry per prompt; a "
                "ref_start of end keeps the reference's last frames",
                nargs="+",
                feature="references",
            ),
            flag(
                "--image",
                path("FILE"),
                None,
                "start from this picture: --image cat.png",
                feature="references",
            ),
            flag(
                "--last-image",
                path("FILE"),
                None,
                "end near this picture: --image dawn.png --last-image dusk.png",
                feature="references",
            ),
            flag(
                "--extend",
                path("VIDEO"),
                None,
                "continue this video from its end: --extend waves.mp4",
                feature="references",
            ),
            flag(
                "--edit",
                path("VIDEO"),
                None,
                "make this video (or picture) anew: --edit waves.mp4 --edit-strength 0.6",
                feature="references",
            ),
            flag(
                "--edit-strength",
                number(0, 1, metavar="R"),
                0.5,
                "how much of --edit is made anew, 0 nothing to 1 everything",
            ),
            flag(
                "--reference-fps",
                _R["reference_fps"],
                None,
                "resample reference videos to this rate",
                shown_default="as they are",
            ),
            flag(
                "--allow-remote",
                _BOOL,
                False,
                "let references be http(s) addresses; bounded in size and time",
                nargs=0,
            ),
            flag(
                "--allow-private",
                _BOOL,
                False,
                "with --allow-remote: also addresses of this machine and of private networks",
                nargs=0,
            ),
            flag("--align", _R["align"], 5, "latent frames that strategy starts snap to"),
            flag("--loop", _R["loop"], 1, "clips, each continuing the last", feature="loops"),
            flag(
                "--condition-frame-length",
                _R["condition_frame_length"],
                5,
                "latent frames a clip takes from the one before, a multiple of 5",
            ),
            flag(
                "--loop-carry",
                _R["loop_carry"],
                "frames",
                "what a clip takes: the frames, encoded again, or the latents as they are",
            ),
        ),
    ),
)
