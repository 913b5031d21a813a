"""Which compute backend `up` takes, and why; what a host lacks for microVMs, for `up` and `doctor`."""

from pathlib import Path

from hypercore_agents.cli.command_errors import CommandError

CHOICES = ("auto", "process", "microvm", "hypercore")
STALE_SKILLS = "the skills in SKILLS_DIR are not those of the image"


def choose_backend(wanted: str, state: Path, skills: Path | None = None) -> tuple[str, str]:
    """Return the backend and a sentence that says why, and how to get the other.

    `auto` takes microVMs where image, rights and a KVM that boots the image are there. Without KVM a microVM's
    instructions are translated and a first answer takes minutes, so that only an operator who asks for it gets it.

    The sentence warns when `skills`, a folder of the operator's, is not what the image holds. Raises CommandFault for a
    name that is none, and for microVMs that were asked for and cannot be had.
    """
    if wanted not in CHOICES:
        raise CommandError(
            f"no such backend: {wanted}; --backend or COMPUTE_BACKEND must be one of {', '.join(CHOICES)}"
        )
    if wanted in ("process", "hypercore"):
        return wanted, f"agents run with the {wanted} backend, as asked"
    lacking = lacking_for_microvms(state)
    if lacking and wanted == "microvm":
        raise CommandError("microVMs cannot be had here: " + "; ".join(lacking))
    if lacking:
        return "process", f"agents run as processes of this machine; microVMs would need more: {'; '.join(lacking)}"
    without_kvm = why_no_kvm(state)
    if without_kvm and wanted == "auto":
        return "process", (
            f"agents run as processes of this machine: microVMs have no KVM here ({without_kvm}) and are slow without; "
            "`--backend microvm` or COMPUTE_BACKEND=microvm runs agents in them all the same"
        )
    if without_kvm:
        why = f"as asked; without KVM ({without_kvm}) the first answer takes minutes; `--backend process` is faster"
    elif wanted == "auto":
        why = "image, rights and KVM are there; `--backend process` runs agents as processes instead"
    else:
        why = "with KVM, as asked"
    stale = "" if not skills or image_holds(skills, state) else f"; {STALE_SKILLS}: hypercore-agents image build"
    return "microvm", f"agents run in microVMs: {why}{stale}"


def why_no_kvm(state: Path) -> str:
    """Return why the newest image does not run under KVM here, "" where it does. The first look takes seconds."""
    from hypercore_agents.compute.microvm import accelerator
    from hypercore_agents.compute.microvm.image import find

    image = find(state)
    if image is None:
        return "there is no image"
    found = accelerator.accelerator(image, state)
    return "" if found.name == "kvm" else found.reason


def lacking_for_microvms(state: Path) -> list[str]:
    """Return what microVMs lack here, each with its remedy."""
    from hypercore_agents.compute.microvm import requirements
    from hypercore_agents.compute.microvm.image import find

    lacking = requirements.missing()
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
