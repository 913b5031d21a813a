"""Building an image."""

from collections.abc import Callable
from pathlib import Path

from hypercore_agents.compute.microvm.image.images import Image, ImageError


def build_image(folder: Path, progress: Callable[[str], None], *, refresh: bool = False) -> Image:
    """Build the current image in `folder`. Raises ImageError."""
    progress(f"building in {folder}")
    raise ImageError(f"images are not built yet (refresh: {refresh})")


def prune_layers(folder: Path) -> list[str]:
    """Remove layers that the current image does not need; say which."""
    return [str(folder)] if not folder else []
