"""Properties of all records, outputs and directory trees."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hypercore_agents.compute.host.identity import ProcessIdentity
from hypercore_agents.compute.host.shims import BoundedLog
from hypercore_agents.compute.process.records import ProcessDirectory, ProcessRecord
from hypercore_agents.kit.linux.removal import remove_tree

numbers = st.integers(min_value=0, max_value=2**63)
identities = st.none() | st.builds(ProcessIdentity, pid=numbers, started=numbers, boot=st.text(max_size=40))
records = st.builds(
    ProcessRecord,
    agent_id=st.text(max_size=30),
    created_at=st.floats(min_value=0, max_value=1e12),
    address=st.text(max_size=60),
    uid=st.none() | numbers,
    cores=numbers,
    memory_mb=numbers,
    cgroups=st.lists(st.text(max_size=60), max_size=4).map(tuple),
    shim=identities,
    agent=identities,
)


@given(records)
def test_a_record_survives_serialisation(record: ProcessRecord) -> None:
    assert ProcessRecord.from_json(record.to_json()) == record


@given(
    limit=st.integers(min_value=2, max_value=64),
    pieces=st.lists(st.binary(max_size=40), max_size=30),
    asked=st.integers(min_value=0, max_value=100),
)
@settings(max_examples=60, deadline=None)
def test_a_log_stores_the_end_of_the_output(limit: int, pieces: list[bytes], asked: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = ProcessDirectory(Path(name))
        log = BoundedLog(str(directory.log), limit)
        for piece in pieces:
            log.write(piece)
        printed = b"".join(pieces)
        stored = directory.tail(10_000)
        assert printed.endswith(stored)
        assert min(len(printed), limit // 2) <= len(stored) <= limit
        assert directory.tail(asked) == (stored[-asked:] if asked else b"")


def _is_name(name: str) -> bool:
    return name not in (".", "..")


trees: st.SearchStrategy[object] = st.recursive(
    st.sampled_from(["file", "link"]) | st.just({}),
    lambda below: st.dictionaries(st.text("ab.~ \n", min_size=1, max_size=3).filter(_is_name), below, max_size=4),
    max_leaves=25,
)


def _grow(path: Path, tree: object) -> None:
    match tree:
        case dict():
            path.mkdir()
            for name, below in tree.items():
                _grow(path / str(name), below)
        case "link":
            path.symlink_to("/")
        case _:
            path.touch()


@given(trees)
@settings(max_examples=60, deadline=None)
def test_any_tree_is_removed_and_nothing_beside_it(tree: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "beside").mkdir()
        _grow(Path(name) / "tree", tree)
        remove_tree(Path(name) / "tree")
        assert [path.name for path in Path(name).rglob("*")] == ["beside"]
