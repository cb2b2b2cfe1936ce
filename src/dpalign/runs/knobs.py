"""The recipe's knobs of scale. None is fingerprinted: they decide where a stage runs, and change no result."""

from typing import Final, Self

from pydantic import Field, model_validator

from dpalign.runs.tables import Table

NAMED: Final = ("fsdp2", "zero2", "zero3")
"""The accelerate configurations of TRL that `launch.config` knows by name."""


class Launch(Table):
    """How the processes of a training share a model that is too large for one."""

    config: str = ""
    """launcher = "accelerate": "fsdp2", "zero2" or "zero3", as TRL ships them (ZeRO needs deepspeed installed), or a
    YAML file of your own. Section 3.1 trains on 8 GPUs and does not say how."""
    command: str = ""
    """Start the processes with this command instead, on several machines (paper silent). It must end in
    `-m dpalign.pipeline.worker {run} {step}` under torchrun or accelerate, and start `processes` in all. Each machine
    must find the run folder at the same path."""

    @model_validator(mode="after")
    def _the_worker_is_named(self) -> Self:
        missing = [word for word in ("{run}", "{step}") if self.command and word not in self.command]
        if missing:
            raise ValueError(
                f"launch.command is {self.command!r}, without {missing[0]}; "
                "let it end in -m dpalign.pipeline.worker {run} {step}"
            )
        return self


class Cluster(Table):
    """Where answers are sampled and scored: here, or by a pool of Ray actors, each with an engine of its own."""

    address: str = ""
    """"" for this process alone; "local" starts Ray on this machine; "auto" joins this machine's cluster, HOST:PORT
    another one (paper silent). Every machine of a cluster must find the run folder at the same path."""
    actors: int = Field(1, ge=1)
    """Actors of the pool (paper silent); their unit of work is a shard of the stage."""
    cpus: float = Field(1.0, ge=0)
    """CPUs an actor reserves (paper silent)."""
    gpus: float = Field(0.0, ge=0)
    """GPUs an actor reserves: 1, or the number that an engine spans (paper silent)."""
    retries: int = Field(2, ge=0)
    """New attempts at a shard after its process died, before its prompts are tried alone (paper silent)."""
