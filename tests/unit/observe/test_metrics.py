"""RDT's numbers in Ray's metrics: set now and then, made when the first is set."""

from __future__ import annotations

from ray.experimental.rdt.observe.metrics import Gauges


class Ticker:
    """A session as far as gauges need one."""

    def on_tick(self, callback):
        self.tick = callback


class Gauge:
    """Remembers what it was set to."""

    def __init__(self, name, description):
        self.name, self.description, self.values = name, description, []

    def set(self, value):
        self.values.append(value)


def make_gauges(clock, numbers):
    ticker, made = Ticker(), []

    def make(name, description):
        made.append(Gauge(name, description))
        return made[-1]

    Gauges(ticker, lambda: numbers, make, lambda: clock[0])
    return ticker.tick, made


def test_gauges_show_the_numbers_of_stats():
    clock, numbers = [0.0], {"stored_bytes": 1, "pinned_bytes": 2, "pooled_bytes": 3, "other": 5}
    tick, made = make_gauges(clock, numbers)
    clock[0] = 2
    tick()
    numbers["stored_bytes"] = 7
    clock[0] = 4
    tick()
    assert {gauge.name: gauge.values for gauge in made} == {
        "rdt_stored_bytes": [1, 7],
        "rdt_pinned_bytes": [2, 2],
        "rdt_pooled_bytes": [3, 3],
        "rdt_hinted_bytes": [0, 0],
    }
    assert all(gauge.description for gauge in made)


def test_many_ticks_set_them_once_in_two_seconds():
    clock = [0.0]
    tick, made = make_gauges(clock, {})
    for step in range(100):
        clock[0] = step / 10
        tick()
    assert [len(gauge.values) for gauge in made] == [4] * 4
