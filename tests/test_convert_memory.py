"""A rank's file is written tensor by tensor, and holds what torch.save would have written."""

import subprocess
import sys
from zipfile import ZipFile

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from convert_models import rank_weights, saved, weights
from small_recipe import environment
from tandem.checkpoint.convert import convert
from tandem.checkpoint.convert.architecture import architecture, read_config
from tandem.checkpoint.convert.megatron import Progress

MEASURED = """
import sys, threading
from pathlib import Path
from tandem.checkpoint.convert import convert

def anonymous():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

def run(source, target):
    convert(Path(source), Path(target), "megatron", say=lambda line: None)

small, source, folder = sys.argv[1:]
run(small, folder + "/first")  # so that what is imported when it is used is there
done, before, seen = threading.Event(), anonymous(), []
thread = threading.Thread(target=watch)
thread.start()
run(source, folder + "/m")
done.set()
thread.join()
print(max(seen) - before)
"""


def test_a_rank_with_the_whole_model_takes_the_memory_of_few_tensors(tmp_path):
    """Half of the model is far above what a tensor takes: the largest is a sixteenth of it."""
    source, small = tmp_path / "source", saved(tmp_path / "small", "llama")
    config = LlamaConfig(
        vocab_size=266,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    config.save_pretrained(source)
    shapes = architecture(read_config(source), reward=False).shapes()
    save_file({name: torch.rand(shape) for name, shape in shapes.items()}, source / "model.safetensors")
    model = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(small), str(source), str(tmp_path)],
        env=environment(),
        timeout=120,
        capture_output=True,
        text=True,
        check=True,
    )
    assert model > 130e6
    assert int(done.stdout) < model / 3
    fc1 = rank_weights(tmp_path / "m", "mp_rank_00")["decoder.layers.7.mlp.linear_fc1.weight"]
    read = weights(source)
    gate_up = [read[f"model.layers.7.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(fc1, torch.cat(gate_up))


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
