"""What one job does with its outputs: it changes from job to job while the models stay warm."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from opensora_sp.base.value_types import (
    ValueType,
    boolean,
    choice,
    file_stem,
    integer,
    number,
    optional,
    path,
    text,
)
from opensora_sp.media.labels import Law, is_producer
from opensora_sp.media.watermark import Place
from opensora_sp.request.setting import Declared, a_path, setting


def _verbosity() -> ValueType:
    """0 to 2; also a boolean, because scripts written for the reference say True."""
    level, truth = integer(0, 2), boolean()

    def read(value: str) -> int:
        return int(value) if value.strip().isdecimal() else int(truth.read(value))

    return ValueType("{0,1,2}", "0, 1, 2, true or false", read, level.legal)


def _producer() -> ValueType:
    """A name or a code, in the characters that GB 45438-2025 has for it."""
    return ValueType(
        "NAME",
        "1 to 200 ASCII letters, digits and signs, without spaces, quotes and backslashes, such as "
        "the provider's registered code",
        str.strip,
        lambda value: isinstance(value, str) and is_producer(value),
    )


@dataclass(frozen=True, kw_only=True)
class JobSettings(Declared):
    """Where a job's outputs go, how they are named and written, and what is saved on the way.

    `sample_name` None: "sample", or nothing before the prompt with `prompt_as_path`.
    `save_every` counts denoising steps; 0 saves finished clips only.

    Raises UserError, naming the field, for a value that is not legal.
    """

    save_dir: Path = setting(
        "--save-dir",
        path("DIR"),
        Path("samples/samples"),
        "where outputs are written",
        changes="nothing",
        flag_default="./samples/samples/",
    )
    sample_name: str | None = setting(
        "--sample-name",
        file_stem(),
        None,
        "start of the file names",
        changes="nothing",
        shown_default="sample",
    )
    prompt_as_path: bool = setting(
        "--prompt-as-path",
        boolean(),
        False,
        "name files after their prompts, and skip those that exist",
        changes="nothing",
        nargs=0,
    )
    num_sample: int = setting(
        "--num-sample",
        integer(1, 10_000),
        1,
        "outputs per prompt, numbered -0, -1, ...",
        changes="nothing",
    )
    batch_size: int = setting(
        "--batch-size", integer(1, 10_000), 1, "prompts denoised together", changes="nothing"
    )
    verbose: int = setting(
        "--verbose", _verbosity(), 1, "0 quiet, 1 progress, 2 everything", changes="nothing"
    )
    # The two that refine the prompt: an identity has them as one, "refined by".
    llm_refine: bool = setting(
        "--llm-refine",
        boolean(),
        False,
        "rewrite prompts with --prompt-generator at OPENAI_BASE_URL; needs OPENAI_API_KEY",
        changes="content",
    )
    prompt_generator: str | None = setting(
        "--prompt-generator",
        optional(text(empty=False), word="null"),
        None,
        "the language model that --llm-refine asks; there is no default",
        changes="content",
        shown_default="OPENAI_MODEL",
    )
    watermark: bool = setting(
        "--watermark",
        boolean(),
        False,
        "write that it is AI generated, or --watermark-text, in a corner of every frame",
        changes="file",
    )
    watermark_text: str | None = setting(
        "--watermark-text",
        optional(text(empty=False), word="null"),
        None,
        "what the watermark says",
        changes="file",
        shown_default="AI generated · Open-Sora, less where room is short; Chinese of --label cn",
    )
    watermark_size: float | None = setting(
        "--watermark-size",
        optional(number(1, 50, metavar="PERCENT"), word="auto"),
        None,
        "height of its capital letters, in percent of the picture's shorter side",
        changes="file",
        shown_default="small; 5 with --label cn",
    )
    watermark_place: str = setting(
        "--watermark-place",
        choice(*get_args(Place)),
        "bottom-right",
        "its corner",
        changes="file",
    )
    watermark_font: str | None = setting(
        "--watermark-font",
        optional(path("FILE"), word="null"),
        None,
        "a font file (.otf, .ttf, .ttc) for characters that the package's own font lacks",
        changes="file",
        stored_as="watermark font",
    )
    label: str = setting(
        "--label",
        choice(*get_args(Law)),
        "none",
        "mark outputs as generated: cn in the picture and in the file, after China's "
        "GB 45438-2025; eu in the file, for the EU's AI Act (docs/labels.md)",
        changes="file",
    )
    label_producer: str | None = setting(
        "--label-producer",
        optional(_producer(), word="null"),
        None,
        "name or code of who provides the service, which --label cn writes into the file",
        changes="file",
    )
    label_certificate: str | None = setting(
        "--label-certificate",
        optional(path("FILE"), word="null"),
        None,
        "your certificate and those above it, PEM, with which --label eu signs a C2PA manifest",
        changes="file",
        stored_as="signed by",
    )
    label_key: str | None = setting(
        "--label-key",
        optional(path("FILE"), word="null"),
        None,
        "the private key of --label-certificate, PEM, not encrypted",
        changes="nothing",
    )
    lossless: bool = setting(
        "--lossless",
        boolean(),
        False,
        "videos as RGB H.264, every pixel kept; large, and few players show it",
        changes="file",
        nargs=0,
    )
    sheet: bool = setting(
        "--sheet",
        boolean(),
        False,
        "also write sheet.html: three frames of each output, settings, timings",
        changes="nothing",
        nargs=0,
    )
    save_every: int = setting(
        "--save-every",
        integer(0),
        10,
        "steps between two saves of what is being denoised; 0: finished clips only",
        changes="nothing",
    )
    resume: bool = setting(
        "--resume",
        boolean(),
        False,
        "go on where a run was cut off (it does so anyway), and say if nothing was begun",
        changes="nothing",
        nargs=0,
    )
    decode_only: bool = setting(
        "--decode-only",
        boolean(),
        False,
        "turn saved latents into files; refused where a video is not denoised yet",
        changes="nothing",
        nargs=0,
    )
    keep_state: bool = setting(
        "--keep-state",
        boolean(),
        False,
        "keep the latents of finished videos, so that --decode-only can use them again",
        changes="nothing",
        nargs=0,
    )
    overwrite: bool = setting(
        "--overwrite",
        boolean(),
        False,
        "make every output anew; without, finished ones are skipped and others kept",
        changes="nothing",
        nargs=0,
    )

    def __post_init__(self) -> None:
        self.check_values()
        object.__setattr__(self, "save_dir", a_path("save_dir", self.save_dir))

    @property
    def default_names(self) -> bool:
        """Whether nobody named the outputs: another request then gets a name that is free."""
        return self.sample_name is None and not self.prompt_as_path

    @property
    def skip_existing(self) -> bool:
        """Whether an output that is there already is left alone, whatever it shows."""
        return self.prompt_as_path

    @property
    def sheet_path(self) -> Path:
        """Where the contact sheet of the run goes, if one is wanted."""
        start = "" if self.sample_name is None else f"{self.sample_name}-"
        return self.save_dir / f"{start}sheet.html"
