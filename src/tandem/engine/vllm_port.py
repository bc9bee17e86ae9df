"""Everything that names vLLM: the start of an engine, and the end of the roads inside its workers.

Imported only where vLLM is used; vLLM's worker processes import it too, which registers the receiver there.
"""

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, RequestOutput, TokensPrompt
from vllm import SamplingParams as VllmSampling
from vllm.config import WeightTransferConfig
from vllm.distributed.device_communicators.shm_broadcast import SHM_PATH, ShmRingBuffer
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from tandem.device import synchronize
from tandem.engine.ipc import IpcRoad
from tandem.engine.roads import BroadcastRoad, FilesRoad, MemoryRoad, Road, RoadBroken
from tandem.engine.sampling import SamplingParams
from tandem.engine.weights import Offer, verified
from tandem.errors import RunError

BACKEND = "tandem"


def start(arguments: dict[str, Any], sleep: bool) -> LLM:
    """An engine in this process (its workers in processes of their own under tensor parallelism).

    vLLM's start seeds the global generators and fixes torch's thread count; the caller's are put back.
    """
    # In one process its calls take objects instead of messages, errors keep their type, and it starts in seconds.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if current_platform.is_cpu():
        # It shares the cores with the trainer: threads that are tied to cores would stand in each other's way.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with _process_state_kept():
        llm = LLM(
            **arguments,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            enable_sleep_mode=sleep and can_sleep(),
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
        )
    llm.collective_rpc("unname_shared_memory")
    unname_shared_memory()
    size = llm.model_config.get_head_size()
    if current_platform.is_cpu() and size not in CPUAttentionBackend.get_supported_head_sizes():
        raise ValueError(f"on a CPU vLLM has no attention for heads of {size}, as the model's are")
    return llm


def stop(llm: LLM) -> None:
    """End the engine now: left to itself it ends when it is collected, and takes the groups of a newer one along."""
    llm.llm_engine.engine_core.shutdown()


def can_sleep() -> bool:
    return bool(current_platform.is_sleep_mode_available())


@contextmanager
def _process_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads = set_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def sampling(
    params: SamplingParams, key: int, max_tokens: int, begun: int, stop_tokens: Sequence[int]
) -> VllmSampling:
    """Tokens and their log-probabilities only, `begun` tokens of the answer being there. Stop texts are the caller's,
    who then sees every token as it comes."""
    left = max_tokens - begun
    return VllmSampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=key & ((1 << 63) - 1) if params.temperature else None,
        max_tokens=left,
        min_tokens=min(max(params.min_tokens - begun, 0), left),
        stop_token_ids=list(stop_tokens),
        ignore_eos=True,  # the end tokens are all in the list
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=1 if params.stop else 16,
    )


def scoring() -> VllmSampling:
    """Log-probabilities of the prompt's tokens; one token that nobody reads comes with them."""
    return VllmSampling(
        temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
    )


def submit(
    llm: LLM, name: str, tokens: Sequence[int], params: VllmSampling, adapter: LoRARequest | None
) -> str:
    """Hand in one request; returns the name under which it can be called off."""
    (prompt,) = llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=list(tokens))])
    llm.llm_engine.add_request(name, prompt, params, lora_request=adapter)


def step(llm: LLM) -> list[RequestOutput]:
    return llm.llm_engine.step()


def adapter_request(folder: str, version: int, number: int) -> LoRARequest:
    return LoRARequest(lora_name=f"version {version}", lora_int_id=number, lora_path=folder)


@dataclass
class _Init(WeightTransferInitInfo):
    road: str
    host: str = ""
    port: int = 0
    first_rank: int = 1
    size: int = 2
    timeout_s: float = 300.0


@dataclass
class _Update(WeightTransferUpdateInfo):
    offer: Offer
    load: bool
    """False to read and verify only."""


class Receiver(WeightTransferEngine[_Init, _Update]):
    """Takes the weights inside a worker. It changes nothing before `load`, and says a failure instead of raising it,
    so that one worker's failure does not leave the others waiting, and is of the same kind from all of them."""

    init_info_cls = _Init
    update_info_cls = _Update
    supports_draft_weight_update = False
    road: Road
    failure: RunError | None = None
    loading = False

    def init_transfer_engine(self, init_info: _Init) -> None:
        self.failure = None
        try:
            self._open(init_info)
        except RunError as cause:
            self.failure = cause

    def _open(self, init_info: _Init) -> None:
        match init_info.road:
            case "memory":
                self.road = MemoryRoad()
            case "files":
                self.road = FilesRoad()
            case "ipc":
                self.road = IpcRoad(self.device)
            case "broadcast":
                rank = init_info.first_rank + self.parallel_config.rank
                meeting = (init_info.host, init_info.port, rank, init_info.size)
                self.road = BroadcastRoad(*meeting, self.device, init_info.timeout_s)
                self.road.connect()

    def start_weight_update(self) -> None:
        self.failure = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except RunError as cause:
            self.failure = cause
        synchronize(self.device)

    def receive_weights(self, update_info: _Update) -> None:
        tensors = verified(update_info.offer, self.road.read(update_info.offer))
        if not update_info.load:
            for _ in tensors:
                pass
            return
        lay_out_anew(self.model)
        initialize_layerwise_reload(self.model)
        self.loading = True
        self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        if self.loading:
            finalize_layerwise_reload(self.model, self.model_config)
            tie_again(self.model)
            self.loading = False

    def shutdown(self) -> None:
        """The road ends with its process."""


class WorkerExtension:
    """What vLLM's workers answer beside their own calls."""

    weight_transfer_engine: Receiver

    def unname_shared_memory(self) -> None:
        unname_shared_memory()

    def weight_failure(self) -> tuple[str, bool] | None:
        """Why the weights sent last were refused, or no road was opened, and whether one broke; as words, for vLLM
        takes an exception that is returned for one that was raised."""
        failure = self.weight_transfer_engine.failure
        return None if failure is None else (str(failure), isinstance(failure, RoadBroken))


def unname_shared_memory() -> None:
    """Take the names from the memory that this process and others of its engine share, once all of them have it. It is
    gone with the last of them then, and nothing in /dev/shm outlives processes that are killed."""
    # vLLM tells nobody of all that it has, and hides it from the collector.
    hidden = gc.get_freeze_count()
    gc.unfreeze()
    rings = [known for known in gc.get_objects() if type(known) is ShmRingBuffer and known.is_creator]
    if hidden:
        gc.freeze()
    for ring in rings:
        ring.shared_memory.unlink()
        ring.is_creator = False  # Else it would do so again.
    # Those of a CPU's collectives, which are made in C++.
    for path in Path(SHM_PATH).glob("vllm_dist_*") if current_platform.is_cpu() else ():
        if str(path) in Path("/proc/self/maps").read_text():
            path.unlink(missing_ok=True)


def lay_out_anew(model: torch.nn.Module) -> None:
    """On a CPU experts have a layout of their own, which vLLM gives them only when it makes their kernel: let the next
    weights make it anew."""
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def tie_again(model: torch.nn.Module) -> None:
    """On a CPU the output head keeps a packed copy of the embeddings it is tied to: pack it from the new ones."""
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        head = getattr(module, "lm_head", None)
        if head is None or not module.config.get_text_config().tie_word_embeddings:
            continue
        decoder = getattr(module, "model", None)
        if not hasattr(head, "tie_weights") or not hasattr(decoder, "embed_tokens"):
            raise RunError(
                f"{type(module).__name__} ties its output head in a way that cannot be renewed on a CPU"
            )
        head.tie_weights(decoder.embed_tokens)
        head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
