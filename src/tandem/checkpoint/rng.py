"""State of the random number generators that libraries share: Python, NumPy, torch, and the accelerator's.

Tandem's own draws are keyed by seed and position and need none of this; code of others in the run may.
"""

import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tandem.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("tandem.checkpoint")


def rng_state() -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """State of all generators, as tensors and JSON."""
    import numpy
    import torch

    version, words, gauss = random.getstate()
    legacy = numpy.random.get_state(legacy=False)
    if legacy["bit_generator"] != "MT19937":
        raise RunError(f"numpy.random uses {legacy['bit_generator']}; only MT19937, its default, is saved")
    inner = legacy["state"]
    state = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "words": inner["key"].tolist(),
            "position": int(inner["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }
    return {"rng/torch": torch.get_rng_state(), **_accelerator_states()}, state


def restore_rng(tensors: Mapping[str, "Tensor"], state: Mapping[str, Any]) -> None:
    """Bring all generators to the saved state; those of accelerators that are not here are passed over."""
    import numpy
    import torch

    python, array = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    words = numpy.array(array["words"], dtype=numpy.uint32)
    numpy.random.set_state(("MT19937", words, array["position"], array["has_gauss"], array["gauss"]))
    torch.set_rng_state(tensors["rng/torch"])
    here = _accelerator_states()
    for name, saved in tensors.items():
        if not name.startswith("rng/accelerator/"):
            continue
        if name in here:
            _set_accelerator(name, saved)
        else:
            log.warning("%s of the checkpoint is not on this machine and not restored", name)


def _accelerator_states() -> dict[str, "Tensor"]:
    """State of every accelerator's generator, keyed by kind and index."""
    import torch

    if not torch.accelerator.is_available():
        return {}
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device)
    # Kinds of which a machine has only one lack the plural.
    several = hasattr(module, "get_rng_state_all")
    states = module.get_rng_state_all() if several else [module.get_rng_state()]
    return {f"rng/accelerator/{device.type}/{i}": state for i, state in enumerate(states)}


def _set_accelerator(name: str, state: "Tensor") -> None:
    import torch

    kind, index = name.split("/")[2:]
    module = torch.get_device_module(kind)
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state(state, int(index))
    else:
        module.set_rng_state(state)
