"""Training states from the shipped model: python -m scripts.train_embedded.restore STATES

For going on where the earlier states are gone: what the stages leave behind, with the weights of
opensora_sp/assets/embedded or of --model. What is not shipped begins anew: the optimizers and the
readers of `flow`, which it teaches first. `vae` has nothing left to do then, or with --vae-again
its last phase; `flow` goes on from step --step and wants --steps beyond it. --flow FILE takes what
`flow` trains, and the step, from what `export --flow` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from opensora_sp.models.tensor_files import load_tensor_file
from scripts.train_embedded.export import FLOW_PARTS, TARGET
from scripts.train_embedded.flow import STEPS, Models
from scripts.train_embedded.state import save_state
from scripts.train_embedded.vae import PHASES, build


def restore(
    model: Path, states: Path, step: int, *, again: bool = False, flow: Path | None = None
) -> None:
    """Write the states of `vae`, `latents` and `flow`; none may be there.

    step: which step `flow` goes on from. again: whether the VAE's last phase is to be run again.
    flow: what `export --flow` wrote, to go on from instead of the model's and of `step`.
    """
    names = ("vae.pt", "vae_encoder.pt", "flow.pt", "spiece.model")
    if found := [name for name in names if (states / name).exists()]:
        raise SystemExit(f"{states} holds {', '.join(found)}: give an empty directory")
    states.mkdir(parents=True, exist_ok=True)
    vae = build()
    vae.load_state_dict(load_file(model / "vae3d" / "model.safetensors"))
    save_state(states / "vae_encoder.pt", {"model": vae.state_dict()})
    phase = len(PHASES) - int(again)
    save_state(states / "vae.pt", {"model": vae.state_dict(), "phase": phase, "step": 0})
    models = Models()
    if flow is None:
        models.dit.load_state_dict(load_file(model / "dit" / "model.safetensors"))
        text: dict[str, Tensor] = {}
        for shard in sorted((model / "t5").glob("*.bin")):
            text |= load_tensor_file(shard)
        models.t5.load_state_dict(text)
    else:
        given = load_file(flow)
        for prefix, module in zip(FLOW_PARTS, (models.dit, models.t5), strict=True):
            module.load_state_dict(
                {n.removeprefix(prefix): w for n, w in given.items() if n.startswith(prefix)}
            )
        with safe_open(flow, "pt") as file:
            step = int(file.metadata()["step"])
    weights = models.state_dict()
    save_state(states / "flow.pt", {"model": weights, "average": weights, "step": step})
    (states / "spiece.model").write_bytes((model / "t5" / "spiece.model").read_bytes())


def main() -> None:
    """Write the states."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the states are to be kept")
    parser.add_argument("--model", type=Path, default=TARGET, help="default: the shipped model")
    parser.add_argument("--step", type=int, default=STEPS, help="that flow goes on from")
    parser.add_argument(
        "--flow", type=Path, metavar="FILE", help="go on from what export --flow wrote"
    )
    parser.add_argument("--vae-again", action="store_true", help="train the decoders once more")
    arguments = parser.parse_args()
    restore(
        arguments.model,
        arguments.directory,
        arguments.step,
        again=arguments.vae_again,
        flow=arguments.flow,
    )


if __name__ == "__main__":
    main()
