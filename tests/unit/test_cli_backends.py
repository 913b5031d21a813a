"""The backend that `up` selects, and its explanation."""

from pathlib import Path
from typing import Literal

import pytest

from hypercore_agents.cli import backends, doctor, up_plan
from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.compute.microvm import accelerator, image, requirements


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(backends, "lacking_for_microvms", lambda _: found)
    monkeypatch.setattr(backends, "why_no_kvm", lambda _: "")
    return found


def test_auto_selects_microvms_if_nothing_is_missing(lacking: list[str], tmp_path: Path) -> None:
    assert not lacking
    assert backends.choose_backend("auto", tmp_path) == (
        "microvm",
        "agents run in microVMs: image, privileges and KVM are available; "
        "`--backend process` runs agents as processes instead",
    )


def test_auto_never_selects_microvms_without_kvm(
    lacking: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not lacking
    monkeypatch.setattr(backends, "why_no_kvm", lambda _: "/dev/kvm does not exist")
    chosen, why = backends.choose_backend("auto", tmp_path)
    assert chosen == "process"
    assert "no KVM here (/dev/kvm does not exist)" in why
    assert "`--backend microvm` or COMPUTE_BACKEND=microvm" in why
    chosen, why = backends.choose_backend("microvm", tmp_path)
    assert chosen == "microvm"
    assert "without KVM (/dev/kvm does not exist)" in why
    assert "`--backend process`" in why


@pytest.mark.parametrize("kind", ["kvm", "tcg"])
def test_kvm_availability_comes_from_the_image_probe(
    kind: Literal["kvm", "tcg"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(image, "find", lambda _: image.Image(tmp_path, "an-image", "inputs", 0.0))
    monkeypatch.setattr(accelerator, "accelerator", lambda *_: accelerator.Accelerator(kind, "the probe's reason"))
    assert backends.why_no_kvm(tmp_path) == ("" if kind == "kvm" else "the probe's reason")


@pytest.mark.parametrize("demo", [True, False])
def test_up_runs_processes_if_an_image_exists_without_kvm(
    lacking: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo: bool
) -> None:
    assert not lacking
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "" if demo else "a-key")
    monkeypatch.delenv("COMPUTE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "why_no_kvm", lambda _: "/dev/kvm does not exist")
    intended = up_plan.plan(demo)
    assert intended.environment["COMPUTE_BACKEND"] == "process"
    assert "--backend microvm" in intended.backend


def test_auto_falls_back_to_processes_and_names_missing_requirements(lacking: list[str], tmp_path: Path) -> None:
    lacking.append("there is no image yet: hypercore-agents image build")
    chosen, why = backends.choose_backend("auto", tmp_path)
    assert chosen == "process"
    assert "hypercore-agents image build" in why


def test_explicit_microvms_with_missing_requirements_stop_the_start(lacking: list[str], tmp_path: Path) -> None:
    lacking.append("the manager is not root")
    with pytest.raises(CommandError, match="the manager is not root"):
        backends.choose_backend("microvm", tmp_path)


def test_explicit_process_backend_is_selected(lacking: list[str], tmp_path: Path) -> None:
    assert backends.choose_backend("process", tmp_path)[0] == "process"


def test_unknown_backends_are_rejected_with_the_valid_names(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="auto, process, microvm"):
        backends.choose_backend("docker", tmp_path)


def test_a_missing_image_is_reported_with_the_build_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", str(tmp_path))
    assert "hypercore-agents image build" in backends.lacking_for_microvms(tmp_path)[-1]


def test_each_missing_requirement_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(requirements, "find_program", lambda name: None)
    lacking = "\n".join(requirements.missing())
    assert "sudo" in lacking
    assert "apt-get install -y qemu-system-x86 nftables e2fsprogs" in lacking


def test_missing_capabilities_of_root_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "_effective_capabilities", lambda: ~(1 << 21))
    assert any("lacks CAP_SYS_ADMIN here" in sentence for sentence in requirements.missing())


def test_skills_missing_from_the_image_are_reported(
    lacking: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not lacking
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", str(tmp_path / "images"))
    skills, held = tmp_path / "skills", tmp_path / "images" / "skills"
    for folder in (skills, held):
        (folder / "taxes").mkdir(parents=True)
        (folder / "taxes" / "SKILL.md").write_text("---\nname: taxes\n---\n")
    _, why = backends.choose_backend("auto", tmp_path, skills)
    assert "skills" not in why
    (skills / "taxes" / "more.txt").write_text("new")
    _, why = backends.choose_backend("auto", tmp_path, skills)
    assert "the skills in SKILLS_DIR are not those of the image: hypercore-agents image build" in why


@pytest.mark.parametrize(
    ("used", "state", "remedy"),
    [
        (accelerator.Accelerator("kvm", "the probe booted the image's kernel under KVM"), "ok", ""),
        (accelerator.Accelerator("tcg", "/dev/kvm does not exist"), "warning", "microvm-host.md"),
    ],
)
def test_doctor_shows_the_accelerator_and_the_reason(
    used: accelerator.Accelerator, state: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skills = tmp_path / "of-the-operator"
    skills.mkdir()
    for name, value in (("STATE_DIR", tmp_path), ("HYPERCORE_IMAGE_DIR", tmp_path), ("SKILLS_DIR", skills)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/qemu-system-x86_64")
    monkeypatch.setattr(image, "find", lambda _: image.Image(tmp_path, "an-image", "inputs", 0.0))
    monkeypatch.setattr(accelerator, "accelerator", lambda *_: used)
    found = {finding.name: finding for finding in doctor._accelerator()}
    assert (found["accelerator"].state, found["accelerator"].found) == (state, f"{used.name}: {used.reason}")
    assert remedy in found["accelerator"].remedy
    assert "skills" not in found
    (skills / "taxes").mkdir()
    found = {finding.name: finding for finding in doctor._accelerator()}
    assert (found["skills"].state, found["skills"].remedy) == ("warning", "for microVMs: hypercore-agents image build")
