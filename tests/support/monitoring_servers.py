"""The real Prometheus and Alertmanager (Debian's packages) on free loopback ports, with the shipped files sped up.

Tests change only the addresses, times and paths of secrets in the shipped files.
"""

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from support.ports import free_address

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
RULES = MONITORING / "prometheus-agent-rules.yml"


def installed() -> bool:
    return all(map(shutil.which, ("prometheus", "prometheus-alertmanager", "promtool", "amtool")))


def quick_rules(folder: Path) -> Path:
    """Return the shipped rules without their waits (`for`)."""
    text, waits = re.subn(r"^(\s+for:) \w+$", r"\1 0s", RULES.read_text(), flags=re.MULTILINE)
    assert waits > 10
    path = folder / "rules.yml"
    path.write_text(text)
    return path


def quick_prometheus(folder: Path, targets: dict[str, str], *, alertmanager: str | None = None) -> Path:
    """Return the shipped configuration with these addresses by job; omit jobs without one."""
    text = (MONITORING / "prometheus.yml").read_text()
    configuration: dict[str, Any] = yaml.safe_load(text)
    configuration["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    configuration["rule_files"] = [str(quick_rules(folder))]
    if alertmanager is None:
        del configuration["alerting"]
    else:
        configuration["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    jobs = [job for job in configuration["scrape_configs"] if job["job_name"] in targets]
    assert len(jobs) == len(targets)
    for job in jobs:
        address = targets[job["job_name"]]
        if "http_sd_configs" in job and "://" in address:
            job["http_sd_configs"][0] |= {"url": address, "refresh_interval": "1s"}
        else:
            job.pop("http_sd_configs", None)
            job["static_configs"] = [{"targets": [address]}]
    configuration["scrape_configs"] = jobs
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


@contextlib.asynccontextmanager
async def running(*command: str, ready: str) -> AsyncIterator[None]:
    """Run a program until the end of the context; it is ready when this URL returns 200."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while True:
                assert process.returncode is None, f"{command[0]} ended with {process.returncode}"
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(ready) as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(0.05)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def prometheus(configuration: Path) -> AsyncIterator[str]:
    """Run the real Prometheus with this configuration; yield its base URL."""
    address = free_address()
    command = (
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={configuration.parent / 'tsdb'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    )
    async with running(*command, ready=f"http://{address}/-/ready"):
        yield f"http://{address}"


@contextlib.asynccontextmanager
async def alertmanager(configuration: Path) -> AsyncIterator[str]:
    """Run the real Alertmanager with this configuration; yield its address."""
    address = free_address()
    command = (
        "prometheus-alertmanager",
        f"--config.file={configuration}",
        f"--storage.path={configuration.parent / 'alertmanager'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
        "--log.level=error",
    )
    async with running(*command, ready=f"http://{address}/-/ready"):
        yield address


async def query(base: str, expression: str) -> list[dict[str, Any]]:
    """Return the series of an instant query."""
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{base}/api/v1/query", params={"query": expression}) as answer,
    ):
        document = await answer.json()
        assert document["status"] == "success", (expression, document)
        result: list[dict[str, Any]] = document["data"]["result"]
        return result
