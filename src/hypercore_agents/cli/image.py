"""`hypercore-agents image`: the image that microVMs boot."""

import time
from pathlib import Path
from typing import Annotated

import typer

from hypercore_agents.cli.faults import CommandFault
from hypercore_agents.compute.microvm.image import Image, ImageError, build, find, folder_for, images, prune, verify
from hypercore_agents.manager.settings import ManagerSettings

app = typer.Typer(help="Build, list, verify and remove the image that microVMs boot.", no_args_is_help=True)


@app.command("build")
def build_(
    refresh: Annotated[bool, typer.Option(help="Fetch Debian's packages anew, for their security updates.")] = False,
) -> None:
    """Build the image of this installation, or say that it is there. Needs root, and minutes the first time."""
    started = time.monotonic()

    def progress(step: str) -> None:
        typer.echo(f"{time.monotonic() - started:6.1f} s  {step}", err=True)

    try:
        image = build(_state_dir(), progress, refresh=refresh)
    except ImageError as error:
        raise CommandFault(error.message) from error
    typer.echo(f"{image.image_id}\t{image.folder}")


@app.command("list")
def list_() -> None:
    """Show the images of this machine; the one of this installation is marked `current`."""
    current = find(_state_dir())
    for image in images.listing(_state_dir()):
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(image.created_at))
        mark = "current" if current is not None and image.image_id == current.image_id else "-"
        kernel = image.manifest().get("kernel", "?")
        typer.echo(f"{image.image_id}\t{mark}\t{made}\t{image.size_bytes() // 2**20} MB\t{kernel}")


@app.command("verify")
def verify_() -> None:
    """Compare every image with its manifest; exit code 1 when one differs."""
    found = images.listing(_state_dir())
    if not found:
        raise CommandFault(f"there is no image in {folder_for(_state_dir())}; run: hypercore-agents image build")
    reports = [_report(image) for image in found]
    if not all(reports):
        raise typer.Exit(1)


@app.command("prune")
def prune_() -> None:
    """Remove images that are not this installation's, old layers, and what interrupted builds left.

    Do not run it while machines of an older image are to be started: those that run go on.
    """
    try:
        for name in prune(_state_dir()):
            typer.echo(f"removed {name}")
    except ImageError as error:
        raise CommandFault(error.message) from error


def _report(image: Image) -> bool:
    faults = verify(image)
    typer.echo(f"{image.image_id}\t{'; '.join(faults) or 'ok'}")
    return not faults


def _state_dir() -> Path:
    return ManagerSettings().state_dir
