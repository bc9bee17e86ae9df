"""Weights that are no numbers any more: found before anything is made of them."""

from torch.nn.utils import get_total_norm

from tandem.errors import RunError
from tandem.model.language_model import LanguageModel
from tandem.model.parallel.mesh import local


def check_updated(model: LanguageModel, rate: float, key: str) -> None:
    """After an update with the learning rate of `key`: RunError where it left a weight that is not finite.

    One pass over the weights that train, and one word to the host. All processes of a layout raise the same.
    """
    here = {name: local(weight) for name, weight in model.trainable().items()}

    def name() -> str | None:
        return next((name for name, values in here.items() if not values.isfinite().all()), None)

    # A norm may overflow over finite weights, and is asked for none the less: it is the fastest look at them.
    total = get_total_norm([values for values in here.values() if values.numel()])
    broken = model.mesh.first(~total.isfinite(), name)
    if broken is not None:
        raise RunError(
            f"the update with learning rate {rate:g} left weights that are not finite, {broken} the first; they "
            f"were neither published nor saved. Lower {key}; a run that goes on from its last checkpoint with another "
            "one takes --allow-config-change"
        )
