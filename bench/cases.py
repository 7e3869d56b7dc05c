"""The cases, one function each: arms, number of rounds, and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.arms import (
    BARE,
    MEBIBYTES,
    MILLISECONDS,
    NO_BOUND,
    OURS,
    PER_SECOND,
    SECONDS,
    STOCK,
    STOCK_AFTER_RDT,
    STOCK_ZERO_COPY,
    Arm,
    Row,
    Samples,
    at_least,
    at_most,
    gigabytes_per_second,
    slowest,
)
from bench.rounds import Rounds

SMALL = 4096
LARGE = 256 << 20
BUSY = 16 << 20
AWAITED = 1 << 20
STREAMS = 4
MANY_IN_ONE = 10_000 * 20_000
STATE_DICT = 90_852_864
GROUP_SIZE = 8
FIRST_HOPS = 8
#: The libraries of `peers`: names in bench/libraries.py, which only the workers import.
LIBRARIES = (
    "memcpy, 1 thread",
    "memcpy, 2 threads",
    "torch gloo",
    "torch RPC",
    "nixl",
    "mooncake",
)

Case = Callable[[Rounds], list[Row]]
#: Name of an arm to its side and its transport.
Sides = Mapping[str, tuple[str, str | None]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case under its function's name."""
    CASES[function.__name__] = function
    return function


def _arms(scenario: str, sides: Sides, **options: object) -> dict[str, Arm]:
    """Return one arm for each side and transport.

    Args:
        scenario: The scenario of all arms.
        sides: Name to (side, transport).
        options: The scenario's other options, common to all arms.
    """
    return {
        name: Arm(side, scenario, {"transport": transport, **options})
        for name, (side, transport) in sides.items()
    }


#: Plain Ray, without this wheel.
PLAIN_SIDES: Sides = {"stock plain": (STOCK, None), "stock zero-copy": (STOCK_ZERO_COPY, None)}
#: The alternatives for CPU tensors on one host.
COMPANY: Sides = {"ours auto": (OURS, "auto"), **PLAIN_SIDES, "stock gloo": (STOCK, "gloo")}
GLOO_SIDES: Sides = {
    "ours plain": (OURS, None),
    "ours auto": (OURS, "auto"),
    "ours gloo": (OURS, "gloo"),
    **PLAIN_SIDES,
    "stock gloo": (STOCK, "gloo"),
}
RDT_SIDES: Sides = {
    "ours auto": (OURS, "auto"),
    "ours gloo": (OURS, "gloo"),
    "stock gloo": (STOCK, "gloo"),
}
NIXL_SIDES = {
    "ours plain beside nixl": (OURS, None),
    "ours nixl": (OURS, "nixl"),
    "stock plain beside nixl": (STOCK, None),
    "stock nixl": (STOCK, "nixl"),
}


def _plain(found: Mapping[str, Samples], label: str = "") -> dict[str, Samples]:
    """Return a row's samples of plain Ray.

    Args:
        found: The samples of the case.
        label: The end of the arms' names.
    """
    names = {"plain": f"stock plain{label}", "zero_copy": f"stock zero-copy{label}"}
    return {key: found[name] for key, name in names.items()}


@case
def hop(rounds: Rounds) -> list[Row]:
    """Transfer a 4 KB tensor from actor to actor, in sequence."""
    found = rounds.measure(_arms("hop", GLOO_SIDES, nbytes=SMALL, count=25), rounds=16)
    found |= rounds.measure_alone(_arms("hop", NIXL_SIDES, nbytes=SMALL, count=50), rounds=4)

    def row(
        transport: str, stock: str, beside: str, limit: float, plain: Mapping[str, Samples]
    ) -> Row:
        return Row(
            f"4 KB hop, {transport}, against a plain object",
            found[f"ours {transport}"],
            found[f"ours plain{beside}"],
            "ours, plain",
            at_most(limit),
            MILLISECONDS,
            found[f"stock {stock}"],
            found[f"stock plain{beside}"],
            **plain,
        )

    return [
        row("auto", "gloo", "", 1.15, _plain(found)),
        row("gloo", "gloo", "", 1.15, _plain(found)),
        row("nixl", "nixl", " beside nixl", 1.3, {"plain": found["stock plain beside nixl"]}),
    ]


@case
def medium_hop(rounds: Rounds) -> list[Row]:
    """Transfer tensors of 64 KiB and 1 MiB from actor to actor, in sequence."""
    sides = {name: side for name, side in GLOO_SIDES.items() if name != "ours gloo"}

    def measure(label: str, nbytes: int) -> Row:
        named = {f"{name}, {label}": side for name, side in sides.items()}
        found = rounds.measure(_arms("hop", named, nbytes=nbytes, count=25), rounds=8)
        return Row(
            f"{label} hop, auto, against a plain object",
            found[f"ours auto, {label}"],
            found[f"ours plain, {label}"],
            "ours, plain",
            at_most(1),
            MILLISECONDS,
            found[f"stock gloo, {label}"],
            found[f"stock plain, {label}"],
            **_plain(found, f", {label}"),
        )

    return [measure("64 KiB", 64 << 10), measure("1 MiB", 1 << 20)]


@case
def small_objects(rounds: Rounds) -> list[Row]:
    """Transfer small objects that are submitted without waiting."""
    found = rounds.measure(_arms("burst", GLOO_SIDES, count=500), rounds=8)
    found |= rounds.measure_alone(_arms("burst", NIXL_SIDES, count=300), rounds=3)

    def row(transport: str, stock: str, beside: str) -> Row:
        return Row(
            f"small objects without waiting, {transport}, against plain",
            found[f"ours {transport}"],
            found[f"ours plain{beside}"],
            "ours, plain",
            at_least(0.9),
            PER_SECOND,
            found[f"stock {stock}"],
            found[f"stock plain{beside}"],
            **_plain(found),
        )

    return [row("auto", "gloo", ""), row("gloo", "gloo", "")]


# In sequence: after all processes were idle for a second, the first transfer is slow.
IN_A_ROW = {"nbytes": LARGE, "count": 3}


@case
def repeated(rounds: Rounds) -> list[Row]:
    """Transfer an existing tensor of 256 MiB between actors of one host, repeatedly."""
    # No other arms: a longer wait between turns slows the fastest arm most.
    sides = {"ours auto": (OURS, "auto"), "stock gloo": (STOCK, "gloo")}
    arms = _arms("hop", sides, **IN_A_ROW) | {"memcpy": Arm(BARE, "memcpy", IN_A_ROW)}
    found = rounds.measure(arms, rounds=12)
    return [
        _large_row("auto, against one-thread memcpy", found, "ours auto", "memcpy", 0.6),
        _large_row("auto, against stock gloo", found, "ours auto", "stock gloo", 6),
        _row_in_company(rounds, "auto"),
    ]


def _row_in_company(rounds: Rounds, transport: str) -> Row:
    """Measure this wheel again, beside plain Ray."""
    ours = f"ours {transport}"
    sides = {ours: (OURS, transport), **PLAIN_SIDES, "stock gloo": (STOCK, "gloo")}
    named = {f"{name}, in company": side for name, side in sides.items()}
    found = rounds.measure(_arms("hop", named, **IN_A_ROW), rounds=5)
    return Row(
        f"256 MiB repeated, {transport}, against plain Ray with zero-copy",
        found[f"{ours}, in company"],
        found["stock zero-copy, in company"],
        "stock, zero-copy",
        NO_BOUND,
        gigabytes_per_second(LARGE),
        found["stock gloo, in company"],
        **_plain(found, ", in company"),
    )


@case
def peers(rounds: Rounds) -> list[Row]:
    """Transfer the same with libraries without Ray, each between two processes."""
    options = {"nbytes": LARGE, "count": 8}
    arms = {"ours auto": Arm(OURS, "hop", {"transport": "auto", **options})}
    for name in LIBRARIES:
        arms[name] = Arm(BARE, "library", {"library": name, **options})
    found = rounds.measure_alone(arms, rounds=3)
    return [
        Row(
            f"256 MiB, auto, against {name}",
            found["ours auto"],
            found[name],
            name,
            NO_BOUND,
            gigabytes_per_second(LARGE),
        )
        for name in LIBRARIES
    ]


@case
def gloo_large(rounds: Rounds) -> list[Row]:
    """Transfer the same over gloo, against torch.distributed."""
    sides = {"ours gloo": (OURS, "gloo"), "stock gloo": (STOCK, "gloo")}
    arms = _arms("hop", sides, **IN_A_ROW) | {"torch gloo": Arm(BARE, "raw_gloo", IN_A_ROW)}
    found = rounds.measure(arms, rounds=12)
    against = "gloo, against torch.distributed gloo"
    return [
        _large_row(against, found, "ours gloo", "torch gloo", 0.9),
        _row_in_company(rounds, "gloo"),
    ]


def _large_row(
    measure: str, found: dict[str, Samples], ours: str, against: str, limit: float
) -> Row:
    return Row(
        f"256 MiB repeated, {measure}",
        found[ours],
        found[against],
        against,
        at_least(limit),
        gigabytes_per_second(LARGE),
        found["stock gloo"],
    )


@case
def fresh(rounds: Rounds) -> list[Row]:
    """Transfer 256 MiB eight times between two new processes with fresh memory."""
    sides = {**RDT_SIDES, **PLAIN_SIDES}
    arms = _arms("hop_to_fresh", sides, nbytes=LARGE, count=FIRST_HOPS)
    arms["memcpy"] = Arm(BARE, "memcpy", IN_A_ROW)
    found = rounds.measure(arms, rounds=5)
    memcpy = found.pop("memcpy")
    by_hop = [
        {name: samples.every(FIRST_HOPS, number) for name, samples in found.items()}
        for number in range(FIRST_HOPS)
    ]
    first = by_hop[0]
    later = {name: slowest(hops[name] for hops in by_hop[1:]) for name in found}

    def against_memcpy(measure: str, hops: dict[str, Samples]) -> Row:
        return Row(
            f"256 MiB, {measure} of a new pair, auto, against one-thread memcpy",
            hops["ours auto"],
            memcpy,
            "memcpy",
            at_most(1.3),
            MILLISECONDS,
            hops["stock gloo"],
            **_plain(hops),
        )

    return [
        _against_stock_gloo("256 MiB first time into fresh memory", first, 3, LARGE),
        against_memcpy("first hop", first),
        against_memcpy("slowest of the next seven hops", later),
    ]


@case
def created(rounds: Rounds) -> list[Row]:
    """Transfer 256 MiB that the producer's method creates for each hop."""
    found = rounds.measure(_arms("hop_of_created", COMPANY, **IN_A_ROW), rounds=6)
    return [_against_stock_gloo("256 MiB created anew for each hop", found, 6, LARGE)]


@case
def state_dict(rounds: Rounds) -> list[Row]:
    """Transfer the demo's state dict: 103 tensors, 90.9 MB."""
    found = rounds.measure(_arms("hop", GLOO_SIDES, kind="state_dict"), rounds=10)
    return [_against_stock_gloo("state dict of 103 tensors, 90 MB", found, 4, STATE_DICT)]


def _against_stock_gloo(measure: str, found: dict[str, Samples], limit: float, nbytes: int) -> Row:
    return Row(
        f"{measure}, auto, against stock gloo",
        found["ours auto"],
        found["stock gloo"],
        "stock gloo",
        at_least(limit),
        gigabytes_per_second(nbytes),
        found["stock gloo"],
        **_plain(found),
    )


@case
def many(rounds: Rounds) -> list[Row]:
    """Transfer 10,000 tensors of 20 KB in one object, against one tensor of the same bytes."""
    one = _arms(
        "hop", {f"{name}, one": side for name, side in RDT_SIDES.items()}, nbytes=MANY_IN_ONE
    )
    sides = {**RDT_SIDES, **PLAIN_SIDES}
    found = rounds.measure(one | _arms("hop", sides, kind="many"), rounds=5)
    nixl = {name: side for name, side in NIXL_SIDES.items() if side[1] == "nixl"}
    found |= rounds.measure_alone(_arms("hop", nixl, kind="many"), rounds=3)
    return [
        Row(
            "10,000 tensors of 20 KB, auto, against one tensor",
            found["ours auto"],
            found["ours auto, one"],
            "ours, one tensor",
            at_most(3),
            MILLISECONDS,
            found["stock gloo"],
            found["stock gloo, one"],
            **_plain(found),
        ),
        Row(
            "10,000 tensors of 20 KB, nixl, against stock nixl",
            found["ours nixl"],
            found["stock nixl"],
            "stock nixl",
            at_least(5),
            MILLISECONDS,
            found["stock nixl"],
        ),
    ]


@case
def nixl_large(rounds: Rounds) -> list[Row]:
    """Transfer 256 MiB over NIXL: into registered memory, and a new tensor each time."""
    sides = {"ours nixl": (OURS, "nixl"), "stock nixl": (STOCK, "nixl")}
    into = {f"{name}, registered": side for name, side in sides.items()}
    new = {f"{name}, new tensor": side for name, side in sides.items()}
    arms = _arms("hop_into", into, nbytes=LARGE) | _arms("hop_of_new", new, nbytes=LARGE)
    arms["bare nixl"] = Arm(BARE, "bare_nixl", {"nbytes": LARGE})
    found = rounds.measure_alone(arms, rounds=5)
    unit = gigabytes_per_second(LARGE)
    return [
        Row(
            "256 MiB over nixl into registered memory",
            found["ours nixl, registered"],
            found["bare nixl"],
            "bare nixl",
            at_least(0.9),
            unit,
            found["stock nixl, registered"],
        ),
        Row(
            "256 MiB over nixl, a new tensor each time",
            found["ours nixl, new tensor"],
            found["stock nixl, new tensor"],
            "stock nixl",
            at_least(2),
            unit,
            found["stock nixl, new tensor"],
        ),
    ]


@case
def tcp(rounds: Rounds) -> list[Row]:
    """Transfer 256 MiB over our tcp lane between two test hosts, against iperf3."""
    options = {"nbytes": LARGE, "streams": STREAMS}
    arms = {
        "ours tcp lane": Arm(BARE, "agent_over_tcp", options),
        "iperf3": Arm(BARE, "iperf", options),
    }
    found = rounds.measure(arms, rounds=6)
    return [
        Row(
            f"256 MiB, tcp lane, two test hosts, {STREAMS} streams",
            found["ours tcp lane"],
            found["iperf3"],
            "iperf3",
            at_least(0.85),
            gigabytes_per_second(LARGE),
        )
    ]


@case
def fan_out(rounds: Rounds) -> list[Row]:
    """256 MiB, and the demo's state dict, to several readers of one host that sum them."""
    tensor: dict[str, object] = {"nbytes": LARGE}
    dictionary: dict[str, object] = {"kind": "state_dict"}
    transfers = [("256 MiB", readers, tensor) for readers in (1, 2, 4, 8)]
    transfers += [("state dict", readers, dictionary) for readers in (1, 4)]
    found: dict[str, Samples] = {}
    for label, readers, value in transfers:
        named = {f"{name}, {label}, {readers}": side for name, side in COMPANY.items()}
        found |= rounds.measure(_arms("fan_out", named, readers=readers, **value), rounds=6)
    # Ray's object store keeps its memory, so the memory of one object in it cannot be measured.
    holders = {f"{name}, memory": COMPANY[name] for name in ("ours auto", "stock gloo")}
    memory = {"readers": 8, "nbytes": LARGE, "what": "memory"}
    found |= rounds.measure_alone(_arms("fan_out", holders, **memory), rounds=2)

    def against_zero_copy(label: str, readers: int, nbytes: int) -> Row:
        return Row(
            f"{label} to {readers} readers that sum it, auto, against plain Ray with zero-copy",
            found[f"ours auto, {label}, {readers}"],
            found[f"stock zero-copy, {label}, {readers}"],
            "stock, zero-copy",
            at_least(1.2),
            gigabytes_per_second(readers * nbytes),
            found[f"stock gloo, {label}, {readers}"],
            **_plain(found, f", {label}, {readers}"),
        )

    return [
        *(against_zero_copy("256 MiB", readers, LARGE) for readers in (1, 2, 4, 8)),
        *(against_zero_copy("state dict", readers, STATE_DICT) for readers in (1, 4)),
        Row(
            "256 MiB to 4 readers, auto, against one reader",
            found["ours auto, 256 MiB, 4"],
            found["ours auto, 256 MiB, 1"],
            "ours, one reader",
            at_most(1.25),
            MILLISECONDS,
            found["stock gloo, 256 MiB, 4"],
            found["stock gloo, 256 MiB, 1"],
            **_plain(found, ", 256 MiB, 4"),
        ),
        Row(
            "memory of 8 readers beyond the producer's 256 MiB",
            found["ours auto, memory"],
            Samples([float(LARGE)]),
            "one copy",
            at_most(1.1, "<= 1.1x"),
            MEBIBYTES,
            found["stock gloo, memory"],
        ),
    ]


@case
def busy(rounds: Rounds) -> list[Row]:
    """Pull 16 MiB while the producer runs pure Python, against an idle producer."""
    options = {"nbytes": BUSY, "count": 8}
    idle = {f"{name}, idle": side for name, side in RDT_SIDES.items()}
    found = rounds.measure(
        _arms("busy", idle, is_spinning=False, **options)
        | _arms("busy", RDT_SIDES, is_spinning=True, **options),
        rounds=5,
    )
    return [
        Row(
            "16 MiB pulled from a busy producer, auto, against an idle one",
            found["ours auto"],
            found["ours auto, idle"],
            "ours, idle producer",
            at_most(1.5),
            MILLISECONDS,
            found["stock gloo"],
            found["stock gloo, idle"],
        )
    ]


@case
def memory(rounds: Rounds) -> list[Row]:
    """Measure how far memory rises while 256 MiB are pulled."""
    arms = {
        f"{name}, {process}": Arm(
            side, "extra_memory", {"transport": transport, "nbytes": LARGE, "process": process}
        )
        for name, (side, transport) in RDT_SIDES.items()
        for process in ("consumer", "producer")
    }
    found = rounds.measure(arms, rounds=3)
    pulled = Samples([float(LARGE)])

    def row(process: str, limit: float, text: str) -> Row:
        return Row(
            f"extra memory of the {process} while 256 MiB are pulled",
            found[f"ours auto, {process}"],
            pulled,
            "the bytes pulled",
            at_most(limit, text),
            MEBIBYTES,
            found[f"stock gloo, {process}"],
        )

    return [row("consumer", 1.05, "<= 1.05x"), row("producer", 16 / 256, "<= 16 MiB")]


@case
def plain_after_rdt(rounds: Rounds) -> list[Row]:
    """Transfer plain tensors between processes that have used RDT, against unused stock ones.

    New actors in each round: the number of pages that a process's allocator requests again differs
    by half between processes, and stays constant for the life of a process.
    """
    sides = {
        "ours after RDT": (OURS, "auto"),
        "stock": (STOCK, None),
        "stock after RDT": (STOCK_AFTER_RDT, "gloo"),
    }

    def measure(label: str, nbytes: int, count: int, turns: int) -> Row:
        arms = {
            f"{name}, {label}": Arm(
                side, "plain_hop", {"used": used, "nbytes": nbytes, "count": count}
            )
            for name, (side, used) in sides.items()
        }
        found = rounds.measure_alone(arms, turns)
        return Row(
            f"plain {label} tensor hop after using RDT, against stock",
            found[f"ours after RDT, {label}"],
            found[f"stock, {label}"],
            "stock, no RDT used",
            at_most(1.02),
            MILLISECONDS,
            found[f"stock after RDT, {label}"],
        )

    return [measure("4 KB", SMALL, 50, 12), measure("16 MiB", BUSY, 5, 16)]


@case
def group(rounds: Rounds) -> list[Row]:
    """Create a gloo group of eight actors."""
    options = {"transport": "gloo", "count": GROUP_SIZE}
    arms = {
        "ours gloo group": Arm(OURS, "group_of", options),
        "stock gloo group": Arm(STOCK, "group_of", options),
    }
    found = rounds.measure(arms, rounds=5)
    return [
        Row(
            f"group of {GROUP_SIZE} actors made, gloo",
            found["ours gloo group"],
            Samples([2.0]),
            "two seconds",
            at_most(1, "<= 2 s"),
            SECONDS,
            found["stock gloo group"],
        )
    ]


@case
def task_hop(rounds: Rounds) -> list[Row]:
    """Transfer a 4 KB tensor from an actor to a normal task."""
    sides = {"ours plain": (OURS, None), "ours auto": (OURS, "auto"), **PLAIN_SIDES}
    found = rounds.measure(_arms("task_hop", sides, nbytes=SMALL, count=25), rounds=8)
    return [
        Row(
            "4 KB hop to a normal task, auto, against a plain object",
            found["ours auto"],
            found["ours plain"],
            "ours, plain",
            at_most(1.3),
            MILLISECONDS,
            **_plain(found),
        )
    ]


@case
def generator(rounds: Rounds) -> list[Row]:
    """Take items from a streaming generator."""
    sides = {"plain": (OURS, None), "auto": (OURS, "auto"), **PLAIN_SIDES}
    arms: dict[str, Arm] = {}
    for label, nbytes, count in (("4 KB", SMALL, 300), ("1 MiB", AWAITED, 100)):
        named = {f"{name}, {label}": side for name, side in sides.items()}
        arms |= _arms("items", named, nbytes=nbytes, count=count)
    found = rounds.measure(arms, rounds=6)
    return [
        Row(
            f"items of {label} through a generator, auto, against plain",
            found[f"auto, {label}"],
            found[f"plain, {label}"],
            "ours, plain",
            at_least(0.5),
            PER_SECOND,
            **_plain(found, f", {label}"),
        )
        for label in ("4 KB", "1 MiB")
    ]


@case
def awaited(rounds: Rounds) -> list[Row]:
    """Await 100 objects of 1 MiB in one async actor, concurrently and sequentially."""
    auto: Sides = {"ours auto": (OURS, "auto")}
    options: dict[str, object] = {"nbytes": AWAITED, "count": 100}

    def arms_of(label: str, sides: Sides, *, is_at_once: bool, what: str) -> dict[str, Arm]:
        named = {f"{name}, {label}": side for name, side in sides.items()}
        return _arms("awaited", named, is_at_once=is_at_once, what=what, **options)

    arms = {
        **arms_of("at once", {**auto, **PLAIN_SIDES}, is_at_once=True, what="pulls"),
        **arms_of("one by one", auto, is_at_once=False, what="pulls"),
        **arms_of("standstill", {**auto, **PLAIN_SIDES}, is_at_once=True, what="standstill"),
    }
    found = rounds.measure(arms, rounds=6)
    return [
        Row(
            "100 objects of 1 MiB awaited concurrently, against sequentially",
            found["ours auto, at once"],
            found["ours auto, one by one"],
            "one by one",
            at_most(1),
            MILLISECONDS,
            **_plain(found, ", at once"),
        ),
        Row(
            "longest event loop pause meanwhile",
            found["ours auto, standstill"],
            Samples([0.020]),
            "20 ms",
            at_most(1, "<= 20 ms"),
            MILLISECONDS,
            **_plain(found, ", standstill"),
        ),
    ]
