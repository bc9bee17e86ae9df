"""One process of many that hold a model together: what each of them builds, in step with the others."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.device import pick
from tandem.learner import Actor, Critic, Reference
from tandem.model import tokenizer_of
from tandem.model.load import check_reference
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_frozen_sharded, load_sharded
from tandem.model.parallel.model import ShardedModel
from tandem.model.parallel.value import reward_model_sharded, value_sharded
from tandem.reward_model import RewardModel


def build_actor(
    run: Run, layout: Layout, rank: int, world: int, address: str, start: Path | None = None
) -> Actor:
    """The policy and its optimizer on `world` processes that meet at `address` (host:port of rank 0); with the weights
    that `LanguageModel.save` wrote into `start`, if given.

    Every process calls this with the same run and layout; ConfigError where the layout does not fit the model.
    """
    device, place = pick(run.device), run.placement
    # Who waits for others gives up no sooner than the one who waits for all of them.
    connect(rank, world, address, device, max(place.start_timeout_s, place.learner_timeout_s))
    tokenizer: PreTrainedTokenizerBase = tokenizer_of(run.model)
    grid = Grid(layout, device, "learner.layout")
    model = load_sharded(run.model, tokenizer, grid, seed=run.seed, start=start)
    return actor_of(run, model)


def actor_of(run: Run, model: ShardedModel) -> Actor:
    return Actor(model, run, offload_gradients=model.grid.layout.offload_gradients)


def build_reference(run: Run, layout: Layout, actor: Actor, folder: Path | None = None) -> Reference:
    """The reference on the actor's processes, in a layout of its own: the actor's model with its adapter off, or the
    weights of `reference.path`, of `folder` (an export of a resumed run), or else the policy's own, copied now."""
    given = run.reference.path or (str(folder) if folder is not None else None)
    model = actor.model
    assert isinstance(model, ShardedModel)
    if given is None and run.model.lora is not None:
        return Reference(model, run, adapter_off=True)
    grid = Grid(layout, model.device, "reference.layout")
    trust = run.model.trust_remote_code
    if run.reference.path is not None:
        check_reference(run.reference.path, model.tokenizer, model.vocab_size, trust)
    if given is not None:
        frozen = load_frozen_sharded(given, run.model.dtype, grid, trust_remote_code=trust)
        return Reference(frozen, run, adapter_off=False)
    copy = load_sharded(run.model, model.tokenizer, grid, seed=run.seed, where="reference.layout")
    copy.network.requires_grad_(False).eval()
    copy.take_over(model)
    return Reference(copy, run, adapter_off=False)


def build_critic(run: Run, layout: Layout, actor: Actor) -> Critic:
    """The critic on the actor's processes, in a layout of its own: the weights of `critic.path`, or else the policy's
    layers as they are now."""
    policy = actor.model
    assert isinstance(policy, ShardedModel)
    grid = Grid(layout, policy.device, "critic.layout")
    model = value_sharded(policy, grid, run.critic.path, run.model.trust_remote_code)
    return Critic(model, run, offload_gradients=layout.offload_gradients)


def build_reward_model(run: Run, layout: Layout, actor: Actor) -> RewardModel:
    """The reward model on the actor's processes, in a layout of its own: the weights of `reward.model.path`."""
    policy, config = actor.model, run.reward.model
    assert isinstance(policy, ShardedModel) and config is not None
    grid = Grid(layout, policy.device, "reward.model.layout")
    return RewardModel(reward_model_sharded(policy, grid, config.path, run.model.trust_remote_code), run)
