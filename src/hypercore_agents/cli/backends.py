"""Selection of the compute backend for `up`, and the missing requirements of microVMs, for `up` and `doctor`."""

from pathlib import Path

from hypercore_agents.cli.command_errors import CommandError

CHOICES = ("auto", "process", "microvm", "hypercore")
STALE_SKILLS = "the skills in SKILLS_DIR are not those of the image"


def choose_backend(wanted: str, state: Path, skills: Path | None = None) -> tuple[str, str]:
    """Return the backend, and a sentence with the reason and the way to select the other one.

    `auto` selects microVMs if the image, the privileges and a KVM that boots the image are available. Without KVM, QEMU
    translates every instruction and a first answer takes minutes, so `auto` never selects that; an operator can.

    The sentence warns if `skills`, the operator's folder, differs from the skills in the image. Raises CommandError for
    an unknown name, and if microVMs were requested and are not available.
    """
    if wanted not in CHOICES:
        raise CommandError(
            f"no such backend: {wanted}; --backend or COMPUTE_BACKEND must be one of {', '.join(CHOICES)}"
        )
    if wanted in ("process", "hypercore"):
        return wanted, f"agents run with the {wanted} backend, as requested"
    lacking = lacking_for_microvms(state)
    if lacking and wanted == "microvm":
        raise CommandError("microVMs are not available here: " + "; ".join(lacking))
    if lacking:
        return "process", f"agents run as processes of this machine; microVMs need more: {'; '.join(lacking)}"
    without_kvm = why_no_kvm(state)
    if without_kvm and wanted == "auto":
        return "process", (
            f"agents run as processes of this machine: microVMs have no KVM here ({without_kvm}) and are slow without; "
            "`--backend microvm` or COMPUTE_BACKEND=microvm selects microVMs anyway"
        )
    if without_kvm:
        why = f"as requested; without KVM ({without_kvm}) the first answer takes minutes; `--backend process` is faster"
    elif wanted == "auto":
        why = "image, privileges and KVM are available; `--backend process` runs agents as processes instead"
    else:
        why = "with KVM, as requested"
    stale = "" if not skills or image_holds(skills, state) else f"; {STALE_SKILLS}: hypercore-agents image build"
    return "microvm", f"agents run in microVMs: {why}{stale}"


def why_no_kvm(state: Path) -> str:
    """Return why the newest image does not run under KVM here, "" if it does. The first call takes seconds."""
    from hypercore_agents.compute.microvm import accelerator
    from hypercore_agents.compute.microvm.image import find

    image = find(state)
    if image is None:
        return "there is no image"
    selected = accelerator.accelerator(image, state)
    return "" if selected.name == "kvm" else selected.reason


def lacking_for_microvms(state: Path) -> list[str]:
    """Return the missing requirements of microVMs on this host, each with its remedy."""
    from hypercore_agents.compute.microvm import requirements
    from hypercore_agents.compute.microvm.image import find

    lacking = requirements.missing()
    if find(state) is None:
        lacking.append("there is no image yet: hypercore-agents image build")
    return lacking


def image_holds(skills: Path, state: Path) -> bool:
    """Return whether the skills in the image are identical to those in the operator's folder."""
    from hypercore_agents.compute.microvm.image import ImageError, folder_for
    from hypercore_agents.compute.microvm.image.skills import hashes

    try:
        return hashes(skills) == hashes(folder_for(state) / "skills")
    except (OSError, ImageError):  # `image build` reports the error
        return False
