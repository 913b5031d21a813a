"""`hypercore-agents image`: build, list, verify and remove guest images of microVMs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.remote import REFUSED, AsJson, say, show_json, show_table, utc

app = typer.Typer(help="Build, list, verify and remove the image that microVMs boot.", no_args_is_help=True)


@app.command("build")
def build_(
    refresh: Annotated[bool, typer.Option(help="Download the Debian packages again, for security updates.")] = False,
    skills: Annotated[Path | None, typer.Option(help="Folder of skills to include, instead of SKILLS_DIR.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build the image of this installation if it does not exist. Requires root; the first build takes minutes.

    The image includes the skills of --skills or SKILLS_DIR; without either, those of the previous build. An empty
    folder means no skills.
    """
    from hypercore_agents.compute.microvm.image import build
    from hypercore_agents.manager.settings import ManagerSettings

    started = time.monotonic()

    def progress(step: str) -> None:
        typer.echo(f"{time.monotonic() - started:6.1f} s  {step}", err=True)

    with _explained():
        image = build(_state_dir(), progress, refresh=refresh, skills=skills or ManagerSettings().skills_dir)
    say(f"{image.image_id}\t{image.folder}", {"image_id": image.image_id, "folder": str(image.folder)}, as_json)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the images of this machine.

    The image of this installation is marked `current`.
    """
    from hypercore_agents.compute.microvm.image import find, images

    current = find(_state_dir())
    rows: list[dict[str, Any]] = [
        {"image_id": image.image_id, "current": current is not None and image.image_id == current.image_id,
         "created_at": utc(image.created_at), "size_bytes": image.size_bytes(),
         "kernel": image.manifest().get("kernel", "?"), "skills": image.skills()}
        for image in images.listing(_state_dir())
    ]  # fmt: skip
    if as_json:
        show_json(rows)
        return
    shown = [
        (row["image_id"], "current" if row["current"] else "-", row["created_at"], f"{row['size_bytes'] // 2**20} MB",
         row["kernel"], ", ".join(row["skills"]) or "-")
        for row in rows
    ]  # fmt: skip
    show_table(
        ("IMAGE", "", "BUILT", "SIZE", "KERNEL", "SKILLS"),
        shown,
        empty="no images; build one with: hypercore-agents image build",
    )


@app.command("verify")
def verify_(as_json: AsJson = False) -> None:
    """Compare every image with its manifest.

    Exits with code 1 if one differs.
    """
    from hypercore_agents.compute.microvm.image import folder_for, images, verify

    present = images.listing(_state_dir())
    if not present:
        raise CommandError(f"there is no image in {folder_for(_state_dir())}; run: hypercore-agents image build")
    reports = {image.image_id: list(verify(image)) for image in present}
    if as_json:
        show_json([{"image_id": name, "ok": not faults, "faults": faults} for name, faults in reports.items()])
    else:
        shown = [(name, "; ".join(faults) or "ok") for name, faults in reports.items()]
        show_table(("IMAGE", "FOUND"), shown, empty="")
    if any(reports.values()):
        raise typer.Exit(REFUSED)


@app.command("prune")
def prune_(as_json: AsJson = False) -> None:
    """Remove images of other installations.

    Also removes unused layers and the remains of interrupted builds. Running VMs are not affected, but a VM of a
    removed image can no longer start.
    """
    from hypercore_agents.compute.microvm.image import prune

    with _explained():
        names = list(prune(_state_dir()))
    summary = "\n".join(f"removed {name}" for name in names) or "nothing to remove"
    say(summary, {"removed": names}, as_json)


@contextmanager
def _explained() -> Iterator[None]:
    from hypercore_agents.compute.microvm.image import ImageError

    try:
        yield
    except ImageError as error:
        raise CommandError(error.message) from error


def _state_dir() -> Path:
    from hypercore_agents.manager.settings import ManagerSettings

    return ManagerSettings().state_dir
