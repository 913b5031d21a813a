"""Which compute backend `up` takes, and why; what a host lacks for microVMs, for `up` and `doctor`."""

from pathlib import Path

from hypercore_agents.cli.faults import CommandFault

CHOICES = ("auto", "process", "microvm", "hypercore")
STALE_SKILLS = "the skills in SKILLS_DIR are not those of the image"


def choose_backend(wanted: str, state: Path, skills: Path | None = None) -> tuple[str, str]:
    """Return the backend and a sentence that says why. `auto` takes microVMs where image and rights are there.

    The sentence warns when `skills`, a folder of the operator's, is not what the image holds. Raises CommandFault for a
    name that is none, and for microVMs that were asked for and cannot be had.
    """
    if wanted not in CHOICES:
        raise CommandFault(
            f"no such backend: {wanted}; --backend or COMPUTE_BACKEND must be one of {', '.join(CHOICES)}"
        )
    if wanted in ("process", "hypercore"):
        return wanted, f"agents run with the {wanted} backend, as asked"
    lacking = lacking_for_microvms(state)
    if not lacking:
        stale = "" if not skills or image_holds(skills, state) else f"; {STALE_SKILLS}: hypercore-agents image build"
        return "microvm", f"agents run in microVMs: image and rights are there{stale}"
    if wanted == "microvm":
        raise CommandFault("microVMs cannot be had here: " + "; ".join(lacking))
    return "process", f"agents run as processes of this machine; microVMs would need more: {'; '.join(lacking)}"


def lacking_for_microvms(state: Path) -> list[str]:
    """Return what microVMs lack here, each with its remedy."""
    from hypercore_agents.compute.microvm import rights
    from hypercore_agents.compute.microvm.image import find

    lacking = rights.missing()
    if find(state) is None:
        lacking.append("there is no image yet: hypercore-agents image build")
    return lacking


def image_holds(skills: Path, state: Path) -> bool:
    """Say whether the image holds the skills of a folder of the operator's as they are now."""
    from hypercore_agents.compute.microvm.image import ImageError, folder_for
    from hypercore_agents.compute.microvm.image.skills import hashes

    try:
        return hashes(skills) == hashes(folder_for(state) / "skills")
    except (OSError, ImageError):  # `image build` says what is wrong with them
        return False
