"""Conversions that cannot be: what is said, and that nothing is left in the place of the output."""

import argparse
import ast
import enum
import inspect
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from convert_models import assert_bytes_equal, network, rewrite, saved, weights
from small_recipe import environment
from tandem.checkpoint import convert as package
from tandem.checkpoint.convert import convert, torch_file
from tandem.errors import ConfigError, RunError

RANK = "release/{}/model_optim_rng.pt"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def megatron(llama, tmp_path_factory):
    """Two tensor and two pipeline ranks of it."""
    target = tmp_path_factory.mktemp("megatron") / "m"
    return convert(llama, target, "megatron", tensor_parallel=2, pipeline_parallel=2, say=lambda line: None)


@pytest.fixture
def copy(megatron, tmp_path):
    return Path(shutil.copytree(megatron, tmp_path / "copy"))


def refused(source, tmp_path, to="megatron", error=ConfigError, **options) -> str:
    """What is said; nothing may be written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "out", to, say=lambda line: None, **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel": 3}, "8 attention heads cannot be shared by 3 tensor-parallel ranks"),
        ({"tensor_parallel": 0}, "--tensor-parallel 0 must be 1 or more"),
        ({"pipeline_parallel": 3}, "--pipeline-parallel 3: 4 layers do not divide into 3 equal parts"),
        ({"virtual_pipeline": 2}, "2 virtual stages need 2 or more pipeline ranks"),
        ({"pipeline_parallel": 2, "virtual_pipeline": 4}, "4 layers do not divide into 8 equal parts"),
        ({"pipeline_parallel": 2, "layers_per_stage": "1,2"}, "adds up to 3 layers, but the model has 4"),
        ({"pipeline_parallel": 2, "layers_per_stage": "4"}, "has 1 stages, --pipeline-parallel 2"),
        ({"pipeline_parallel": 2, "layers_per_stage": "0,4"}, "every stage needs a layer"),
        ({"pipeline_parallel": 2, "layers_per_stage": "a,4"}, "is not a list of numbers like 7,9"),
        (
            {"pipeline_parallel": 2, "virtual_pipeline": 2, "layers_per_stage": "2,2"},
            "--layers-per-stage 2,2 and --virtual-pipeline 2 exclude each other",
        ),
        ({"expert_parallel": 2}, "2 expert-parallel ranks: the model has no experts"),
        ({"grouped_experts": True}, "--grouped-experts: the model has no experts"),
        ({"tensor_parallel": 2, "expert_tensor_parallel": 1}, "--expert-tensor-parallel: the model has no"),
        ({"dtype": "float16"}, "--dtype 'float16' is not one of fp32, bf16, fp16"),
        ({"transformer_impl": "te"}, "--transformer-impl 'te' is not one of local, transformer_engine"),
        ({"to": "mcore"}, "--to 'mcore' is not one of hf, megatron"),
        ({"to": "hf", "tensor_parallel": 2}, "leave out the layout"),
        ({"shard_gb": 0.0}, "--shard-gb 0 must be above 0"),
    ],
    ids=lambda v: "" if isinstance(v, str) else ",".join(v),
)
def test_wrong_arguments(llama, tmp_path, options, said):
    assert said in refused(llama, tmp_path, **options)


def test_places_that_are_wrong(llama, tmp_path):
    assert "does not exist or is not a folder" in refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no config.json; give the Hugging Face model's folder with --config" in refused(
        tmp_path / "empty", tmp_path
    )
    assert "neither model.safetensors nor" in refused(tmp_path / "empty", tmp_path, config=llama)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "exists; give a path that is not there yet" in refused(llama, tmp_path)


def test_what_a_model_belongs_to_is_no_model_and_says_what_to_give(llama, tmp_path):
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    for folder, name in ((run, "config.yaml"), (adapter, "adapter_config.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    said = f"{run} is a run and holds no model folder: write one with tandem export {run} TARGET"
    assert said in refused(run, tmp_path)
    shutil.copytree(llama, run / "model")
    assert refused(run, tmp_path) == f"{run} is a run: its model is {run / 'model'}"
    (run / "manifest.json").write_text("{}")
    assert f"{run} is a run's checkpoint: its model is" in refused(run, tmp_path)
    said = f"{adapter} is an adapter: give its model's folder as SOURCE, with --lora {adapter}"
    assert refused(adapter, tmp_path) == said


def test_a_target_that_is_the_source_is_refused(llama):
    before = sorted(llama.rglob("*"))
    with pytest.raises(ConfigError, match="exists; give a path"):
        convert(llama, llama, "hf", dtype="bf16", say=lambda line: None)
    assert sorted(llama.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be converted; supported are llama, mistral"),
        ({"attention_bias": True}, "attention_bias=true means biases"),
        ({"num_hidden_layers": 5}, "9 missing: model.layers.4.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "9 unexpected: model.layers.3"),
        ({"intermediate_size": 64}, "model.layers.0.mlp.gate_proj.weight [48, 32] instead of [64, 32]"),
    ],
    ids=lambda v: "" if isinstance(v, str) else ",".join(v),
)
def test_a_config_that_does_not_fit_the_weights(llama, megatron, tmp_path, changes, said):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    assert said in refused(source, tmp_path)


def test_missing_and_unexpected_tensors_are_named(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors")
    said = refused(source, tmp_path)
    assert "1 missing: model.layers.2.mlp.up_proj.weight" in said
    assert "1 unexpected: model.extra.weight" in said


def test_a_missing_file_of_a_sharded_folder_is_named(tmp_path):
    source = saved(tmp_path / "source", "llama", shard="40KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refused(source, tmp_path)


def test_a_missing_rank_is_named(copy, tmp_path):
    shutil.rmtree(copy / "release" / "mp_rank_01_001")
    assert "lacks the files of 1 ranks (tensor, pipeline, expert): (1, 1, 0)" in refused(copy, tmp_path, "hf")


def test_lost_ranks_that_leave_a_whole_grid_are_noticed(copy, tmp_path):
    for t in range(2):
        shutil.rmtree(copy / "release" / f"mp_rank_{t:02d}_001")
    assert "holds 2 layers (2 in its stages), but the config has 4" in refused(copy, tmp_path, "hf")
    shutil.rmtree(copy / "release" / "mp_rank_01_000")
    assert "2 layers" in refused(copy, tmp_path, "hf")


def test_half_of_the_tensor_ranks_is_noticed(llama, tmp_path):
    source = convert(llama, tmp_path / "m", "megatron", tensor_parallel=2, say=lambda line: None)
    shutil.rmtree(source / "release" / "mp_rank_01")
    assert "embedding.word_embeddings.weight [133, 32] instead of [266, 32]" in refused(
        source, tmp_path, "hf"
    )


def test_a_missing_tensor_of_a_rank_is_named(copy, tmp_path):
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    rewrite(copy / RANK.format("mp_rank_01_001"), lambda content: content["model"].pop(name))
    said = refused(copy, tmp_path, "hf")
    assert f"1 missing: {name}" in said and "mp_rank_01_001" in said


def test_other_formats_of_megatron_are_named(copy, tmp_path):
    (copy / "release" / ".metadata").touch()
    assert "--ckpt-convert-format torch" in refused(copy, tmp_path, "hf")
    (copy / "release" / ".metadata").unlink()
    rewrite(copy / RANK.format("mp_rank_00_000"), lambda c: c.update(model={"language_model": {}}))
    assert "not laid out by Megatron-Core, but by its predecessor" in refused(copy, tmp_path, "hf")


def test_an_output_layer_that_is_no_longer_the_tied_embedding(tmp_path):
    tied = saved(tmp_path / "tied", "qwen2_tied")
    source = convert(tied, tmp_path / "m", "megatron", pipeline_parallel=2, say=lambda line: None)
    rewrite(
        source / RANK.format("mp_rank_00_001"),
        lambda content: content["model"]["output_layer.weight"].add_(1),
    )
    assert "the output layer is not the embedding, but the config ties" in refused(source, tmp_path, "hf")


def test_copies_that_differ_are_reported_and_the_first_is_taken(copy, llama, tmp_path, caplog):
    name = "decoder.layers.0.input_layernorm.weight"
    rewrite(copy / RANK.format("mp_rank_01_000"), lambda content: content["model"][name].add_(1))
    back = convert(copy, tmp_path / "hf", "hf", say=lambda line: None)
    assert "1 tensors differ between ranks" in caplog.text
    assert "model.layers.0.input_layernorm.weight" in caplog.text
    assert_bytes_equal(weights(llama), weights(back))


class Precision(enum.Enum):
    LOW = 1


def test_a_training_checkpoint_is_read_without_its_objects(copy, llama, tmp_path):
    """Arguments, generator states and optimizer state lie in the same file."""

    def train(content):
        content["args"] = argparse.Namespace(lr=1e-3, precision=Precision.LOW, path=Path("x"))
        content["rng_state"] = [{"random": random.getstate(), "torch": torch.get_rng_state()}]
        content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
        content["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None

    for path in copy.rglob("*.pt"):
        rewrite(path, train)
    (copy / "release").rename(copy / "iter_0000300")
    (copy / "latest_checkpointed_iteration.txt").write_text("300")
    assert_bytes_equal(weights(llama), weights(convert(copy, tmp_path / "a", "hf", say=lambda line: None)))
    straight = convert(copy / "iter_0000300", tmp_path / "b", "hf", say=lambda line: None)
    assert_bytes_equal(weights(llama), weights(straight))


class Harmful:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (self.place,))


class Opened(Harmful):
    def __reduce__(self):
        return (open, (self.place, "w"))


def test_code_in_a_file_never_runs(copy, llama, tmp_path):
    """What makes a file when it is read: refused in one form, passed over in the other, run in neither."""
    place, path = tmp_path / "made", copy / RANK.format("mp_rank_00_000")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"args": Harmful(str(place))}, path)
    assert f"{path} cannot be read without running code" in refused(copy, tmp_path, "hf")
    torch.save(content | {"args": Opened(str(place))}, path)
    assert_bytes_equal(weights(llama), weights(convert(copy, tmp_path / "hf", "hf", say=lambda line: None)))
    assert not place.exists()
    torch.load(path, weights_only=False)
    assert place.exists()  # so it would have run


def test_the_reader_of_pickles_asks_for_weights_only():
    tree = ast.parse(Path(inspect.getsourcefile(torch_file)).read_text())
    named = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [name for name in named if name.startswith("pickle")] == ["pickle.UnpicklingError"]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert len(calls) == 1
    assert {"weights_only=True", "mmap=True"} <= {ast.unparse(keyword) for keyword in calls[0].keywords}


def test_a_file_that_is_cut_off_is_named(copy, tmp_path):
    path = copy / RANK.format("mp_rank_00_001")
    path.write_bytes(path.read_bytes()[:3000])
    assert f"{path} cannot be read" in refused(copy, tmp_path, "hf")


def test_a_number_too_large_for_the_type_is_named(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, source / "model.safetensors")
    said = refused(source, tmp_path, error=RunError, dtype="fp16")
    assert "model.layers.1.mlp.up_proj.weight has values up to 1e+06" in said


def adapter(folder: Path, **settings) -> Path:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    get_peft_model(network("llama"), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora=True cannot be merged here"),
        ({"bias": "all"}, "bias='all' cannot be merged here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights, too"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] cannot be merged here"),
        ({"target_modules": ["embed_tokens"]}, "are not pairs of lora_A and lora_B"),
    ],
    ids=lambda v: "" if isinstance(v, str) else ",".join(v),
)
def test_adapters_that_cannot_be_merged(llama, tmp_path, settings, said):
    folder = adapter(tmp_path / "adapter", **settings)
    assert said in refused(llama, tmp_path, lora=folder)


def test_an_adapter_of_another_model_or_rank_is_refused(llama, tmp_path):
    folder = adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    assert "r=8 ask for [8, 32] and [32, 8]" in refused(llama, tmp_path, lora=folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    other = saved(tmp_path / "other", "qwen2_tied")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.3", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    assert "1 adapted weights are not in the model" in refused(other, tmp_path, lora=folder)
    assert "has no adapter_config.json" in refused(llama, tmp_path, lora=tmp_path / "nowhere")


def test_too_little_space_is_said_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "free_bytes", lambda folder: 1000)
    assert "1,000 are free there" in refused(llama, tmp_path, error=RunError)


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_disk_that_fails_leaves_nothing(llama, tmp_path, to):
    """A limit on file sizes fails a write in the middle, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        said = refused(llama, tmp_path, to, error=RunError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "could not be written" in said


def test_an_interruption_leaves_nothing(llama, tmp_path):
    def stop(line: str) -> None:
        if "(1 of 4)" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out", "megatron", pipeline_parallel=4, say=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_output_and_the_next_try_clears_up(llama, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tandem.checkpoint.convert import convert\n"
        "def say(line):\n"
        "    if '(1 of 4)' in line: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'megatron', pipeline_parallel=4, say=say)\n"
    )
    target = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama), str(target)], env=environment(), timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    convert(llama, target, "megatron", say=lambda line: None)
    assert list(tmp_path.iterdir()) == [target]
