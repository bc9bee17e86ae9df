"""The section of the engine: what samples the answers, and how the weights get there."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tandem.config.section import Section


class Engine(Section):
    """What samples the answers. The keys from `tensor_parallel` on are vLLM's."""

    kind: Literal["embedded", "vllm"] = "embedded"
    """`embedded` is Tandem's own: in one process it decodes with the very weights that are trained, under Ray with a
    copy; `vllm` always has a copy."""
    transfer: Literal["auto", "memory", "ipc", "broadcast", "files"] = "auto"
    """Road of the weights to an engine with a copy: `memory` within one process, `files` through a folder, `broadcast`
    (placement.kind=apart) through a process group of learner 0 and the engines, `ipc` (colocated) by handles of the
    memory that each learner and its engine share. `auto`: memory within one process, files on one machine, else Ray's
    memory."""
    transfer_dir: str | None = None
    """Folder for transfer=files, seen by trainer and engines, in which each run has one of its own; null for one in
    this machine's shared memory."""
    verify_every: int = Field(1, gt=0)
    """Every so many transfers each tensor is compared by checksum and the engine by log-probabilities; names, shapes
    and types always are."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the engine's weights; null for `model.dtype`."""
    tensor_parallel: int = Field(1, gt=0)
    """Devices that share one engine's weights."""
    max_num_seqs: int = Field(256, gt=0)
    """Answers that decode at the same time."""
    max_num_batched_tokens: int | None = Field(None, gt=0)
    """Tokens computed in one step of the engine, `max_num_seqs` at least; null for vLLM's choice."""
    max_model_len: int | None = Field(None, gt=0)
    """Longest prompt plus answer, in tokens; null for the model's own limit."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the device's memory for weights and cache. Beside a trainer on the same device, leave room for it."""
    kv_cache_mb: int | None = Field(None, gt=0)
    """Size of the cache of keys and values; null for what `gpu_memory_utilization` leaves. Set it on a CPU."""
    prefix_caching: bool = True
    """Compute a prompt once for all its answers."""
    eager: bool = False
    """Run without compilation and captured graphs: a fast start and slow steps."""
    sleep: bool = False
    """Give the device's memory to the trainer while it works. On a CPU this changes nothing."""

    def road(self, *, one_process: bool, adapter: bool) -> str:
        """The road that the weights take; `one_process` where trainer and engine are in one."""
        if self.transfer != "auto":
            return self.transfer
        reads_files = self.kind == "vllm" and (adapter or self.tensor_parallel > 1)
        return "memory" if one_process and not reads_files else "files"

    def verifies(self, transfer: int) -> bool:
        """Whether the transfer of this number, counted from 1, is verified: the first always is."""
        return (transfer - 1) % self.verify_every == 0

    @field_validator("transfer_dir")
    @classmethod
    def _of_the_user(cls, folder: str | None) -> str | None:
        return None if folder is None else str(Path(folder).expanduser())

    @model_validator(mode="after")
    def _roads(self) -> "Engine":
        if self.transfer == "memory" and self.tensor_parallel > 1:
            raise ValueError(
                f"engine.transfer=memory stays in one process and engine.tensor_parallel={self.tensor_parallel} "
                "takes several; use transfer=files or broadcast"
            )
        if self.transfer_dir is not None and self.transfer not in ("auto", "files"):
            raise ValueError(f"engine.transfer_dir is for transfer=files, not transfer={self.transfer}")
        return self

    @model_validator(mode="after")
    def _a_token_for_each_answer(self) -> "Engine":
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens} is less than a token for each of "
                f"engine.max_num_seqs={self.max_num_seqs} answers; raise it, or lower max_num_seqs"
            )
        return self

    @model_validator(mode="after")
    def _each_key_matters(self) -> "Engine":
        shared = ("kind", "transfer", "transfer_dir", "verify_every", "dtype")
        for name, info in type(self).model_fields.items():
            if self.kind == "embedded" and name not in shared and self.__dict__[name] != info.default:
                raise ValueError(
                    f"engine.{name} is for engine.kind=vllm; the embedded engine has sampling.slots and "
                    "learner.tokens_per_forward"
                )
        return self
