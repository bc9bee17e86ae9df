"""The section of the placement: which processes hold which role, and how long they are waited for."""

from typing import Literal

from pydantic import Field, model_validator

from tandem.config.section import Section


class Placement(Section):
    """Where actor, reference and engines live. All keys but `kind` are for Ray."""

    kind: Literal["inline", "colocated", "apart"] = "inline"
    """`inline`: one process, no Ray. `colocated`: learners and engines share their devices and take turns. `apart`:
    each on devices of its own; with sampling.max_lag > 0 they work at the same time."""
    address: str | None = None
    """A Ray cluster to join: `auto` for the one this machine belongs to, or host:port of its head; null starts Ray on
    this machine for the run."""
    learners: int = Field(1, gt=0)
    """Processes that train together, in `learner.layout`."""
    engines: int = Field(1, gt=0)
    """Engines that sample; with engine.kind=vllm each takes engine.tensor_parallel devices, when colocated those of as
    many learners."""
    cpus: int = Field(1, gt=0)
    """CPU cores, and threads, of each of these processes."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of each learner, and of each device of an engine, which when colocated has those of its learners; null for 1
    where the cluster has any."""
    spread: bool = False
    """Put the processes on as many nodes as there are, rather than on as few as will do."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for free devices, and for a process to load its model."""
    engine_timeout_s: float = Field(300.0, gt=0)
    """An engine without a new token, or a transfer without end, for so long is replaced."""
    learner_timeout_s: float = Field(3600.0, gt=0)
    """A learner that takes longer than this for one call ends the run."""
    restarts: int = Field(3, ge=0)
    """Times in a row that an engine is started anew before it ends the run."""
    backoff_s: float = Field(1.0, ge=0)
    """Wait before the first new start of an engine; each further one in a row waits twice as long."""

    @model_validator(mode="after")
    def _each_key_matters(self) -> "Placement":
        for name, info in type(self).model_fields.items():
            if self.kind == "inline" and name != "kind" and self.__dict__[name] != info.default:
                raise ValueError(f"placement.{name} is for placement.kind=colocated or apart")
        return self
