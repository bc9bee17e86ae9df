"""Weights that are no numbers: found before anything is made of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.utils import get_total_norm

from tandem.errors import ConfigError, RunError
from tandem.model.parallel.mesh import local

if TYPE_CHECKING:
    from tandem.model.language_model import LanguageModel


def check_updated(model: "LanguageModel", rate: float, key: str) -> None:
    """After an update with the learning rate of `key`: RunError where it left a weight that is not finite."""
    if broken := _first_broken(model, model.trainable()):
        raise RunError(
            f"the update with learning rate {rate:g} left weights that are not finite, {broken} the first; they "
            f"were neither published nor saved. Lower {key}; a run that goes on from its last checkpoint with another "
            "one takes --allow-config-change"
        )


def check_read(model: "LanguageModel") -> None:
    """Of a model that was loaded: ConfigError where a weight is not finite."""
    if broken := _first_broken(model, dict(model.module.named_parameters())):
        raise ConfigError(
            f"model.path={model.source}: weights that are not finite (NaN or infinity), {broken} the first; take "
            "another copy, or another checkpoint"
        )


def _first_broken(model: "LanguageModel", weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these weights that is not finite: one pass over them, and one word to the host. The same
    on all processes of a layout."""
    here = {name: local(weight) for name, weight in weights.items()}

    def name() -> str | None:
        return next((name for name, values in here.items() if not values.isfinite().all()), None)

    # A norm may overflow over finite weights, and is asked for none the less: it is the fastest look at them.
    total = get_total_norm([values for values in here.values() if values.numel()])
    return model.mesh.first(~total.isfinite(), name)
