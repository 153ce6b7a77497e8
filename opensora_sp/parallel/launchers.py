"""What starts the ranks, checked before torch is loaded."""

from importlib import metadata

from opensora_sp.base.errors import UserError

COLOSSALAI_RECIPE = "pip install --no-deps colossalai==0.5.0 && pip install psutil"


def check_launcher(launcher: str) -> None:
    """Raises UserError, with what to install, where ColossalAI is wanted and absent or too old."""
    if launcher != "colossalai":
        return
    try:
        version = metadata.version("colossalai")
    except metadata.PackageNotFoundError:
        raise UserError(
            "--launcher colossalai: ColossalAI is not installed; install it with "
            f"`{COLOSSALAI_RECIPE}`, or choose --launcher torch"
        ) from None
    if version.split(".")[:2] != ["0", "5"]:
        # Its pins end at torch 2.5.1: beside a newer one pip quietly chooses an older ColossalAI.
        raise UserError(
            f"--launcher colossalai: version {version} is installed, but >=0.5,<0.6 is needed; "
            f"install it with `{COLOSSALAI_RECIPE}`, or choose --launcher torch"
        )
