"""Steps side by side: each after those that it reads, and no more at once than wanted."""

import threading

import pytest

from dpalign.pipeline.runner import take_all
from dpalign.stages.data import data
from dpalign.stages.stage import Step


def planned(**reads: str) -> list[Step]:
    """Steps by name, each with the steps that it reads."""
    return [Step(name, data, {other: other for other in read.split()}) for name, read in reads.items()]


DIAMOND = planned(base="", left="base", right="base", last="left right", alone="")


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_a_step_waits_for_those_it_reads_and_for_a_free_place(jobs: int) -> None:
    lock, at_work, most, taken = threading.Lock(), 0, 0, list[str]()

    def take(step: Step) -> None:
        nonlocal at_work, most
        with lock:
            assert set(step.inputs) <= set(taken)
            at_work += 1
            most = max(most, at_work)
        threading.Event().wait(0.01)
        with lock:
            at_work -= 1
            taken.append(step.name)

    take_all(DIAMOND, jobs, take)
    assert sorted(taken) == sorted(step.name for step in DIAMOND)
    assert most <= jobs


def test_two_that_do_not_wait_for_each_other_run_at_once() -> None:
    both = threading.Barrier(2, timeout=10)
    take_all(planned(left="", right=""), 2, lambda _: both.wait() and None)


def test_after_a_failure_nothing_begins_and_what_is_at_work_is_finished() -> None:
    failed, finished = threading.Event(), list[str]()

    def take(step: Step) -> None:
        if step.name == "base":
            failed.set()
            raise ValueError("no data")
        assert failed.wait(10)
        finished.append(step.name)

    with pytest.raises(ValueError, match="no data"):
        take_all(DIAMOND, 2, take)
    assert finished == ["alone"]


def test_one_at_a_time_they_are_taken_in_this_thread() -> None:
    """An interruption reaches no other."""
    seen = list[bool]()
    take_all(DIAMOND, 1, lambda _: seen.append(threading.current_thread() is threading.main_thread()))
    assert seen == [True] * len(DIAMOND)
