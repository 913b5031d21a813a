"""Prices by model, and settings that are rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hypercore_agents.gateway.metering import Tokens
from hypercore_agents.gateway.pricing import BUILT_IN, PriceFileError, PriceList
from hypercore_agents.gateway.settings import GatewaySettings


@pytest.mark.parametrize(
    ("model", "like"),
    [
        ("claude-opus-5-5", "claude-opus-5-5"),
        ("claude-opus-5-20260101", "claude-opus-5"),
        ("claude-opus-4-20250514", "claude-opus-4"),
        ("claude-opus-4-5-20251101", "claude-opus-4-5"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("claude-haiku-4-50", "claude-opus-4"),  # not a version of haiku-4-5: unknown, so the highest price
        ("another-vendors-model", "claude-opus-4"),
        ("claude-opus-5-5[1m]", "claude-opus-5-5"),
    ],
)
def test_the_longest_match_wins_and_unknown_costs_most(model: str, like: str) -> None:
    assert PriceList().of(model) == BUILT_IN[like]


def test_cost_is_in_micro_dollars() -> None:
    tokens = Tokens(input=1000, output=100, cache_read=10_000, cache_creation=2000, cache_creation_1h=500)
    expected = 1000 * 3 + 100 * 15 + 10_000 * 0.3 + 1500 * 3.75 + 500 * 6
    assert PriceList().cost_micro_usd("claude-sonnet-4-5", tokens) == round(expected)


def test_units_are_charged_in_addition_to_tokens() -> None:
    prices = PriceList()
    usage = {"server_tool_use": {"web_search_requests": 50, "web_fetch_requests": 9, "new_requests": 2, "odd": "x"}}
    tokens = Tokens()
    tokens.take(usage)
    assert prices.cost_micro_usd("claude-sonnet-5", tokens) == 50 * 10_000 + 2 * 10_000


def test_unit_prices_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    rates = {"input": 1, "output": 2, "cache_read": 0, "cache_write": 0}
    longer = {**rates, "output": 7, "above": 10}
    units = {"web_search_requests": 0.5, "new_requests": 2}
    path.write_text(json.dumps({"mine": {**rates, "server_tools": units, "long_context": longer}}))
    prices = PriceList.load(path)
    tokens = Tokens(server_tools={"web_search_requests": 2, "new_requests": 1, "unknown": 1})
    assert prices.cost_micro_usd("mine", tokens) == 1_000_000 + 2_000_000 + 2_000_000
    assert prices.cost_micro_usd("mine", Tokens(input=10, output=1)) == 10 + 2
    assert prices.cost_micro_usd("mine", Tokens(input=10, cache_read=1, output=1)) == 10 + 7


def test_a_long_context_costs_more_if_listed() -> None:
    prices, tokens = PriceList(), Tokens(input=1000, cache_read=200_000, output=10)
    assert prices.cost_micro_usd("claude-sonnet-4-5-20250929", tokens) == 6 * 1000 + 0.6 * 200_000 + 22.5 * 10
    assert prices.cost_micro_usd("claude-sonnet-4-6", tokens) == 3 * 1000 + 0.3 * 200_000 + 15 * 10


def test_haiku_5_5_costs_more_above_100_000_input_tokens() -> None:
    prices = PriceList()
    at_most = Tokens(input=50_000, cache_read=30_000, cache_creation=20_000, output=1000)
    assert prices.cost_micro_usd("claude-haiku-5-5", at_most) == (5000 + 300 + 2500 + 500)
    more = Tokens(input=50_000, cache_read=30_001, cache_creation=20_000, output=1000)
    assert prices.cost_micro_usd("claude-haiku-5-5", more) == round(25_000 + 1500.05 + 12_500 + 2500)


# From https://platform.claude.com/docs/en/about-claude/pricing, October 2026: input, output, cache read, cache write.
_PUBLIC_LIST = {
    "claude-fable-5-1": (10, 50, 0.25, 12.5),
    "claude-fable-5": (10, 50, 1, 12.5),
    "claude-mythos-5-1": (10, 50, 0.25, 12.5),
    "claude-opus-5-5": (4, 20, 0.2, 5),
    "claude-opus-5": (5, 25, 0.5, 6.25),
    "claude-opus-4-6": (5, 25, 0.5, 6.25),
    "claude-opus-4-1": (15, 75, 1.5, 18.75),
    "claude-sonnet-5-5": (2, 10, 0.1, 2.5),
    "claude-sonnet-5": (2, 10, 0.2, 2.5),
    "claude-sonnet-4-6": (3, 15, 0.3, 3.75),
    "claude-sonnet-4-5": (3, 15, 0.3, 3.75),
    "claude-haiku-5-5": (0.1, 0.5, 0.01, 0.125),
    "claude-haiku-4-5": (1, 5, 0.1, 1.25),
}


def test_built_in_prices_match_the_public_list() -> None:
    found = {name: BUILT_IN[name] for name in _PUBLIC_LIST}
    assert {
        name: (price.input, price.output, price.cache_read, price.cache_write) for name, price in found.items()
    } == _PUBLIC_LIST
    assert {name for name, price in BUILT_IN.items() if price.long_context is not None} == {
        "claude-haiku-5-5",
        "claude-sonnet-4",
        "claude-sonnet-4-5",
    }


def test_compaction_tokens_count() -> None:
    tokens = Tokens()
    iterations = [
        {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500},
        {"type": "message", "input_tokens": 23_000, "output_tokens": 1000},
        "x",
    ]
    tokens.take({"input_tokens": 23_000, "output_tokens": 1000, "iterations": iterations})
    assert (tokens.input, tokens.output) == (203_000, 4500)


def test_prices_from_a_file_override_built_in_prices(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"mine": {"input": 1, "output": 2, "cache_read": 0, "cache_write": 0}}))
    prices = PriceList.load(path)
    assert prices.cost_micro_usd("mine-2", Tokens(input=1, output=1)) == 3
    assert prices.of("claude-sonnet-5") == BUILT_IN["claude-sonnet-5"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"input": 1}}', '{"a": {"input": -1, "output": 1}}'])
def test_an_invalid_price_file_error_shows_the_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(PriceFileError, match=r"MODEL_PRICES.*cache_read"):
        PriceList.load(path)
    with pytest.raises(PriceFileError, match="cannot read"):
        PriceList.load(tmp_path / "none.json")


@pytest.mark.parametrize("address", ["0.0.0.0:8090", "[::]:8090"])
def test_a_wildcard_address_must_be_allowed(address: str) -> None:
    with pytest.raises(ValidationError, match="ALLOW_WILDCARD_ADDR"):
        GatewaySettings(_env_file=None, gateway_addr=address)
    assert GatewaySettings(_env_file=None, gateway_addr=address, allow_wildcard_addr=True)


@pytest.mark.parametrize(
    "values",
    [
        {"gateway_addr": "8090"},
        {"claude_api_url": "ftp://x"},
        {"claude_api_url": "https://user:secret@x"},
        {"session_token_seconds": 0},
        {"allowed_models": "a b"},
        {"model_requests_per_session": 0},
    ],
)
def test_values_out_of_range_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GatewaySettings(_env_file=None, **values)


def test_an_invalid_key_is_rejected_without_being_shown() -> None:
    with pytest.raises(ValidationError) as caught:
        GatewaySettings(_env_file=None, anthropic_api_key="sk-secret\nkey")
    assert "sk-secret" not in str(caught.value)


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_BETAS", "files-api-2025-04-14, x-1")
    monkeypatch.setenv("CLAUDE_API_URL", "http://127.0.0.1:8099/")
    settings = GatewaySettings(_env_file=None)
    assert settings.allowed_betas == ("files-api-2025-04-14", "x-1")
    assert settings.claude_api_url == "http://127.0.0.1:8099"
    assert settings.allowed_models == ("claude-haiku-",)
