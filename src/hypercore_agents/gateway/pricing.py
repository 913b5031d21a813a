"""Prices of model requests: USD per million tokens, and per use of API-run tools, by model.

The built-in prices are those with which the pinned Claude CLI (2.1.330) computes a turn's cost, taken from its results
for known numbers of tokens; `claude-opus-4-1`, `-4-0` and `claude-3-opus`, which it no longer knows, have their last
list price. They were compared with the public list, https://platform.claude.com/docs/en/about-claude/pricing, as of
October 2026. To correct a price without a release, name it in the JSON file of `MODEL_PRICES`, which adds or replaces
entries; to correct it for everyone, edit `BUILT_IN`.

A name also matches its dated versions, and the longest matching name wins. An unknown model costs as much as the most
expensive known one, so that a missing price never exceeds a budget; so does an unknown unit.

A model with `long_context` prices costs those for the whole request once its input, including caches, exceeds `above`
tokens: Haiku 5.5 above 100,000, Sonnet 4 and 4.5 above 200,000 (the last list price of their 1M window, which the list
no longer has). All other models have one price for their whole window, `[1m]` or not. A web search costs 10 USD per
1,000, a web fetch only its tokens. Not covered: what a request cannot use here (`request_rules.py`), such as service
tiers, fast modes, regional inference, containers and batches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hypercore_agents.gateway.metering import Tokens
from hypercore_agents.kit.environment import SettingError

_log = structlog.get_logger(__name__)
_REMEMBERED = 1000
_UNKNOWN_UNIT = 0.01


class PriceFileError(SettingError):
    """`MODEL_PRICES` names a file that cannot be used; the message says why."""


class Rates(BaseModel):
    """USD per million tokens, which is micro-dollars per token. A cache write for an hour costs twice the input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cache_read: float = Field(ge=0)
    cache_write: float = Field(ge=0)

    @property
    def highest_input(self) -> float:
        """The highest price of an input token, except for tokens that are cached for an hour."""
        return max(self.input, self.cache_read, self.cache_write)


class LongContext(Rates):
    """Rates of a request with more than `above` input tokens."""

    above: int = Field(default=200_000, ge=0)


class Price(Rates):
    """A model's rates. `server_tools`: USD for each unit that `usage.server_tool_use` names."""

    long_context: LongContext | None = None
    server_tools: Mapping[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {"web_search_requests": 0.01, "web_fetch_requests": 0.0}
    )

    def at(self, input_tokens: int) -> Rates:
        """Return the rates of a request with this number of input tokens."""
        longer = self.long_context
        return longer if longer is not None and input_tokens > longer.above else self

    def unit_micro_usd(self, name: str) -> float:
        """Return the price of a unit. An unknown unit costs as much as the most expensive known one."""
        known = self.server_tools.get(name)
        return 1e6 * (max(_UNKNOWN_UNIT, *self.server_tools.values()) if known is None else known)


def _price(given: float, produced: float, read: float, write: float) -> Price:
    return Price(input=given, output=produced, cache_read=read, cache_write=write)


_OPUS_4 = _price(15, 75, 1.5, 18.75)
_OPUS_5 = _price(5, 25, 0.5, 6.25)
_SONNET = _price(3, 15, 0.3, 3.75)
_SONNET_LONG = _SONNET.model_copy(
    update={"long_context": LongContext(input=6, output=22.5, cache_read=0.6, cache_write=7.5)}
)
_HAIKU_5_5 = _price(0.1, 0.5, 0.01, 0.125).model_copy(
    update={"long_context": LongContext(input=0.5, output=2.5, cache_read=0.05, cache_write=0.625, above=100_000)}
)
BUILT_IN: Mapping[str, Price] = {
    "claude-3-haiku": _price(0.25, 1.25, 0.03, 0.3),
    "claude-3-opus": _OPUS_4,
    "claude-3-5-haiku": _price(0.8, 4, 0.08, 1),
    "claude-3-5-sonnet": _SONNET,
    "claude-3-7-sonnet": _SONNET,
    "claude-opus-4": _OPUS_4,
    "claude-opus-4-0": _OPUS_4,
    "claude-opus-4-1": _OPUS_4,
    "claude-opus-4-5": _OPUS_5,
    "claude-opus-4-6": _OPUS_5,
    "claude-opus-4-7": _OPUS_5,
    "claude-opus-4-8": _OPUS_5,
    "claude-opus-5": _OPUS_5,
    "claude-opus-5-5": _price(4, 20, 0.2, 5),
    "claude-sonnet-4": _SONNET_LONG,
    "claude-sonnet-4-5": _SONNET_LONG,
    "claude-sonnet-4-6": _SONNET,
    "claude-sonnet-5": _price(2, 10, 0.2, 2.5),
    "claude-sonnet-5-5": _price(2, 10, 0.1, 2.5),
    "claude-haiku-4-5": _price(1, 5, 0.1, 1.25),
    "claude-haiku-5-5": _HAIKU_5_5,
    "claude-fable-5": _price(10, 50, 1, 12.5),
    "claude-fable-5-1": _price(10, 50, 0.25, 12.5),
    "claude-fable-5-2": _price(8, 40, 0.2, 10),
    "claude-mythos-5": _price(10, 50, 1, 12.5),
    "claude-mythos-5-1": _price(10, 50, 0.25, 12.5),
    "claude-mythos-5-2": _price(8, 40, 0.2, 10),
}


class PriceList:
    """Prices by model."""

    def __init__(self, prices: Mapping[str, Price] = BUILT_IN) -> None:
        self._prices = dict(prices)
        self._most_expensive = max(self._prices.values(), key=lambda price: (price.output, price.input))
        self._found: dict[str, Price] = {}
        self._unknown_units: set[str] = set()

    @staticmethod
    def load(path: Path | None) -> "PriceList":
        """Return the built-in prices, overridden by those of a file. Raises PriceFileError."""
        if path is None:
            return PriceList()
        try:
            given = TypeAdapter(dict[str, Price]).validate_json(path.read_bytes())
        except OSError as error:
            raise PriceFileError(f"MODEL_PRICES: cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "the file"
            raise PriceFileError(
                f"MODEL_PRICES: {path}: {where}: {fault['msg']}; in USD per million tokens, the form is "
                '{"MODEL": {"input": 3, "output": 15, "cache_read": 0.3, "cache_write": 3.75}}'
            ) from None
        return PriceList({**BUILT_IN, **given})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models with a listed price."""
        return tuple(self._prices)

    def name_of(self, model: str) -> str | None:
        """Return the name under which a model's price is listed, None for an unknown model."""
        model = model.removesuffix("[1m]")
        known = [name for name in self._prices if model == name or model.startswith(f"{name}-")]
        return max(known, key=len, default=None)

    def of(self, model: str) -> Price:
        """Return a model's price; for an unknown model the highest, with one log line per model."""
        if (price := self._found.get(model)) is not None:
            return price
        known = self.name_of(model)
        price = self._prices[known] if known is not None else self._most_expensive
        if len(self._found) < _REMEMBERED:
            self._found[model] = price
            if known is None:
                _log.warning("pricing.unknown_model", model=model, remedy="set its price in MODEL_PRICES")
        return price

    def cost_micro_usd(self, model: str, tokens: Tokens) -> int:
        """Return the cost of these tokens in whole micro-dollars."""
        price = self.of(model)
        rates = price.at(tokens.input + tokens.cache_read + tokens.cache_creation)
        for name in tokens.server_tools:
            if name not in price.server_tools and name not in self._unknown_units and len(self._unknown_units) < 100:
                self._unknown_units.add(name)
                _log.warning(
                    "pricing.unknown_unit", unit=name, remedy="set its price under server_tools in MODEL_PRICES"
                )
        return round(
            tokens.input * rates.input
            + tokens.output * rates.output
            + tokens.cache_read * rates.cache_read
            + (tokens.cache_creation - tokens.cache_creation_1h) * rates.cache_write
            + tokens.cache_creation_1h * 2 * rates.input
            + sum(count * price.unit_micro_usd(name) for name, count in tokens.server_tools.items())
        )
