"""An export of what many processes saved: several files where they would be large, and one for an adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.checkpoint.export import MARK
from tandem.checkpoint.sharded import SETTINGS, WEIGHTS, export_sharded

NAMES = [
    f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in range(2) for x in "AB"
]
BYTES = 4 * 24


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_adapter_is_one_file_whatever_its_size(tmp_path, kind):
    saved = tmp_path / "sharded"
    (saved / WEIGHTS).mkdir(parents=True)
    (saved / SETTINGS).mkdir()
    tensors = {name: torch.randn(4, 6) for name in NAMES}
    save_file(tensors, saved / WEIGHTS / "part.safetensors")
    for name in ["config.json"] + ["adapter_config.json"] * (kind == "adapter"):
        (saved / SETTINGS / name).write_text('{"model_type": "qwen2"}')
    place = export_sharded(saved, tmp_path / "export", file_bytes=2 * BYTES)
    files = sorted(file.name for file in place.iterdir())
    if kind == "adapter":
        assert files == [MARK, "adapter_config.json", "adapter_model.safetensors"]
    else:
        parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        assert files == [MARK, "config.json", *parts, "model.safetensors.index.json"]
        index = json.loads((place / files[-1]).read_text())
        assert set(index["weight_map"]) == set(NAMES) and set(index["weight_map"].values()) == set(parts)
    back = {}
    for file in place.glob("*.safetensors"):
        back |= load_file(file)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
