"""The folder of images: list them, find the current one, remove them. `builder` builds.

The folder holds `images/IMAGE_ID/` (complete images only: a build renames its result into place), `layers/` (parts
that builds reuse) and `.building-*` (leftovers of interrupted builds, which the next build removes).

An image is **current** when its inputs (recipe, locked requirements, sources of this package, skills) are those of this
installation. `find` returns the current image only, so a guest never runs older code than the host.
Rejected: a `latest` tag (it does not say what is inside).
"""

import json
import os
import shutil
from pathlib import Path

from hypercore_agents.compute.microvm.image.built_image import Image
from hypercore_agents.compute.microvm.image.inputs import inputs_id
from hypercore_agents.compute.microvm.image.skills import skills_id

_SHARED = Path("/var/lib/hypercore-agents/images")


def folder_for(state_dir: Path) -> Path:
    """Return the folder of images: HYPERCORE_IMAGE_DIR, else one per machine for root, else one below `state_dir`."""
    given = os.environ.get("HYPERCORE_IMAGE_DIR")
    if given:
        return Path(given)
    return _SHARED if os.geteuid() == 0 else state_dir / "images"


def listing(state_dir: Path) -> list[Image]:
    """Return all complete images, newest first."""
    return listing_in(folder_for(state_dir))


def listing_in(folder: Path) -> list[Image]:
    """Return all complete images in a folder of images, newest first."""
    found = []
    for path in (folder / "images").glob("*/manifest.json"):
        try:
            manifest = json.loads(path.read_text())
            found.append(Image(path.parent, manifest["image_id"], manifest["inputs_id"], float(manifest["created_at"])))
        except (OSError, ValueError, KeyError):
            continue  # removed in the meantime, or not an image
    return sorted(found, key=lambda image: image.created_at, reverse=True)


def find(state_dir: Path) -> Image | None:
    """Return the newest image that was built from this installation's inputs, None if there is none."""
    folder = folder_for(state_dir)
    wanted = inputs_id(skills_id(folder / "skills"))
    return next((image for image in listing_in(folder) if image.inputs_id == wanted), None)


def discard(image: Image) -> None:
    """Remove an image. Running VMs are unaffected: they hold its files open."""
    (image.folder / "manifest.json").unlink(missing_ok=True)  # first, so that the image is no longer listed
    shutil.rmtree(image.folder, ignore_errors=True)
