"""Command: prove on this machine that the program computes what Open-Sora 1.2 computes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.launcher import check_store, join, launcher_keeps_store
from opensora_sp.base.screen import note, on_any_screen
from opensora_sp.base.wording import plural
from opensora_sp.cli.console import refuse, world_size
from opensora_sp.cli.help import help_asked, say
from opensora_sp.cli.parser import RefusingParser
from opensora_sp.models.kernels.attention import AUTO, KERNELS, check_attention
from opensora_sp.parallel.backend_table import BACKENDS, DEVICES
from opensora_sp.parallel.watchdog.orphans import watch_launcher
from opensora_sp.request.engine_settings import DTYPES, FusedKernels, StepKernels
from opensora_sp.verification.packaged_suite import packaged_suite

if TYPE_CHECKING:
    from opensora_sp.parallel.session import Session
    from opensora_sp.request.request import Request

Examination = Literal["verify", "parity", "doctor"]
_ABOUT: Mapping[Examination, str] = {
    "verify": "Runs the conformance suite through the production classes on this machine. Under "
    "torchrun the transformer and sampler cases run sharded over the ranks.",
    "parity": "Compares a run shared by all ranks with one of rank 0 alone, on any checkpoint, "
    "size and dtype.",
    "doctor": "Looks whether the machine is fit to run the program: versions, devices, "
    "collectives, operations, encoder, disk, memory.",
}
_ELSEWHERE = "opensora-sp parity stands for --parity, and opensora-sp doctor for --doctor."


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if everything held, 1 if not, 2 for a mistake in the request."""
    watch_launcher()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if (asked := help_asked(argv)) is not None:
            # Short help is of one examination; all of it, of the three that share this command.
            return say(parser_of(None if asked == "all" else examination(argv)).format_help())
        arguments = parser_of().parse_args(argv)
        launch = join()
        request = _request(arguments) if arguments.parity else None
        if arguments.doctor and arguments.parity:
            raise UserError("--doctor and --parity are two examinations: ask for one at a time")
        if arguments.reference is not None and not access.is_dir(arguments.reference):
            raise UserError(f"--reference {arguments.reference}: no such directory")
        if arguments.reference is None and not (arguments.doctor or arguments.parity):
            arguments.reference = packaged_suite()
    except UserError as error:
        return refuse(error, same_everywhere=True)
    try:
        check_store(launch, kept_by_launcher=launcher_keeps_store())
        for each in launch.notes if launch.rank == 0 else ():
            note(each)
        return _verify(arguments, request)
    except UserError as error:
        return refuse(error, same_everywhere=False)


def examination(argv: Sequence[str]) -> Examination:
    """Which of the three is asked for, as far as help is concerned."""
    return "parity" if "--parity" in argv else "doctor" if "--doctor" in argv else "verify"


def parser_of(only: Examination | None = None) -> argparse.ArgumentParser:
    """The parser of all three examinations; for its help, of one of them only."""
    name = only or "verify"
    parser = RefusingParser(
        prog=f"opensora-sp {name}",
        usage=f"opensora-sp {name} [flags]\n"
        f"       torchrun --nproc_per_node N --no-python opensora-sp {name} [flags]",
        description=_ABOUT[name],
        epilog=None if only == "parity" or only == "doctor" else _ELSEWHERE,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=96),
    )
    parser.add_argument("--device", choices=DEVICES, help="default: the first there")
    parser.add_argument("--backend", choices=tuple(BACKENDS), help="default: the device's")
    if only != "doctor":
        parser.add_argument(
            "--dtype",
            choices=DTYPES,
            default="fp32",
            help="default fp32"
            if only == "parity"
            else "fp32 (default) runs every part of the suite; others only the transformer's, by "
            "relative RMS",
        )
        parser.add_argument(
            "--step-kernels",
            choices=get_args(StepKernels),
            default="auto",
            help="as for generate (default auto: by size)"
            if only == "parity"
            else "as for generate (default auto: by size, and a suite's cases are small)",
        )
        parser.add_argument(
            "--enable-compile",
            choices=("true", "false"),
            default="false",
            help="as for generate: examine the compiled blocks, which take minutes to compile",
        )
    if only in (None, "verify"):
        parser.add_argument(
            "--reference",
            type=Path,
            metavar="DIR",
            help="a conformance suite; default: that of the package opensora_sp_conformance",
        )
        parser.add_argument(
            "--parity", action="store_true", help="compare all ranks with rank 0 alone instead"
        )
        parser.add_argument("--doctor", action="store_true", help="examine the machine instead")
    if only in (None, "doctor"):
        _add_doctor(parser.add_argument_group("with --doctor") if only is None else parser)
    if only in (None, "parity"):
        _add_parity(parser.add_argument_group("with --parity") if only is None else parser)
    return parser


def _add_doctor(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--save-dir",
        type=Path,
        default=Path("samples/samples"),
        metavar="DIR",
        help="where outputs would go (default samples/samples)",
    )


def _add_parity(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--ckpt-path-dit", type=Path, metavar="DIR", help="default: the embedded model")
    add("--resolution", default="144p", metavar="NAME", help="default 144p")
    add("--aspect-ratio", default="9:16", metavar="H:W", help="default 9:16, landscape")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in the place of those two")
    add("--num-frames", default="2s", metavar="N|DURATION", help="as for generate (default 2s)")
    add("--num-sampling-steps", type=int, default=3, metavar="N", help="default 3")
    add("--cfg-scale", type=float, default=7.0, metavar="X", help="default 7")
    add("--seed", type=int, default=42, metavar="N", help="default 42")
    add(
        "--attention", choices=(AUTO, *KERNELS), default=AUTO, help="as for generate (default auto)"
    )
    add("--fused-kernels", choices=get_args(FusedKernels), default="auto", help="likewise")
    add("--sequence-parallel", type=int, metavar="N", help="ranks that share one sequence")
    add("--guidance-parallel", type=int, choices=(1, 2), help="groups that share the CFG branches")
    add(
        "--most-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="a request that would take rank 0 alone longer is made smaller (default 600)",
    )
    add(
        "--link-gbps",
        type=float,
        metavar="GB/s",
        help="also project the step on 2, 4 and 8 ranks over links of this speed",
    )


def _verify(arguments: argparse.Namespace, request: Request | None) -> int:
    import torch

    from opensora_sp.parallel.session import COLLECTIVE_TIMEOUT_S, open_session
    from opensora_sp.verification.doctor.examine import TIMEOUT_S, report

    # TF32 convolutions are the default on CUDA and 1000 times coarser than the limits.
    torch.backends.cudnn.allow_tf32 = False
    timeout = TIMEOUT_S if arguments.doctor else COLLECTIVE_TIMEOUT_S
    with (
        open_session(arguments.device, arguments.backend, timeout_s=timeout) as session,
        torch.no_grad(),
    ):
        if arguments.doctor:
            return report(session, arguments.save_dir)
        if request is not None:
            return _parity(arguments, session, request)
        return _conformance(arguments, session)


def _request(arguments: argparse.Namespace) -> Request:
    """The request to compare on; UserError before torch is loaded."""
    from opensora_sp.parallel.mesh import plan_mesh
    from opensora_sp.request import sizes
    from opensora_sp.request.preflight import check_transformer
    from opensora_sp.request.request import Request

    if arguments.ckpt_path_dit is not None:
        check_transformer(str(arguments.ckpt_path_dit))
    check_attention(arguments.attention, arguments.device, arguments.dtype)
    height, width = sizes.resolve_size(
        arguments.resolution, arguments.aspect_ratio, arguments.image_size
    )
    if arguments.link_gbps is not None and not 0 < arguments.link_gbps < float("inf"):
        raise UserError(f"--link-gbps {arguments.link_gbps} is not a speed above 0")
    plan_mesh(
        world_size(),
        guided=arguments.cfg_scale != 1,
        guidance=arguments.guidance_parallel,
        sequence=arguments.sequence_parallel,
    )
    return Request(
        prompt="",
        height=height,
        width=width,
        num_frames=sizes.resolve_frames(arguments.num_frames),
        steps=arguments.num_sampling_steps,
        cfg_scale=arguments.cfg_scale,
        seed=arguments.seed,
    )


def _parity(arguments: argparse.Namespace, session: Session, request: Request) -> int:
    from dataclasses import replace

    from opensora_sp.engine.model_set import Parallelism
    from opensora_sp.engine.pipeline import Pipeline
    from opensora_sp.request.embedded import embedded_checkpoints
    from opensora_sp.request.runtime import Runtime
    from opensora_sp.verification.parity import check_parity, project, report

    checkpoints = embedded_checkpoints()
    if arguments.ckpt_path_dit is not None:
        checkpoints = replace(checkpoints, dit=arguments.ckpt_path_dit)
    pipeline = Pipeline.load(
        checkpoints,
        session=session,
        dtype=arguments.dtype,
        parallelism=Parallelism(
            guidance=arguments.guidance_parallel,
            sequence=arguments.sequence_parallel,
        ),
        transformer_only=True,
        runtime=Runtime(
            chunks=session.backend.chunks,
            step_kernels=arguments.step_kernels,
            attention=arguments.attention,
            fused_kernels=arguments.fused_kernels,
            compile=arguments.enable_compile == "true",
        ),
    )
    parity = check_parity(pipeline, request, most_seconds=arguments.most_seconds)
    if parity is not None:
        for line in report(parity, pipeline):
            print(line)
        if arguments.link_gbps is not None:
            for line in project(parity, pipeline, arguments.link_gbps * 1e9):
                print(line)
        sys.stdout.flush()
    return 0 if session.control.broadcast_object(parity.ok if parity is not None else None) else 1


def _conformance(arguments: argparse.Namespace, session: Session) -> int:
    from opensora_sp.engine.model_set import DTYPES as TORCH_DTYPES
    from opensora_sp.request.runtime import Runtime
    from opensora_sp.verification.conformance import run_suite
    from opensora_sp.verification.suite import table

    suite: Path = arguments.reference
    runtime = Runtime(
        chunks=session.backend.chunks,
        step_kernels=arguments.step_kernels,
        compile=arguments.enable_compile == "true",
    )
    checks = list(run_suite(suite, session, TORCH_DTYPES[arguments.dtype], runtime))
    failed = sum(check.failed for check in checks)
    held = sum(check.ok for check in checks)
    if session.leads:
        ranks = plural(session.world_size, "rank")
        print(
            f"{suite}: {arguments.dtype} on {ranks}, {session.device.type}/{session.backend.name}"
        )
        for line in table(checks):
            print(line)
        skips = len(checks) - held - failed
        print(f"{held} held, {failed} failed, {skips} skipped", flush=True)
    # Nothing held where nothing ran.
    return session.control.broadcast_object(
        1 if failed or not held else 0 if session.leads else None
    )
