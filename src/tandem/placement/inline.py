"""Everything in one process: the sampler decodes with the very weights that the actor trains."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem.algorithms import KlController
from tandem.config.run import Run
from tandem.data.cursor import Cursor
from tandem.data.prompts import PromptSet
from tandem.data.template import Renderer, check_stop_tokens, split_stops
from tandem.device import captures, describe
from tandem.engine import EmbeddedEngine, SamplingParams
from tandem.errors import ConfigError
from tandem.learner import MIB, Actor, Critic, Reference
from tandem.model import LanguageModel, load_frozen
from tandem.model.compiled import compile_blocks
from tandem.model.fused import kept_of
from tandem.model.load import REFERENCE_KEY, check_reference
from tandem.model.value import load_reward_model, load_value, value_like
from tandem.placement.copied import CopiedEngine, vllm_beside
from tandem.reward_model import RewardModel
from tandem.rewards.scorer import Scorer
from tandem.rewards.watch import FailureWatch
from tandem.rollout import Sampler, Stream


@dataclass(slots=True, kw_only=True)
class Roles:
    """What the loop sees."""

    actor: Actor
    reference: Reference | None
    critic: Critic | None
    sampler: Sampler
    stream: Stream
    kl: KlController
    copy: CopiedEngine | None = None
    """The engine, where it samples from a copy of the actor's weights."""
    sending_s: float = 0.0

    def publish(self, version: int) -> None:
        """Give the actor's weights to the sampler, and to the reference when it is due. In one process the sampler
        has them already, so only the number moves, unless the engine keeps a copy."""
        self.serve(version)
        if self.reference is not None and self.actor.run.refreshes_reference(version):
            self.reference.refresh(self.actor)

    def serve(self, version: int) -> None:
        """The sampler samples from the actor's present weights, which are of this version."""
        if self.copy is not None:
            began = time.monotonic()
            self.copy.send(version)
            self.sending_s += time.monotonic() - began
        self.sampler.version = version

    def on_learners(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(actor, reference, *arguments)`, in whichever process these are; in all of them, where there are
        several, and the value is then that of the first."""
        return work(self.actor, self.reference, *arguments)

    def take_seconds(self) -> dict[str, float]:
        """Time spent since the last call, by stage, beside that of the loop's own."""
        seconds = self.sampler.take_seconds()
        seconds["timing/non_overlap_rollout"] = seconds["timing/rollout"]
        if self.copy is not None:
            seconds["timing/resharding_to_infer"], self.sending_s = self.sending_s, 0.0
        return seconds

    def on_critic(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `on_learners`, with `work(critic, *arguments)`, for a run that has one."""
        return work(self.critic, *arguments)

    def close(self) -> None:
        """Let go of everything that would outlive the run."""
        if self.copy is not None:
            self.copy.close()


def build(
    run: Run, model: LanguageModel, prompts: PromptSet, scorer: Scorer, reference_folder: Path | None = None
) -> Roles:
    """The roles of a run around a loaded policy. `reference_folder` holds the reference of a resumed run."""
    check_attention(run, model.device)
    if run.learner.compile:
        compile_blocks(model)
    params = sampling_params(run, prompts.template, model.tokenizer)
    kept = kept_of(model, run.learner.keep_mb * MIB) if run.keeps else None
    actor, judge = Actor(model, run, kept=kept), reward_model_of(run, model)
    reference = reference_of(run, model, reference_folder) if run.needs_reference else None
    critic = critic_of(run, model) if run.needs_critic else None
    # Last: whatever fails before it leaves nothing of it behind.
    copied = vllm_beside(run, model, params) if run.engine.kind == "vllm" else None
    engine = copied or EmbeddedEngine(model, run.sampling.slots, run.learner.room(), kept)
    ends = model.stop_tokens | params.stop_tokens
    sampler = Sampler(engine, scorer, model.tokenizer, run, params, ends, judge)
    kl = run.algorithm.kl
    return Roles(
        actor=actor,
        reference=reference,
        critic=critic,
        sampler=sampler,
        stream=Stream(
            sampler=sampler,
            prompts=prompts,
            cursor=Cursor(len(prompts.prompts), run.seed, run.data.shuffle),
            watch=FailureWatch(run.reward.max_failure_share),
        ),
        kl=KlController(kl.coef, kl.target, kl.horizon),
        copy=copied,
    )


def sampling_params(run: Run, template: Renderer, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """The run's own settings; the template's ends of an answer come on top."""
    s = run.sampling
    stop, stop_tokens = split_stops(s.stop, tokenizer, "sampling.stop")
    check_stop_tokens(s.stop_tokens, tokenizer)
    return SamplingParams(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        min_tokens=s.min_answer_tokens,
        max_tokens=s.max_answer_tokens,
        stop=(*stop, *template.stop),
        stop_tokens=frozenset((*s.stop_tokens, *stop_tokens, *template.stop_tokens)),
    )


def check_attention(run: Run, device: torch.device) -> None:
    """Document masks can be trained with where their kernel has a backward pass."""
    if run.learner.attention == "documents" and not captures(device):
        raise ConfigError(
            f"learner.attention=documents: FlexAttention has no backward pass on {describe(device)}; use padded"
        )


def reference_of(run: Run, model: LanguageModel, folder: Path | None) -> Reference:
    """The model that the KL term pulls to: a given one, the policy without its adapter, or its copy."""
    if run.reference.path is not None:
        path, trust = run.reference.path, run.model.trust_remote_code
        check_reference(path, model.tokenizer, model.vocab_size, trust)
        reference = load_frozen(path, run.model.dtype, model.device, trust, REFERENCE_KEY)
        return Reference(reference, run, adapter_off=False)
    if run.model.lora is not None:
        return Reference(model, run, adapter_off=True)
    if folder is not None:
        frozen = load_frozen(str(folder), run.model.dtype, model.device, run.model.trust_remote_code)
        return Reference(frozen, run, adapter_off=False)
    network = copy.deepcopy(model.network).requires_grad_(False)
    kept = LanguageModel(network.eval(), model.tokenizer, model.source)
    return Reference(kept, run, adapter_off=False)


def critic_of(run: Run, policy: LanguageModel) -> Critic:
    """The model that predicts rewards: a given one, or the policy's layers as they are now."""
    path, trust = run.critic.path, run.model.trust_remote_code
    if path is None:
        model = value_like(policy)
    else:
        model = load_value(path, run.model.dtype, policy.tokenizer, policy.device, trust)
    if run.learner.compile:
        compile_blocks(model)
    return Critic(model, run)


def reward_model_of(run: Run, policy: LanguageModel) -> RewardModel | None:
    """The model that scores answers, where the run has one."""
    config = run.reward.model
    if config is None:
        return None
    trust = run.model.trust_remote_code
    model = load_reward_model(config.path, run.model.dtype, policy.tokenizer, policy.device, trust)
    return RewardModel(model, run)


def state(roles: Roles) -> Mapping[str, Any]:
    """Everything small that a resumed run needs, as JSON values; that of the stream comes when it is called."""
    return {
        "stream": roles.stream.mark(),
        "kl_coef": roles.kl.coef,
        **roles.actor.counters(),
        "critic": None if roles.critic is None else roles.critic.counters(),
        "failure_watch": roles.stream.watch.state(),
    }


def restore(roles: Roles, saved: Mapping[str, Any], version: int) -> None:
    roles.stream.restore(saved["stream"])
    # One that does not adapt is the configuration's.
    if roles.kl.target is not None:
        roles.kl.coef = saved["kl_coef"]
    roles.actor.restore_counters(saved)
    if roles.critic is not None:
        roles.critic.restore_counters(saved["critic"])
    roles.stream.watch.restore(saved["failure_watch"])
    roles.serve(version)
