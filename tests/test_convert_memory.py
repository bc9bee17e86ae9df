"""Conversion takes the memory of few tensors, and a rank's file holds what torch.save would have written."""

import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from convert_models import rank_weights, saved, weights
from small_recipe import environment
from tandem.checkpoint.convert import convert
from tandem.checkpoint.convert.architecture import architecture, read_config
from tandem.checkpoint.convert.megatron import Progress

MEASURED = """
import gc, json, sys, threading
from pathlib import Path
from tandem.checkpoint.convert import convert

def anonymous():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])

def watch(done, seen):
    while not done.wait(0.001):
        seen.append(anonymous())

def run(source, target, to, **options):
    gc.collect()
    done, seen = threading.Event(), [anonymous()]
    thread = threading.Thread(target=watch, args=(done, seen))
    thread.start()
    convert(source, target, to, say=lambda line: None, **options)
    done.set()
    thread.join()
    return max(seen)

def every_way(folder):
    source, cut = folder / "source", {"tensor_parallel": 2, "pipeline_parallel": 2}
    return {
        "megatron": run(source, folder / "one", "megatron"),
        "merged": run(source, folder / "cut", "megatron", lora=folder / "adapter", **cut),
        "hf": run(folder / "cut", folder / "hf", "hf", shard_gb=float(sys.argv[3])),
    }

small, large = (Path(argument) for argument in sys.argv[1:3])
every_way(small)  # so that what is imported when it is used is there
before = anonymous()
print(json.dumps({way: most - before for way, most in every_way(large).items()}))
"""
TENSOR, SHARD = 4 * 2**20, 16 * 2**20
"""Bytes of the largest tensor, and of a safetensors file: a thirty-second and an eighth of the model."""

FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""What is no longer held is given back by the allocator, so that it does not count."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 130 MB and an adapter on all its layers; then what they were converted to."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=266,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder / "source")
    shapes = architecture(read_config(folder / "source"), reward=False).shapes()
    made = {name: torch.rand(shape) for name, shape in shapes.items()}
    assert max(tensor.nbytes for tensor in made.values()) == TENSOR
    assert sum(tensor.nbytes for tensor in made.values()) > 32 * TENSOR
    save_file(made, folder / "source" / "model.safetensors")
    save_adapter(folder / "adapter", shapes)
    return folder


@pytest.fixture(scope="module")
def most(large, tmp_path_factory):
    """How many bytes more than before the first were in memory in each conversion."""
    small = tmp_path_factory.mktemp("small")
    saved(small / "source", "llama")
    save_adapter(small / "adapter", {name: tuple(t.shape) for name, t in weights(small / "source").items()})
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(small), str(large), str(SHARD / 2**30)],
        env={**environment(), **FREED_AT_ONCE},
        timeout=120,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def save_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """As PEFT saves one, of rank 1, on every matrix of every layer."""
    LoraConfig(r=1, lora_alpha=1, target_modules="all-linear").save_pretrained(folder)
    tensors = {}
    for name, shape in shapes.items():
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{stem}.lora_A.weight": torch.rand(1, shape[1])}
            tensors |= {f"{stem}.lora_B.weight": torch.rand(shape[0], 1)}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_rank_with_the_whole_model_takes_the_memory_of_few_tensors(large, most):
    assert most["megatron"] < 2 * TENSOR
    fc1 = rank_weights(large / "one", "mp_rank_00")["decoder.layers.7.mlp.linear_fc1.weight"]
    read = weights(large / "source")
    gate_up = [read[f"model.layers.7.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(fc1, torch.cat(gate_up))


def test_an_adapter_takes_the_memory_of_few_tensors_more(most):
    assert most["merged"] < 6 * TENSOR


def test_a_hugging_face_folder_takes_the_memory_of_one_of_its_files(large, most):
    assert most["hf"] < SHARD + 3 * TENSOR
    files = sorted((large / "hf").glob("*.safetensors"))
    assert len(files) > 8 and all(path.stat().st_size < SHARD + 2**16 for path in files)


def test_the_file_holds_what_torch_would_save(tmp_path):
    """Entry by entry, but for two: how the pickle refers back to its texts, and a number made of all bytes. In a
    folder whose name is not ASCII torch writes in another way."""
    source = saved(tmp_path / "source", "qwen2_untied", torch.bfloat16)
    options = {"pipeline_parallel": 2, "virtual_pipeline": 2, "say": lambda line: None}
    for folder in ("size", "größe"):
        there = convert(source, tmp_path / folder, "megatron", **options)
        for path in sorted(there.rglob("*.pt")):
            other = path.parent / "other" / path.name
            other.parent.mkdir()
            content = torch.load(path, weights_only=True, mmap=True)
            torch.save(content, other)
            with ZipFile(path) as archive, ZipFile(other) as wanted:
                assert archive.testzip() is None
                assert archive.namelist() == wanted.namelist()
                same = [name for name in wanted.namelist() if not name.endswith(("data.pkl", "_id"))]
                assert len(same) > sum(len(chunk) for key, chunk in content.items() if "model" in key)
                assert all(archive.read(name) == wanted.read(name) for name in same)


def test_a_large_file_tells_how_far_it_is():
    lines: list[str] = []
    progress = Progress("a.pt", 3 * 2**30, lines.append)
    for _ in range(6):
        progress.add(2**29)
    assert lines == [f"a.pt  {n * 2**30:,} of 3,221,225,472 bytes" for n in (1, 2)]
