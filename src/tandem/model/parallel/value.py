"""Models that predict one value, on many processes."""

from pathlib import Path

import torch

from tandem.model.load import describe
from tandem.model.parallel.grid import Grid
from tandem.model.parallel.load import downloaded, kind_of, read_weights
from tandem.model.parallel.model import ShardedModel
from tandem.model.value import HEAD, KEY, REWARD_KEY, check_head, check_value, empty_value


def value_sharded(
    policy: ShardedModel, grid: Grid, path: str | None, trust_remote_code: bool = False
) -> ShardedModel:
    """A critic on the processes of a grid: the model of a folder, or the policy's layers, any adapter merged. Without
    a head of its own its values begin at 0. Collective."""
    if path is None:
        source, config = policy.source, policy.network.config
    else:
        source = check_value(path, policy.tokenizer, trust_remote_code)
        config = describe(source, trust_remote_code)
    network = empty_value(config, policy.network.dtype, trust_remote_code)
    model = kind_of(grid)(network, policy.tokenizer, source, grid, "critic.layout")
    # Of a pipeline only the last stage has it.
    for weight in network.score.parameters():
        torch.nn.init.zeros_(weight)
    if path is None:
        model.take_over(policy)
    else:
        folder = Path(downloaded(source))
        check_head(folder, KEY)
        read_weights(model, folder, optional=frozenset({HEAD}))
    return model


def reward_model_sharded(
    policy: ShardedModel, grid: Grid, path: str, trust_remote_code: bool = False
) -> ShardedModel:
    """The reward model of a folder, on the processes of a grid; it is only read. Collective."""
    source = check_value(path, policy.tokenizer, trust_remote_code, REWARD_KEY)
    config = describe(source, trust_remote_code, REWARD_KEY)
    network = empty_value(config, policy.network.dtype, trust_remote_code, REWARD_KEY)
    frozen = network.requires_grad_(False).eval()
    model = kind_of(grid)(frozen, policy.tokenizer, source, grid, "reward.model.layout")
    read_weights(model, Path(downloaded(source)))
    return model
