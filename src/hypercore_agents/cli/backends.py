"""Which compute backend `up` takes, and why; what a host lacks for microVMs, for `up` and `doctor`."""

from pathlib import Path

from hypercore_agents.cli.faults import CommandFault

CHOICES = ("auto", "process", "microvm", "hypercore")


def choose_backend(wanted: str, state: Path) -> tuple[str, str]:
    """Return the backend and a sentence that says why. `auto` takes microVMs where image and rights are there.

    Raises CommandFault for a name that is none, and for microVMs that were asked for and cannot be had.
    """
    if wanted not in CHOICES:
        raise CommandFault(
            f"no such backend: {wanted}; --backend or COMPUTE_BACKEND must be one of {', '.join(CHOICES)}"
        )
    if wanted in ("process", "hypercore"):
        return wanted, f"agents run with the {wanted} backend, as asked"
    lacking = lacking_for_microvms(state)
    if not lacking:
        return "microvm", "agents run in microVMs: image and rights are there"
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
