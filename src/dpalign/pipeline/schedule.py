"""Steps side by side: those that do not wait for each other, in as many processes as the recipe's `jobs` says."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from dpalign.stages.stage import Step


def take_all(planned: Sequence[Step], jobs: int, take: Callable[[Step], None]) -> None:
    """Take every step once those that it reads are taken, up to `jobs` at once, the earlier planned first.

    When a step fails no other is begun, and those at work are finished; then its error is raised. One at a time they
    are taken in this very thread, which an interruption reaches.
    """
    if jobs == 1:
        for step in planned:
            take(step)
        return
    names = {step.name for step in planned}
    waiting = list(planned)
    taken: set[str] = set()
    at_work: dict[Future[None], Step] = {}
    failed: BaseException | None = None
    with ThreadPoolExecutor(jobs) as pool:
        while at_work or (waiting and failed is None):
            if failed is None:
                ready = [step for step in waiting if names & {str(value) for value in step.inputs.values()} <= taken]
                for step in ready[: jobs - len(at_work)]:
                    waiting.remove(step)
                    at_work[pool.submit(take, step)] = step
            for ended in wait(at_work, return_when=FIRST_COMPLETED).done:
                taken.add(at_work.pop(ended).name)
                failed = failed or ended.exception()
    if failed is not None:
        raise failed
