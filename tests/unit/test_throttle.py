"""The shared limit of requests in flight: it is halved, grows back, and nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from streamswav.errors import UnavailableError
from streamswav.stream.store.retry import Retrier
from streamswav.stream.store.throttle import PAUSE_SECONDS, Throttle, shared_throttle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def entered(throttle: Throttle, count: int) -> list[float]:
    """Take so many turns at once."""
    turns = [throttle.enter(0.0) for _ in range(count)]
    assert None not in turns
    return [turn for turn in turns if turn is not None]


def waits(throttle: Throttle, count: int) -> None:
    """Return when so many threads wait for a turn."""
    arrived = threading.Event()
    while len(throttle._waiting) < count:
        arrived.wait(0.001)


def test_no_more_than_the_limit_are_in_flight(clock: Clock) -> None:
    throttle = Throttle(3, clock)
    turns = entered(throttle, 3)
    assert throttle.enter(0.0) is None
    throttle.leave(turns[0], "ok")
    assert throttle.enter(0.0) is not None


def test_a_burst_halves_what_was_in_flight_once(clock: Clock) -> None:
    throttle = Throttle(64, clock)
    turns = entered(throttle, 8)
    clock.now += 1
    for turn in turns:
        throttle.leave(turn, "throttled")
    assert throttle.limit == 4


def test_each_further_pause_may_halve_again_down_to_one(clock: Clock) -> None:
    throttle = Throttle(8, clock)
    seen = []
    for _ in range(4):
        turns = entered(throttle, throttle.limit)
        clock.now += PAUSE_SECONDS
        for turn in turns:
            throttle.leave(turn, "throttled")
        (turn,) = entered(throttle, 1)
        clock.now += PAUSE_SECONDS / 2
        throttle.leave(turn, "throttled")  # within the pause: no further cut
        seen.append(throttle.limit)
    assert seen == [4, 2, 1, 1]


def test_the_limit_grows_by_one_a_pause_while_requests_succeed_back_to_the_most(clock: Clock) -> None:
    throttle = Throttle(8, clock)
    turns = entered(throttle, 4)
    clock.now += 1
    for turn in turns:
        throttle.leave(turn, "throttled")
    seen = []
    for _ in range(8):
        clock.now += PAUSE_SECONDS
        for _ in range(10):
            throttle.leave(*entered(throttle, 1), "ok")
        seen.append(throttle.limit)
    assert seen == [3, 4, 5, 6, 7, 8, 8, 8]


def test_without_a_success_the_limit_does_not_grow(clock: Clock) -> None:
    throttle = Throttle(8, clock)
    throttle.leave(*entered(throttle, 1), "throttled")
    clock.now += 100 * PAUSE_SECONDS
    (turn,) = entered(throttle, 1)
    assert throttle.enter(0.0) is None
    throttle.leave(turn, "ok")
    assert throttle.limit == 2


@pytest.mark.parametrize("outcome", ["error", "timeout"])
def test_other_failures_leave_the_limit_as_it_is(clock: Clock, outcome: str) -> None:
    throttle = Throttle(8, clock)
    clock.now += 1
    throttle.leave(*entered(throttle, 1), outcome)
    assert throttle.limit == 8


def test_turns_come_in_the_order_of_asking() -> None:
    throttle, order = Throttle(1), []
    (turn,) = entered(throttle, 1)

    def ask(name: int) -> None:
        began = throttle.enter(30.0)
        assert began is not None
        order.append(name)
        throttle.leave(began, "ok")

    with ThreadPoolExecutor(4) as pool:
        for name in range(4):
            pool.submit(ask, name)
            waits(throttle, name + 1)
        throttle.leave(turn, "ok")
    assert order == [0, 1, 2, 3]


def test_who_gave_up_waiting_takes_no_turn(clock: Clock) -> None:
    throttle = Throttle(1, clock)
    (turn,) = entered(throttle, 1)
    assert throttle.enter(0.01) is None
    throttle.leave(turn, "ok")
    assert entered(throttle, 1)


def test_many_threads_lose_no_turn() -> None:
    throttle, lock, now, most = Throttle(5), threading.Lock(), [0], [0]

    def work(number: int) -> None:
        began = throttle.enter(30.0)
        assert began is not None
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        with lock:
            now[0] -= 1
        throttle.leave(began, ("ok", "throttled", "error")[number % 3])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(3000)))
    assert most[0] <= 5
    throttle.limit = 5
    assert len(entered(throttle, 5)) == 5


def test_a_call_that_gets_no_turn_until_its_deadline_says_so() -> None:
    throttle = Throttle(1)
    entered(throttle, 1)
    retrier = Retrier(0.05, lambda *_: None, throttle=throttle)
    with pytest.raises(UnavailableError, match=r"s3://bucket/a: read had no turn in 0 s.*throttles"):
        retrier.call(lambda _: pytest.fail("it had a turn"), url="s3://bucket/a", operation="read")


def test_a_turn_is_given_back_whatever_the_request_raises() -> None:
    throttle = Throttle(1)
    retrier = Retrier(5.0, lambda *_: None, throttle=throttle)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            retrier.call(lambda _: 1 / 0, url="s3://bucket/a", operation="read")


def test_each_kind_of_storage_has_one_throttle_a_process() -> None:
    assert shared_throttle("one", 4) is shared_throttle("one", 8)
    assert shared_throttle("one", 4) is not shared_throttle("two", 4)
