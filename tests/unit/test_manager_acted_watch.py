"""`ActedWatch` finds the mark of a turn that acted wherever chunks split the error's body."""

import pytest

from hypercore_agents.api.errors import ModelFailed
from hypercore_agents.manager.idempotency import ActedWatch


def body_of(error: ModelFailed) -> bytes:
    return error.body("req_1").model_dump_json().encode()


ACTED = body_of(ModelFailed("the answer broke off", retryable=True).after_effects("s", 1))
NOT_ACTED = body_of(ModelFailed("the answer broke off", retryable=True))


@pytest.mark.parametrize("spaced", [False, True])
def test_the_acted_mark_is_found_wherever_chunks_split_it(spaced: bool) -> None:
    body = ACTED.replace(b'"acted":', b'"acted": ') if spaced else ACTED
    for cut in range(len(body) + 1):
        watch = ActedWatch()
        watch.feed(body[:cut])
        watch.feed(body[cut:])
        assert watch.found, body[:cut]
    watch = ActedWatch()
    for byte in body:
        watch.feed(bytes([byte]))
    assert watch.found


def test_a_body_without_the_acted_mark_is_not_reported() -> None:
    watch = ActedWatch()
    for byte in NOT_ACTED * 2:
        watch.feed(bytes([byte]))
    assert not watch.found
