"""Whose time it is: limits that count only their own, threads that hang, places at the engine, gradings that fail."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import threading
import time

import pytest

from envs.errors import EngineHungError, Unscored, WorldError
from envs.limits import threads
from envs.limits.clocks import blocking_limit, place_in, stopped_clocks, time_limit
from envs.limits.threads import Threads
from envs.tools import call_tool, tool
from envs.types import Episode, StopReason, Task, ToolCall, ToolErrorKind
from envs.user_code import call_user
from graders.types import Grade
from tests.support import ROOT
from trainer.engines.engine import Sampling
from trainer.engines.watched import WatchedEngine
from trainer.rollouts.admission import Place, Places
from trainer.rollouts.grading import Grading

TASK = Task(task_id="t", messages=())
EPISODE = Episode(rollout_id="r", task_id="t", messages=(), turns=(), stop_reason=StopReason.ANSWERED)


# --- clocks


async def test_a_limit_ends_what_takes_longer_and_leaves_alone_what_does_not():
    async with time_limit(30) as limit:
        await asyncio.sleep(0)
    assert not limit.expired()
    with pytest.raises(TimeoutError):
        async with time_limit(0.05) as limit:
            await asyncio.Event().wait()
    assert limit.expired()


async def test_a_time_out_of_the_works_own_is_told_from_the_limit():
    with pytest.raises(TimeoutError):
        async with time_limit(30) as limit:
            raise TimeoutError
    assert not limit.expired()


async def test_no_clock_runs_while_ours_is_waited_for_and_all_go_on_afterwards():
    with pytest.raises(TimeoutError):
        async with time_limit(0.3) as outer, time_limit(0.2) as inner:
            with stopped_clocks():
                await asyncio.sleep(0.7)
            assert not inner.expired() and not outer.expired()
            await asyncio.Event().wait()
    assert inner.expired() and not outer.expired()


async def test_a_clock_that_stands_and_goes_on_many_times_counts_what_it_ran_and_no_more():
    async with time_limit(30) as clock:
        start = clock.loop.time()
        for _ in range(40):
            await asyncio.sleep(0.01)
            with stopped_clocks():
                await asyncio.sleep(0.01)
        whole_s = clock.loop.time() - start
        clock.stop()
        assert 0.4 - 0.001 <= 30 - clock._left_s <= whole_s - 0.4 + 0.001
        clock.go_on()


async def test_a_limit_ends_in_time_though_its_clock_stood_still_before():
    async with asyncio.timeout(30):
        with pytest.raises(TimeoutError):
            async with time_limit(0.2) as clock:
                for _ in range(5):
                    with stopped_clocks():
                        await asyncio.sleep(0.05)
                await asyncio.Event().wait()
        assert clock.expired()


async def test_a_clock_stands_still_as_long_as_one_of_the_tasks_in_it_waits_for_us():
    async def wait(seconds: float) -> None:
        with stopped_clocks():
            await asyncio.sleep(seconds)

    async with time_limit(0.2):
        await asyncio.gather(wait(0.1), wait(0.5))


async def test_a_loop_that_is_held_up_takes_no_time_of_what_has_answered_meanwhile():
    async with time_limit(0.2) as limit:
        answer = asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.05)
        time.sleep(0.6)  # noqa: ASYNC251 - another episode's work, on this very loop
        await answer
    assert not limit.expired()


async def test_the_wait_for_a_place_is_on_no_clock():
    slots = asyncio.Semaphore(1)
    await slots.acquire()
    asyncio.get_running_loop().call_later(0.6, slots.release)
    async with time_limit(0.2), place_in(slots):
        pass
    assert slots.locked() is False


# --- threads


async def test_calls_that_hang_take_no_thread_of_others_and_are_named_when_none_is_left():
    threads, end = Threads(most=4), threading.Event()

    async def hang() -> None:
        with pytest.raises(TimeoutError):
            async with time_limit(0.05):
                await threads.run("hang", end.wait)

    for number in range(1, 4):
        await hang()
        assert threads.num_hung == number
        # As many healthy ones side by side as ever.
        together = threading.Barrier(4)
        await asyncio.gather(*(threads.run("meet", together.wait, 30) for _ in range(4)))
    await hang()
    with pytest.raises(WorldError, match="no thread is left; calls that do not return: 4 of hang"):
        await threads.run("healthy", str)
    end.set()
    async with asyncio.timeout(60):
        while threads.num_hung:  # noqa: ASYNC110 - threads know no events of asyncio's
            await asyncio.sleep(0.01)
    assert await threads.run("healthy", str) == ""


async def test_a_call_that_waits_for_a_thread_is_not_timed_and_ends_where_all_hang():
    threads, end = Threads(most=1), threading.Event()
    first = asyncio.create_task(threads.run("slow", end.wait))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.5, end.set)
    async with time_limit(0.2):
        assert await threads.run("healthy", str) == ""
    assert await first
    end.clear()
    first = asyncio.create_task(threads.run("hang", end.wait))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(threads.run("healthy", str))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(WorldError, match="1 of hang"):
        await waiting
    end.set()


async def test_the_wait_of_a_call_that_was_cancelled_in_the_queue_costs_nothing():
    threads, end = Threads(most=1), threading.Event()
    first = asyncio.create_task(threads.run("slow", end.wait))
    await asyncio.sleep(0)
    second = asyncio.create_task(threads.run("never", lambda: pytest.fail("it was given up")))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    end.set()
    await first
    assert threads.num_hung == 0 and await threads.run("healthy", str) == ""


async def test_a_thread_is_used_again_and_an_error_comes_out_as_it_is():
    threads = Threads(most=2)
    names = {await threads.run("name", threading.get_ident) for _ in range(5)}
    assert len(names) == 1
    with pytest.raises(KeyError, match="mine"):
        await threads.run("fails", {}.__getitem__, "mine")
    assert await threads.run("name", threading.get_ident) in names


async def test_a_function_that_raises_stop_iteration_does_not_hang():
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await call_user(next, iter(()))


async def test_what_async_code_hands_to_threads_takes_so_many_and_no_more(monkeypatch):
    daemons = threads._Daemons(most=3)
    monkeypatch.setattr(threads, "_DAEMONS", daemons)
    threads.let_loop_end()
    seen = await asyncio.gather(*(asyncio.to_thread(threading.get_ident) for _ in range(50)))
    assert len(seen) == 50 and len(set(seen)) <= 3
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(lambda: 1 / 0)


async def test_where_the_system_gives_no_thread_it_is_the_worlds_fault(monkeypatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(WorldError, match="can't start new thread"):
        await Threads().run("healthy", str)


async def test_a_tool_that_hangs_is_answered_with_its_time_out_and_counted(monkeypatch):
    threads, end = Threads(most=1), threading.Event()
    monkeypatch.setattr("envs.user_code.THREADS", threads)

    @tool
    def hang() -> str:
        """Wait."""
        end.wait()
        return "at last"

    @tool
    def healthy() -> str:
        """Answer."""
        return "fine"

    tools = {"hang": hang, "healthy": healthy}
    call = ToolCall(call_id="c", name="healthy", arguments="{}")
    assert (await call_tool(tools, call, timeout_s=30)).output == "fine"
    hung = await call_tool(tools, ToolCall(call_id="h", name="hang", arguments="{}"), timeout_s=0.05)
    assert hung.error is ToolErrorKind.TIMEOUT and threads.num_hung == 1
    with pytest.raises(WorldError, match="1 of hang"):
        await call_tool(tools, call, timeout_s=30)
    end.set()


@pytest.mark.parametrize("how", ["a sync tool", "a thread of an async tool"])
def test_a_process_ends_though_a_tool_hangs_for_ever(how):
    code = """
import asyncio, sys, threading
from envs.limits.threads import let_loop_end
from envs.tools import call_tool, tool
from envs.types import ToolCall

@tool
def hang() -> str:
    '''Wait.'''
    threading.Event().wait()

@tool
async def hang_aside() -> str:
    '''Wait.'''
    await asyncio.to_thread(threading.Event().wait)

async def main():
    let_loop_end()
    chosen = hang if sys.argv[1] == 'a sync tool' else hang_aside
    call = ToolCall(call_id='c', name='t', arguments='{}')
    print((await call_tool({'t': chosen}, call, timeout_s=0.2)).error)

asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ended.stdout == "timeout\n"


def test_sync_code_that_holds_up_the_loop_is_ended_too():
    with pytest.raises(WorldError, match=r"make_env: not done within 0\.1 s"), blocking_limit(0.1, "make_env"):
        time.sleep(30)
    with blocking_limit(math.inf, "make_env"), blocking_limit(0.05, "make_env"):
        pass
    time.sleep(0.1)  # the alarm is off


# --- places at the engine


async def test_no_more_are_at_the_engine_than_it_holds_and_the_earliest_goes_first():
    places, order, there = Places(2), [], set()

    async def play(rank: int) -> None:
        place = Place(places, (0, rank))
        for turn in range(2):
            await place.take()
            order.append((rank, turn))
            there.add(rank)
            assert len(there) <= 2
            await asyncio.sleep(0.01)
            there.discard(rank)
            place.leave()
            await asyncio.sleep(0)  # its tools

    async with asyncio.timeout(30):
        await asyncio.gather(*(play(rank) for rank in range(6)))
    assert sorted(order) == [(rank, turn) for rank in range(6) for turn in range(2)]
    assert [rank for rank, turn in order if turn == 0] == list(range(6)), "admitted in their order"
    assert order.index((0, 1)) < order.index((5, 0)), "begun before begins"


async def test_a_place_that_was_given_to_one_who_left_goes_to_the_next():
    places = Places(1)
    first, second, third = (Place(places, (0, rank)) for rank in range(3))
    await first.take()
    waiting = asyncio.create_task(second.take())
    last = asyncio.create_task(third.take())
    await asyncio.sleep(0)
    first.leave()
    waiting.cancel()
    async with asyncio.timeout(30):
        await last
    third.leave()
    third.leave()
    await first.take()


# --- an engine that hangs


class Asked:
    """Answers a request after so many seconds as `max_tokens` says; 0: never."""

    publishes_merged = False

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> int:
        await (asyncio.sleep(sampling.max_tokens / 10) if sampling.max_tokens else asyncio.Event().wait())
        return sampling.max_tokens

    async def score(self, token_ids: list[int]) -> list[float]:
        raise TimeoutError("its own")


def turn(tenths: int) -> Sampling:
    return Sampling(max_tokens=tenths, temperature=1.0, top_p=1.0, seed=0)


async def test_an_engine_that_answers_nothing_any_more_ends_the_run_though_every_clock_stands():
    engine = WatchedEngine(Asked(), limit_s=0.3)
    async with asyncio.timeout(30):
        with pytest.raises(EngineHungError, match=r"asked for a turn .* for 0\.3 s \(engine\.hung_after_s\)"):
            async with time_limit(0.1):
                with stopped_clocks():
                    await engine.generate([], turn(0))
        with pytest.raises(TimeoutError, match="its own"):
            await engine.score([])


async def test_an_answer_that_comes_as_the_time_ends_gives_the_others_theirs_anew():
    answers: list[int] = []
    async with asyncio.timeout(30):
        async with time_limit(0.3, renewals=lambda: len(answers)) as clock:
            while not clock._is_put_off:  # noqa: ASYNC110
                await asyncio.sleep(0)
            answers.append(1)
            await asyncio.sleep(0.2)


async def test_each_answer_gives_those_that_still_wait_the_whole_time_anew():
    engine = WatchedEngine(Asked(), limit_s=0.4)
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(engine.generate([], turn(tenths)) for tenths in (2, 4, 6, 8)))
    assert answers == [2, 4, 6, 8]
    with pytest.raises(EngineHungError):
        async with asyncio.timeout(30):
            await asyncio.gather(*(engine.generate([], turn(tenths)) for tenths in (2, 4, 0)))


# --- gradings


class Judge:
    """Fails as often as it is told, then grades."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.num_asked = 0

    async def grade(self, task: Task, episode: Episode) -> Grade:
        self.num_asked += 1
        if self.faults:
            raise self.faults.pop(0)
        return Grade(reward=1.0)


class HangingJudge:
    async def grade(self, task: Task, episode: Episode) -> Grade:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_grading_that_failed_is_tried_again_and_its_failures_are_counted():
    judge = Judge(WorldError("out"))
    graded = await Grading(judge, None, timeout_s=30, retries=2).grade(TASK, EPISODE)
    assert graded.grade and graded.grade.reward == 1.0 and graded.num_tries == 2 and graded.error == ""


async def test_a_grading_that_fails_for_good_has_its_cause_and_no_grade():
    judge = Judge(*[WorldError("out")] * 5)
    graded = await Grading(judge, None, timeout_s=30, retries=1).grade(TASK, EPISODE)
    assert graded.grade is None and graded.error == "grader: out" and graded.num_tries == 2 == judge.num_asked


async def test_a_grading_over_its_time_is_the_graders_fault():
    graded = await Grading(HangingJudge(), None, timeout_s=0.05, retries=0).grade(TASK, EPISODE)
    assert graded.grade is None and not graded.is_unscored
    assert graded.error == "grader: no grade within 0.05 s (rollout.settle_timeout_s)"


async def test_what_only_watches_may_hang_and_a_rollout_passed_over_is_not_tried_again():
    graded = await Grading(Judge(), HangingJudge(), timeout_s=0.05, retries=2).grade(TASK, EPISODE)
    assert graded.grade and graded.watch is None
    judge = Judge(Unscored("all None"))
    graded = await Grading(judge, None, timeout_s=30, retries=2).grade(TASK, EPISODE)
    assert graded.is_unscored and judge.num_asked == 1


@pytest.mark.parametrize("odd", [1e13, -1e155, 1.7e308, math.inf, math.nan, 10**4000])
async def test_a_number_that_no_gradient_could_hold_is_the_graders_fault_and_names_it(odd):
    class Odd:
        async def grade(self, task: Task, episode: Episode) -> Grade:
            return Grade(reward=odd, parts={"price": odd})

    graded = await Grading(Odd(), None, timeout_s=30, retries=0).grade(TASK, EPISODE)
    assert graded.grade is None
    shown = "a whole number of 13288 bits" if isinstance(odd, int) else f"{odd:g}"
    assert graded.error == f"grader: price: reward is {shown} for task 't'; expected a number from -1e+12 to 1e+12"


async def test_a_bug_in_a_grader_is_not_taken_for_a_fault():
    for error in (KeyError("mine"), TimeoutError("mine")):
        with pytest.raises(type(error), match="mine"):
            await Grading(Judge(error), None, timeout_s=30, retries=2).grade(TASK, EPISODE)
