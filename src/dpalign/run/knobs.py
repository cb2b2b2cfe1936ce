"""The recipe's knobs of scale. None is fingerprinted: they decide where a stage runs, and change no result."""

from dataclasses import dataclass
from typing import Final

NAMED: Final = ("fsdp2", "zero2", "zero3")
"""The accelerate configurations of TRL that `launch.config` knows by name."""


@dataclass(frozen=True)
class Launch:
    """How the processes of a training share a model that is too large for one."""

    config: str = ""
    """launcher = "accelerate": "fsdp2", "zero2" or "zero3", as TRL ships them (ZeRO needs deepspeed installed), or a
    YAML file of your own. Section 3.1 trains on 8 GPUs and does not say how."""
    command: str = ""
    """Start the processes with this command instead, on several machines (paper silent). It must end in
    `-m dpalign.pipeline.worker {run} {step}` under torchrun or accelerate, and start `processes` in all. Each machine
    must find the run folder at the same path."""

    def __post_init__(self) -> None:
        missing = [word for word in ("{run}", "{step}") if self.command and word not in self.command]
        if missing:
            raise ValueError(
                f"launch.command is {self.command!r}, without {missing[0]}; "
                "let it end in -m dpalign.pipeline.worker {run} {step}"
            )


@dataclass(frozen=True)
class Cluster:
    """Where answers are sampled and scored: here, or by a pool of Ray actors, each with an engine of its own."""

    address: str = ""
    """"" for this process alone; "local" starts Ray on this machine; "auto" joins this machine's cluster, HOST:PORT
    another one (paper silent). Every machine of a cluster must find the run folder at the same path."""
    actors: int = 1
    """Actors of the pool (paper silent); their unit of work is a shard of the stage."""
    cpus: float = 1.0
    """CPUs an actor reserves (paper silent)."""
    gpus: float = 0.0
    """GPUs an actor reserves: 1, or the number that an engine spans (paper silent)."""
    retries: int = 2
    """New attempts at a shard after its process died, before its prompts are tried alone (paper silent)."""

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise ValueError(f"cluster.actors is {self.actors}; a pool needs at least 1")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cluster.cpus {self.cpus} and cluster.gpus {self.gpus} must not be negative")
        if self.retries < 0:
            raise ValueError(f"cluster.retries is {self.retries}; give 0 or more")
