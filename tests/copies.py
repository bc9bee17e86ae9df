"""A policy and what the tests send it through: models with heads that every engine has attention for, and threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tandem.engine.probe import probe_of
from tandem.engine.roads import BroadcastRoad, FilesRoad, MemoryRoad
from tandem.engine.weights import ModelWeights, TensorSpec
from tandem.model import LanguageModel
from tandem.model.new import new_tokenizer
from tiny_models import SHAPE

CPU = torch.device("cpu")
QUERY = "model.layers.1.self_attn.q_proj.weight"


def policy(seed: int = 0, *, tied: bool = True, layers: int = 2) -> LanguageModel:
    """A random Qwen2 with heads of 32, whose log-probabilities are spread and none of whose weights is idle."""
    shape = {**SHAPE, "hidden_size": 64, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    made = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.2 * noise if is_norm else 0.1 * noise)
    return LanguageModel(made.eval(), new_tokenizer(), "tiny")


def adapted(
    seed: int, base: int = 0, tied: bool = True, targets: str | list[str] = "all-linear"
) -> LanguageModel:
    """The policy of seed `base` with a random adapter."""
    model = policy(base, tied=tied)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    module = get_peft_model(model.network, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return LanguageModel(module.eval(), model.tokenizer, "adapted")


def check_probe(engine: Any, model: LanguageModel, version: int, dtype: torch.dtype) -> float:
    """Hold an engine, which computes in `dtype`, to what a model says; the largest difference."""
    assert engine.version == version
    probe = probe_of(model, dtype)
    return probe.check("the engine", version, engine.score([probe.tokens])[0])


class Changed(ModelWeights):
    """A policy's weights with one thing changed on the way to the sender."""

    def __init__(self, model: LanguageModel, change: Callable[[dict[str, Tensor]], None]) -> None:
        super().__init__(model)
        change(self.tensors)


class Lying(ModelWeights):
    """Announces everything and brings all but one tensor."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in super().__iter__() if name != QUERY)


def refused_changes() -> dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]]:
    """Changes that a receiver must refuse before it moves a byte, each with what it says."""
    return {
        "missing": (lambda t: t.pop(QUERY), f"{QUERY} is missing"),
        "surplus": (lambda t: t.update(extra=torch.ones(2)), "extra is none of the engine's"),
        "shape": (lambda t: t.update({QUERY: t[QUERY][:-1]}), rf"{QUERY} is float32 \[63, 64\]"),
        "dtype": (lambda t: t.update({QUERY: t[QUERY].bfloat16()}), f"{QUERY} is bfloat16"),
    }


def flip(folder: Path, tensor: Tensor) -> None:
    """Flip one bit of a tensor in the files of a folder; its bytes are found by what they are."""
    raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        if (place := data.find(raw)) >= 0:
            data[place + len(raw) // 2] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError("no file holds the tensor")


def flip_byte(path: Path, place: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def group(size: int = 2) -> tuple[BroadcastRoad, dict[str, Any]]:
    """A sender's end of a broadcast to `size` - 1 receivers, and where these meet it."""
    sender = BroadcastRoad("127.0.0.1", 0, 0, size, CPU, timeout_s=30)
    return sender, {"host": "127.0.0.1", "port": sender.port}


@contextmanager
def beside(call: Callable[[], Any]) -> Iterator[None]:
    """A call in a thread beside the block; its error is raised at the end of the block."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        yield
        future.result(timeout=60)


def send(road: Any, engine: Any, version: int, weights: ModelWeights, **options: Any) -> None:
    """One transfer, whatever the road."""
    offer = road.offer(version, weights, **options)
    if isinstance(road, BroadcastRoad):
        with beside(lambda: road.send(offer, weights)):
            engine.update(offer)
    else:
        assert isinstance(road, FilesRoad | MemoryRoad)
        engine.update(offer)


def names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]
