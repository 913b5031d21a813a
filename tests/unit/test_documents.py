"""Checks the documents against the repository, and all texts against phrases that are not plain English.

In Markdown: relative links and their anchors lead somewhere, and every setting, route, metric, test and file that is
named in a code span exists. In Markdown, source code and configuration: none of the phrases in `PHRASES` occurs.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from hypercore_agents.observability import metrics

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hypercore_agents"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(
    path
    for folder in ("src", "tests", "scripts", "benchmarks", "monitoring")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".sh", ".yml"} and path != Path(__file__).resolve()
)
TEXTS = [*SOURCES, ROOT / ".env.example", ROOT / "pyproject.toml", ROOT / ".importlinter"]

PHRASES = (
    r"\banew\b",
    r"\btold of\b",
    r"\bof before\b",
    r"\bof late\b",
    r"\bas good as\b",
    r"\bfor ever\b",
    r"\bto its end\b",
    r"\bthat there (?:is|are)\b",
    r"\bthat there is not\b",
    r"\bwho leaves\b",
    r"\bwhoever\b",
    r"\b(?:nobody|somebody|everybody)(?:'s)?\b",
    r"\b(?:its|their|a|the) places? back\b",
    r"\bsilence alone\b",
    r"\bcondemns?\b",
    r"\bis (?:not )?believed\b",
    r"\bwhat a turn left running\b",
    r"\brehears",
    r"\bbury\b|\bburied\b",
    r"\bmakes? way\b",
    r"\bby (?:its|their) word\b",
    r"\bspeaks? (?:of|to)\b",
    r"\bof its own accord\b",
    r"\bin vain\b",
    r"\bno (?:room|quarters)\b",
    r"\bunheard\b",
    r"\blet go\b",
    r"\bmid.turn\b",
    r"\bmodel door\b",
    r"\bin good order\b",
)
"""Regular expressions, matched without regard to case. Names in code that need one of the words are in `ALLOWED`."""
ALLOWED = re.compile(r"""["'`]nobody["'`]|\bNOBODY\b|nobody:|as_nobody""")

FOREIGN = {
    "AGENT_ID", "SESSION_ID", "SO_REUSEPORT", "STATE_DIR", "NO_COLOR", "CI",
}  # fmt: skip
"""Names in capitals that are no settings: placeholders, and names of other programs."""
FOREIGN_FILES = {"SKILL.md", "NAME/SKILL.md", "bunfig.toml"}
"""Files that are not part of the repository: those of skills and of other programs."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


@functools.cache
def prose(document: Path) -> str:
    """Return the text without fenced code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(document: Path) -> set[str]:
    """Return the code spans of a document."""
    return set(re.findall(r"`([^`\n]+)`", prose(document)))


@functools.cache
def anchors(document: Path) -> frozenset[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@functools.cache
def files() -> frozenset[str]:
    """Return the paths of all files and folders that a document may name, relative to the repository."""
    folders = ("src", "tests", "scripts", "benchmarks", "monitoring", "docs", "requirements", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return frozenset(
        map(name_of, [*found, *ROOT.glob("*.*"), *(ROOT / folder for folder in folders), ROOT / "LICENSE"])
    )


@functools.cache
def words() -> frozenset[str]:
    """Return every identifier in source code and configuration."""
    return frozenset(re.findall(r"\w+", "\n".join(path.read_text() for path in TEXTS)))


@functools.cache
def functions() -> frozenset[str]:
    """Return the names of all functions in tests, the conformance suite included."""
    paths = [*(ROOT / "tests").rglob("*.py"), PACKAGE / "compute/testing/conformance.py"]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@functools.cache
def metric_names() -> frozenset[str]:
    """Return the names of all metrics and of the series that belong to them."""
    registry = CollectorRegistry()
    for role in (metrics.AgentMetrics, metrics.ManagerMetrics, metrics.GatewayMetrics, metrics.AutoscalerMetrics):
        role(registry)
    endings = ("", "_total", "_bucket", "_sum", "_count", "_created")
    rules = (ROOT / "monitoring/prometheus-agent-rules.yml").read_text()
    recorded = re.findall(r"record: (\S+)", rules)
    return frozenset([*(family.name + ending for family in registry.collect() for ending in endings), *recorded])


@functools.cache
def routes() -> frozenset[str]:
    """Return the paths of all routes, with `*` for their parameters: the literals in code, and each after a prefix."""
    literals = {
        node.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"(/[\w.{}:*-]+)+/?", node.value)
    }
    paths = {re.sub(r"\{[^}]*\}", "*", literal).rstrip("/") for literal in literals}
    prefixes = {path for path in paths if re.match(r"/(v1|agents|internal|simulator)\b", path)}
    return frozenset(paths | {prefix + path for prefix in prefixes for path in paths})


@documents
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
            broken.append(target)
    assert broken == []


@documents
def test_settings_in_documents_exist(document: Path) -> None:
    listed = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    named = {name for span in spans(document) for name in re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", span)}
    unknown = {name for name in named - listed - FOREIGN if not name.startswith("CAP_") and name not in words()}
    assert unknown == set()


@documents
def test_metrics_in_documents_exist(document: Path) -> None:
    texts = spans(document)
    named = {name for text in texts for name in re.findall(r"\bhypercore[_:][a-z0-9_:]+\b", text)}
    named |= {name for text in texts for name in re.findall(r"\bagent_\w+_(?:total|bucket|sum|count)\b", text)}
    named = {name for name in named if not re.match(r"hypercore_agents\b", name) and f"{name}*" not in "".join(texts)}
    assert named - metric_names() == set()


@documents
def test_routes_in_documents_exist(document: Path) -> None:
    unknown = set()
    for span in spans(document):
        stated = re.search(r"(?:^|[A-Z] |\.\.\.|[A-Z_]\S*)?((?:/[\w.{}:…-]+)+)", span)
        if (
            not re.search(r"^(?:[A-Z]+ )?(?:\.\.\.)?/(?:v1|internal|agents|simulator|session)\b", span)
            or stated is None
        ):
            continue
        path = re.sub(r"\{[^}]*\}|\b[A-Z]+_ID\b", "*", stated.group(1)).rstrip("/.…")
        known = routes()
        pattern = re.compile(re.escape(path).replace(r"\*", r"[^/]+") + "$")
        if not any(pattern.search(route) for route in known) and path not in ("/v1", "/internal", "/simulator"):
            unknown.add(span)
    assert unknown == set()


@documents
def test_tests_in_documents_exist(document: Path) -> None:
    named = {name for span in spans(document) for name in re.findall(r"(?:^|::)(test_\w+)$", span)}
    assert named - functions() == set()


@pytest.mark.parametrize(("name", "least"), [("SECURITY.md", 15), ("MICROVM.md", 60)])
def test_promises_name_many_tests(name: str, least: int) -> None:
    named = {name for span in spans(ROOT / "docs" / name) for name in re.findall(r"^test_\w+$", span)}
    assert len(named) >= least


def test_every_promise_about_microvms_names_a_test() -> None:
    lines = (ROOT / "docs" / "MICROVM.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line != "| guarantee | verified by |"]
    assert len(rows) > 35
    assert [row for row in rows if "test" not in row.split(" | ")[1]] == []


@documents
def test_files_in_documents_exist(document: Path) -> None:
    known = files()
    unknown = set()
    for span in spans(document):
        for named in re.findall(r"(?:^|(?<=\s))([\w.-]+(?:/[\w.-]+)*\.(?:py|sh|md|yml|toml|svg|lock))\b", span):
            path = named.removeprefix("./")
            if path not in FOREIGN_FILES and not any(f"/{each}".endswith(f"/{path}") for each in known):
                unknown.add(named)
        folder = re.fullmatch(r"([a-z_]+(?:/[a-z_]+)*)/", span)
        if folder and not any(f"/{path}/".endswith(f"/{folder.group(1)}/") for path in known):
            unknown.add(span)
    assert unknown == set()


@documents
def test_prose_of_documents_wraps_at_100_columns(document: Path) -> None:
    lines = prose(document).splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "#", "    "))] == []


def test_documents_that_sources_name_exist() -> None:
    missing = {
        f"{name_of(path)}: {document}"
        for path in TEXTS
        for document in re.findall(r"docs/[\w/-]+\.md", path.read_text())
        if not (ROOT / document).is_file()
    }
    assert missing == set()


def hits(path: Path) -> Iterator[str]:
    """Yield each phrase in a file, also one that is wrapped over two lines or written as an identifier."""
    lines = [ALLOWED.sub("", line).replace("_", " ") for line in path.read_text().splitlines()]
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        text = f"{line} {following.lstrip(' #')}"
        for phrase in PHRASES:
            if any(found.start() < len(line) for found in re.finditer(phrase, text, re.IGNORECASE)):
                yield f"{name_of(path)}:{number}: {phrase}: {line.strip()}"


@documents
def test_documents_have_no_obscure_phrases(document: Path) -> None:
    assert list(hits(document)) == []


def test_sources_have_no_obscure_phrases() -> None:
    assert [hit for path in TEXTS for hit in hits(path)] == []
