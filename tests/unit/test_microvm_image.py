"""Images on disk: the current one, verification, pruning, the operator's skills; and the initramfs."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hypercore_agents.compute.microvm.image import ImageError, build, find, folder_for, images, inputs, prune, verify
from hypercore_agents.compute.microvm.image.built_image import FILES
from hypercore_agents.compute.microvm.image.commands import remove_tree, run
from hypercore_agents.compute.microvm.image.initramfs import Entry, archive, initramfs
from hypercore_agents.compute.microvm.image.layers import debian_sources
from hypercore_agents.compute.microvm.image.skills import IN_GUEST, hashes, put_skills, skills_id, take_skills


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", str(tmp_path / "images-of-test"))
    return tmp_path / "images-of-test"


def write_image(folder: Path, image_id: str, *, inputs_id: str, created_at: float) -> Path:
    place = folder / "images" / image_id
    place.mkdir(parents=True)
    for name in FILES:
        (place / name).write_text(f"{name} of {image_id}")
    files = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in FILES}
    manifest = {"image_id": image_id, "inputs_id": inputs_id, "created_at": created_at, "files": files}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def test_find_returns_the_newest_image_of_these_inputs(folder: Path, tmp_path: Path) -> None:
    assert find(tmp_path) is None
    write_image(folder, "foreign", inputs_id="another installation's", created_at=9.0)
    assert find(tmp_path) is None
    write_image(folder, "old", inputs_id=inputs.inputs_id(), created_at=1.0)
    write_image(folder, "new", inputs_id=inputs.inputs_id(), created_at=2.0)
    (folder / "images" / "half").mkdir()
    image = find(tmp_path)
    assert image is not None
    assert image.image_id == "new"
    assert build(tmp_path) == image, "a current image is not built again"


def test_verify_reports_every_changed_or_missing_file(folder: Path, tmp_path: Path) -> None:
    place = write_image(folder, "new", inputs_id=inputs.inputs_id(), created_at=2.0)
    image = find(tmp_path)
    assert image is not None
    assert verify(image) == []
    content = bytearray((place / "root.squashfs").read_bytes())
    content[5] ^= 1
    (place / "root.squashfs").write_bytes(content)
    assert verify(image) == ["root.squashfs differs from what was built"]
    (place / "initrd").write_text("another")
    (place / "vmlinuz").unlink()
    assert verify(image) == [
        "root.squashfs differs from what was built",
        "vmlinuz: No such file or directory",
        "initrd differs from what was built",
    ]


def test_prune_keeps_the_current_image_and_images_in_use(folder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("oldest", "used", "current")):
        write_image(folder, name, inputs_id=inputs.inputs_id(), created_at=float(number))
    base = folder / "layers" / f"base-{inputs.base_id()}"
    base.mkdir(parents=True)
    (folder / "layers" / "base-outdated").mkdir()
    (folder / ".building-interrupted").mkdir()
    assert sorted(prune(tmp_path, keep=frozenset({"used"}))) == [".building-interrupted", "base-outdated", "oldest"]
    assert [image.image_id for image in images.listing(tmp_path)] == ["current", "used"]
    assert base.is_dir()


def test_the_image_folder_is_configurable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCORE_IMAGE_DIR", "/somewhere")
    assert folder_for(tmp_path) == Path("/somewhere")
    monkeypatch.delenv("HYPERCORE_IMAGE_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert folder_for(tmp_path) == tmp_path / "images"
    with pytest.raises(ImageError, match="needs root"):
        build(tmp_path)


def test_source_changes_rename_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (inputs.base_id(), inputs.site_id(), inputs.package_id())
    shutil.copytree(inputs._PACKAGE, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "copy" / "__init__.py").write_text("changed = True\n")
    monkeypatch.setattr(inputs, "_PACKAGE", tmp_path / "copy")
    lock = inputs.lock_file
    monkeypatch.setattr(inputs, "lock_file", lambda: Path(__file__).parents[2] / "requirements" / "runtime.lock")
    assert lock is not inputs.lock_file
    after = (inputs.base_id(), inputs.site_id(), inputs.package_id())
    assert after[:2] == before[:2]
    assert after[2] != before[2]


@pytest.mark.parametrize(
    ("name", "content", "used"),
    [
        ("etc/apt/sources.list.d/debian.sources", "URIs: http://mirror\nSuites: bookworm bookworm-updates\n", True),
        ("etc/apt/sources.list", "deb http://mirror bookworm main\n", True),
        ("etc/apt/sources.list", "deb http://mirror noble main\n", False),
    ],
)
def test_host_archives_are_reused(name: str, content: str, used: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert debian_sources(tmp_path, "bookworm") == ([str(path)] if used else [])


def test_the_error_of_a_failed_program_has_its_name_and_output() -> None:
    with pytest.raises(ImageError, match=r"sh failed \(3\): out of luck"):
        run(["sh", "-c", "echo out of luck >&2; exit 3"])


def test_trees_with_mounts_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root" / "dev").mkdir(parents=True)
    inside = f"1 2 0:5 / {tmp_path}/root/dev rw - devtmpfs devtmpfs rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: inside)
    with pytest.raises(ImageError, match="something mounted"):
        remove_tree(tmp_path / "root")
    assert (tmp_path / "root" / "dev").is_dir()


@pytest.mark.qemu
def test_the_cpio_archive_unpacks_to_its_entries(tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    content = archive(
        [Entry("folder", 0o040755), Entry("folder/file", 0o100640, b"12345"), Entry("run", 0o100755, b"")]
    )
    subprocess.run([busybox, "cpio", "-i"], input=content, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "folder" / "file").read_bytes() == b"12345"
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


def test_the_initramfs_is_reproducible_and_lists_modules_in_order() -> None:
    modules = [("virtio", b"one"), ("virtio_blk", b"two")]
    first = initramfs(b"busybox", modules)
    assert first == initramfs(b"busybox", modules)
    assert b"virtio\nvirtio_blk\n" in first


def test_skills_are_copied_and_a_changed_skill_gives_another_image(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "images"
    (source / "taxes").mkdir(parents=True)
    (source / "taxes" / "SKILL.md").write_text("---\nname: taxes\n---\n")
    (source / "taxes" / "count.sh").write_text("#!/bin/sh\n")
    (source / "taxes" / "count.sh").chmod(0o700)
    assert skills_id(folder / "skills") is None
    assert inputs.inputs_id(None) == inputs.inputs_id()
    ids = set()
    for text in ("one", "two"):
        (source / "taxes" / "more.txt").write_text(text)
        (source / "taxes" / "more.txt").chmod(0o600)
        take_skills(source, folder)
        ids.add(inputs.inputs_id(skills_id(folder / "skills")))
    assert len(ids) == 2
    assert inputs.inputs_id() not in ids
    put_skills(folder / "skills", tmp_path / "root" / IN_GUEST)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "root" / IN_GUEST / "taxes").iterdir()}
    assert modes == {"SKILL.md": 0o644, "count.sh": 0o755, "more.txt": 0o644}
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "rates.txt").write_text("19 %")
    (source / "taxes" / "shared").symlink_to(shared)
    plain = hashes(folder / "skills")
    take_skills(source, folder)
    before = hashes(folder / "skills")
    assert before.keys() == {"taxes"}
    assert before == hashes(source) != plain, "links are followed in the source as in the copy"
    (source / "README.md").write_text("for people")
    (source / ".git").mkdir()
    take_skills(source, folder)
    assert hashes(folder / "skills") == before
    assert [path.name for path in (folder / "skills").iterdir()] == ["taxes"]
    shutil.rmtree(source / "taxes")
    take_skills(source, folder)
    assert skills_id(folder / "skills") is None


def _spoil_name(skill: Path) -> None:
    skill.rename(skill.with_name("Taxes 2025"))


def _spoil_frontmatter(skill: Path) -> None:
    (skill / "SKILL.md").write_text("---\nname: another\n---\n")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (shutil.rmtree, "the folder .* does not exist"),
        (_spoil_name, r"'Taxes 2025' is not a valid name; use a-z"),
        (_spoil_frontmatter, "must be `name: taxes`"),
        (lambda skill: (skill / "SKILL.md").unlink(), r"taxes is not a skill: it has no SKILL.md; add one"),
        (lambda skill: os.mkfifo(skill / "pipe"), r"taxes/pipe is neither a file nor a folder; remove it"),
        (lambda skill: (skill / "gone").symlink_to("nowhere"), r"taxes/gone is a broken link"),
        (lambda skill: (skill / "round").symlink_to(".."), "is a link to one of its parent folders"),
        (lambda skill: (skill / "self").symlink_to("self"), "cannot be copied"),
    ],
)
def test_bad_skills_are_rejected(spoil: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "images"
    skill = source / "taxes"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: taxes\n---\n")
    take_skills(source, folder)
    before = skills_id(folder / "skills")
    spoil(source if spoil is shutil.rmtree else skill)
    with pytest.raises(ImageError, match=why):
        take_skills(source, folder)
    assert skills_id(folder / "skills") == before
    assert before is not None
