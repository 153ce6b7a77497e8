"""Whether a request fits, by which mode, and what it costs: answered without torch or a model."""

import sys
from collections.abc import Sequence

from opensora_sp import __version__
from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import note, on_any_screen
from opensora_sp.base.wording import plural
from opensora_sp.cli.console import refuse
from opensora_sp.cli.help import help_asked, program_help
from opensora_sp.planner.devices import CARDS, GB, parse_memory, usable
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.reasons import unexpected_peaks
from opensora_sp.planner.report import describe, grid, verdict
from opensora_sp.planner.requests import options_of, shape_of
from opensora_sp.request.engine_settings import MODELS
from opensora_sp.request.preflight import check_checkpoints
from opensora_sp.request.request import EngineSettings, Request
from opensora_sp.request.setting import from_flags
from opensora_sp.request.settings import (
    Values,
    check_request,
    compose_references,
    parse_command_line,
    resolve,
    size_of,
)

DOES_NOT_FIT = 1


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns 0 where it fits, 1 where not, 2 where it is refused."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return refuse(error, same_everywhere=True)


def _main(argv: Sequence[str]) -> int:
    if (asked := help_asked(argv)) is not None:
        sys.stdout.write(program_help("plan", asked))
        return 0
    command = parse_command_line(argv)
    if command.version:
        print(f"opensora_sp {__version__}")
        return 0
    values = resolve(command, program="plan")
    notes = check_request(values, world_size=values["ranks"])
    for each in notes:
        note(each)
    return _answer(values)


def _answer(values: Values) -> int:
    height, width = size_of(values)
    values = compose_references(values, 1)
    requests = [
        Request(
            **from_flags(Request, values),
            prompt="",
            reference_path="given" if values["reference_path"] else "",
            mask_strategy=strategy,
            height=height,
            width=width,
        )
        for strategy in values["mask_strategy"] or [""]
    ]
    checkpoints = check_checkpoints({name: values[f"ckpt_path_{name}"] for name in MODELS})
    settings = EngineSettings(**from_flags(EngineSettings, values))
    # Without paths the published models are meant: the embedded one fits everywhere.
    models = ModelSizes() if checkpoints is None else ModelSizes.read(checkpoints)
    if settings.device_memory is None:
        raise UserError(
            f"--device-memory is needed, such as 48GB or one of the cards {', '.join(CARDS)}"
        )
    memory = parse_memory(settings.device_memory)
    transformer = None if checkpoints is None else checkpoints.dit
    batch = values["batch_size"]
    shape = shape_of(requests[0], settings, batch, transformer, requests[:batch])
    options = options_of(settings)
    ranks = values["ranks"]
    if values["table"]:
        print(
            f"{memory / GB:.0f} GB ({usable(memory) / GB:.1f} for tensors), "
            f"{plural(ranks, 'rank')}, {shape.dtype}: the fastest mode that fits, GB by stage"
        )
        print(grid(ranks, models, options, memory, shape))
        return 0
    plan, said, fits = verdict(shape, ranks, models, options, memory)
    print(describe(plan, memory, values["flop_rate"], values["link_rate"]))
    for line in unexpected_peaks(plan):
        print(f"note: {line}")
    print(said)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
