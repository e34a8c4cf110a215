"""The steps of a run, one after the other, and the summary at their end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from kitrocket.demo import checks, delivery, summary, traffic
from kitrocket.demo.checks import Checks, CostSeen, Raw, UsageLine
from kitrocket.demo.delivery import Tally
from kitrocket.demo.lifecycles import MAYA, STORIES, Event, Expected, Life, Person, fixtures, fixtures_end, orphan
from kitrocket.demo.summary import Screen
from kitrocket.kit import KitRocket

#: The order of deliveries and the made-up usage are the same in every run.
_SEED = 2026


@dataclass(frozen=True)
class Stage:
    """What the steps share. ``raw`` is a connection of its own, past every service."""

    kit: KitRocket
    raw: Raw
    screen: Screen
    checks: Checks
    port: int
    key: str


@dataclass
class _Script:
    """Every event to deliver, and where each user's subscription must end."""

    events: list[Event] = field(default_factory=list)
    expected: dict[str, Expected] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)


async def run_steps(stage: Stage) -> None:
    """Run every step, then print the summary."""
    people = await _create_people(stage)
    script = _write_script(stage, people)
    tally = await _deliver(stage, script)
    await _refuse_junk(stage, script)
    await _check_sessions(stage, people)
    users, models = await _record_usage(stage, people)
    costs = await _price_usage(stage)
    lines = await checks.check_subscriptions(stage.checks, stage.kit, stage.raw, people, script.expected)
    stage.screen.say()
    summary.show_deliveries(stage.screen, tally)
    stage.screen.say()
    summary.show_subscriptions(stage.screen, lines, script.titles)
    stage.screen.say()
    summary.show_usage(stage.screen, users, models)
    stage.screen.say()
    summary.show_costs(stage.screen, costs)
    stage.screen.say()
    summary.show_verdict(stage.screen, stage.checks)


async def _create_people(stage: Stage) -> list[Person]:
    with stage.screen.step("users", total=len(STORIES) + 1) as step:
        people, passwords = await traffic.create_people(stage.kit, step.advance)
        signed_in = await traffic.sign_in(stage.kit, passwords)
        await checks.check_people(stage.checks, stage.raw, people, signed_in)
        step.lines = [
            f"{len(people)} created with passwords",
            f"{signed_in.welcomed} signed in, {signed_in.refused} wrong attempts refused",
        ]
    return people


def _write_script(stage: Stage, people: Sequence[Person]) -> _Script:
    """Tell every story; the last of the people is the one of the payloads themselves."""
    now = stage.kit.clock().replace(microsecond=0)
    script = _Script(events=[*fixtures(), orphan(now)])
    for number, (story, person) in enumerate(zip(STORIES, people[:-1], strict=True), start=1):
        life = Life(person, number, now)
        script.expected[person.id] = story.tell(life)
        script.titles[person.id] = story.title
        script.events += life.events
    script.expected[MAYA] = fixtures_end(now)
    script.titles[MAYA] = "the payloads"
    return script


async def _deliver(stage: Stage, script: _Script) -> Tally:
    requests = delivery.twice_and_shuffled(script.events, stage.key, seed=_SEED)
    with stage.screen.step("webhooks", total=len(requests)) as step:
        began = perf_counter()
        answers = await delivery.deliver(requests, stage.port, advance=step.advance)
        rate = len(answers) / (perf_counter() - began)
        tally = delivery.tally(script.events, answers)
        await checks.check_deliveries(stage.checks, stage.raw, script.events, tally)
        step.lines = [
            f"{len(script.events)} events, each delivered twice, shuffled",
            f"{_statuses(tally.statuses)}, {rate:,.0f} a second",
        ]
    return tally


async def _refuse_junk(stage: Stage, script: _Script) -> None:
    """Post what must be refused, and see that it changes nothing."""
    max_bytes = stage.kit.settings.webhook_max_bytes
    with stage.screen.step("junk") as step:
        before = await checks.fingerprint(stage.raw)
        statuses = Counter[int]()
        for bad in delivery.junk(script.events[0], stage.key, max_bytes=max_bytes):
            [answer] = await delivery.deliver([bad.request], stage.port, advance=step.advance)
            statuses[answer.status] += 1
            stage.checks.equal(f"status for {bad.what}", answer.status, bad.status)
        stage.checks.equal("what junk changed", await checks.fingerprint(stage.raw) == before, True)
        step.lines = [
            f"{statuses.total()} bad deliveries refused: {_statuses(statuses)}",
            "nothing stored, nothing changed",
        ]


async def _check_sessions(stage: Stage, people: list[Person]) -> None:
    with stage.screen.step("sessions") as step:
        figures = await traffic.run_sessions(stage.kit, stage.raw, people)
        await checks.check_sessions(stage.checks, stage.raw, figures)
        step.lines = [
            f"{figures.live + figures.revoked} created, {figures.slid} slid when used, {figures.revoked} revoked",
            f"{figures.swept.deleted:,} expired swept in {figures.sweep_seconds:.1f} s"
            f" during {figures.during_sweep:,} validations",
        ]


async def _record_usage(stage: Stage, people: Sequence[Person]) -> tuple[list[UsageLine], list[UsageLine]]:
    entries = traffic.plan_usage(people, stage.kit.clock(), seed=_SEED)
    with stage.screen.step("usage", total=traffic.USAGE_ROWS + traffic.USAGE_REPEATED // 2) as step:
        figures = await traffic.run_usage(stage.kit, entries, step.advance)
        lines = await checks.check_usage(stage.checks, stage.kit, stage.raw, people, entries, figures)
        rate = figures.recorded / figures.seconds
        step.lines = [
            f"{figures.recorded:,} calls from {traffic.USAGE_CALLERS} callers, {rate:,.0f} a second",
            f"{figures.repeated + figures.repeated_in_bulk:,} of them sent again, counted once",
        ]
    return lines


async def _price_usage(stage: Stage) -> list[CostSeen]:
    with stage.screen.step("cost") as step:
        costs = await checks.check_cost(stage.checks, stage.kit, stage.raw)
        total = sum(line.cost for line in costs)
        step.lines = [f"30 days cost {total:,.2f} USD by two dated prices of each model"]
    return costs


def _statuses(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
