"""Named tensors as safetensors files, bit for bit, with no code in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from tandem.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write tensors from any device; those that share memory are written out each."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    flat = {}
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        address = host.untyped_storage().data_ptr()
        flat[name] = host.clone() if address in seen else host
        seen.add(address)
    save_file(flat, path)


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """The tensors of a file, in host memory."""
    try:
        with safe_open(path, framework="pt") as file:
            # Tensors of an open file are views of its mapping: copies outlive its deletion and free the disk.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is not a readable safetensors file: {error}") from error
