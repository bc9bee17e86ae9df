"""Weights between Hugging Face and Megatron-Core: byte-equal there and back, in every layout."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from convert_models import MODELS, SHAPE, assert_bytes_equal, network, rank_weights, saved, weights
from tandem.checkpoint.convert import convert
from tandem.checkpoint.convert.companions import rope_scaling

LAYOUTS = {
    "one": {},
    "tp2": {"tensor_parallel": 2},
    "tp4": {"tensor_parallel": 4},
    "pp2": {"pipeline_parallel": 2},
    "tp2pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "uneven": {"tensor_parallel": 2, "pipeline_parallel": 2, "layers_per_stage": "1,3"},
    "virtual": {"tensor_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2},
    "padded": {"tensor_parallel": 2, "pad_vocab_multiple": 128},
    "engine": {"tensor_parallel": 2, "transformer_impl": "transformer_engine"},
}
EXPERTS = {
    "ep2": {"expert_parallel": 2},
    "ep2grouped": {"expert_parallel": 2, "grouped_experts": True, "transformer_impl": "transformer_engine"},
    "tp2pp2ep4": {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 4},
    "tp2pp2vp2ep2": {
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "virtual_pipeline": 2,
        "expert_parallel": 2,
    },
}
SPARSE = ("mixtral", "qwen3_moe")
TRIPS = [(m, {**LAYOUTS}[n], n) for m in ("qwen2_tied", "llama") for n in LAYOUTS]
TRIPS += [
    (m, LAYOUTS[n], n) for m in ("qwen2_untied", "qwen3", "mistral", "reward") for n in ("virtual", "padded")
]
TRIPS += [(m, LAYOUTS["tp2pp2"], "tp2pp2") for m in SPARSE] + [
    (m, EXPERTS[n], n) for m in SPARSE for n in EXPERTS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each model; of the odd ones in several files."""
    root = tmp_path_factory.mktemp("models")
    shards = ("1GB", "40KB")
    return {name: saved(root / name, name, shard=shards[i % 2]) for i, name in enumerate(MODELS)}


def quiet(line: str) -> None:
    pass


def tokens(folder: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(folder).encode("12+30?")


@pytest.mark.parametrize(("name", "layout", "title"), TRIPS, ids=lambda v: v if isinstance(v, str) else "")
def test_there_and_back_is_byte_equal(folders, tmp_path, name, layout, title):
    there = convert(folders[name], tmp_path / "megatron", "megatron", **layout, say=quiet)
    back = convert(there, tmp_path / "hf", "hf", say=quiet)
    assert_bytes_equal(weights(folders[name]), weights(back))
    ranks = {p.name for p in (there / "release").iterdir()}
    sizes = [layout.get(f"{kind}_parallel", 1) for kind in ("tensor", "pipeline", "expert")]
    assert len(ranks) == sizes[0] * sizes[1] * sizes[2]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("qwen2_tied", "tp2", "pp2"),
        ("qwen2_tied", "pp2", "tp4"),
        ("qwen2_tied", "virtual", "uneven"),
        ("qwen2_tied", "padded", "engine"),
        ("qwen2_tied", "tp4", "tp2pp2"),
        ("llama", "tp2", "virtual"),
        ("reward", "pp2", "tp2pp2"),
    ],
)
def test_another_megatron_layout_equals_the_direct_conversion(folders, tmp_path, name, first, second):
    source = convert(folders[name], tmp_path / "first", "megatron", **LAYOUTS[first], say=quiet)
    other = convert(source, tmp_path / "other", "megatron", **LAYOUTS[second], say=quiet)
    direct = convert(folders[name], tmp_path / "direct", "megatron", **LAYOUTS[second], say=quiet)
    assert tokens(other) == tokens(folders[name]), "the tokenizer comes along"
    files = sorted(path.relative_to(direct) for path in direct.rglob("*.pt"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.pt"))
    for file in files:
        a, b = torch.load(direct / file, weights_only=True), torch.load(other / file, weights_only=True)
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith("model"):
                assert_bytes_equal(a[key], b[key])


def test_experts_move_to_another_number_of_ranks(folders, tmp_path):
    source = convert(folders["qwen3_moe"], tmp_path / "ep4", "megatron", **EXPERTS["tp2pp2ep4"], say=quiet)
    other = convert(source, tmp_path / "ep2", "megatron", **EXPERTS["ep2grouped"], say=quiet)
    assert_bytes_equal(
        weights(folders["qwen3_moe"]), weights(convert(other, tmp_path / "hf", "hf", say=quiet))
    )


def test_queries_keys_and_values_lie_group_by_group(folders, tmp_path):
    """8 query heads of 4 channels read 4 keys and values: rank 1 of 2 has groups 2 and 3."""
    there = convert(folders["qwen2_untied"], tmp_path / "m", "megatron", tensor_parallel=2, say=quiet)
    source = weights(folders["qwen2_untied"])
    for kind in ("weight", "bias"):
        q, k, v = (source[f"model.layers.3.self_attn.{letter}_proj.{kind}"] for letter in "qkv")
        wanted = torch.cat([q[16:24], k[8:12], v[8:12], q[24:32], k[12:16], v[12:16]])
        fused = rank_weights(there, "mp_rank_01")[f"decoder.layers.3.self_attention.linear_qkv.{kind}"]
        assert torch.equal(fused, wanted)


def test_gate_and_up_are_cut_each_before_they_are_stacked(folders, tmp_path):
    there = convert(folders["llama"], tmp_path / "m", "megatron", tensor_parallel=2, say=quiet)
    source = weights(folders["llama"])
    gate, up, down = (source[f"model.layers.0.mlp.{w}_proj.weight"] for w in ("gate", "up", "down"))
    rank = rank_weights(there, "mp_rank_01")
    assert torch.equal(rank["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate[24:], up[24:]]))
    assert torch.equal(rank["decoder.layers.0.mlp.linear_fc2.weight"], down[:, 24:])
    o = source["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(rank["decoder.layers.0.self_attention.linear_proj.weight"], o[:, 16:])


def test_virtual_chunks_go_round_the_stages(folders, tmp_path):
    """4 layers, 2 stages of 2 chunks: layer 2 is the second chunk's only layer on stage 0."""
    there = convert(
        folders["llama"], tmp_path / "m", "megatron", pipeline_parallel=2, virtual_pipeline=2, say=quiet
    )
    source = weights(folders["llama"])
    for layer, (stage, chunk) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        held = rank_weights(there, f"mp_rank_00_{stage:03d}", f"model{chunk}")
        norm = held["decoder.layers.0.input_layernorm.weight"]
        assert torch.equal(norm, source[f"model.layers.{layer}.input_layernorm.weight"])
    assert "embedding.word_embeddings.weight" in rank_weights(there, "mp_rank_00_000", "model0")
    assert "output_layer.weight" in rank_weights(there, "mp_rank_00_001", "model1")


def test_padding_is_zero_and_the_last_stage_keeps_a_copy_of_a_tied_embedding(folders, tmp_path):
    there = convert(
        folders["qwen2_tied"],
        tmp_path / "m",
        "megatron",
        tensor_parallel=2,
        pipeline_parallel=2,
        pad_vocab_multiple=100,
        say=quiet,
    )
    table = weights(folders["qwen2_tied"])["model.embed_tokens.weight"]
    first, last = rank_weights(there, "mp_rank_01_000"), rank_weights(there, "mp_rank_01_001")
    rows = first["embedding.word_embeddings.weight"]
    assert rows.shape == (200, 32)
    assert torch.equal(rows[:66], table[200:]) and not rows[66:].any()
    assert torch.equal(last["output_layer.weight"], rows)
    one = convert(folders["qwen2_tied"], tmp_path / "one", "megatron", say=quiet)
    assert "output_layer.weight" not in rank_weights(one, "mp_rank_00")


def test_a_rank_holds_its_experts_alone(folders, tmp_path):
    there = convert(folders["mixtral"], tmp_path / "m", "megatron", expert_parallel=2, say=quiet)
    source = weights(folders["mixtral"])
    rank = rank_weights(there, "mp_rank_00_001")
    names = [name for name in rank if name.startswith("decoder.layers.0.mlp.experts")]
    assert len(names) == 4
    for local in range(2):
        down = rank[f"decoder.layers.0.mlp.experts.local_experts.{local}.linear_fc2.weight"]
        assert torch.equal(down, source[f"model.layers.0.block_sparse_moe.experts.{2 + local}.w2.weight"])
    assert rank["decoder.layers.0.mlp.router.weight"].shape == (4, 32)


def test_fewer_key_value_heads_than_ranks(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPE, "num_key_value_heads", 2)
    source = saved(tmp_path / "source", "llama")
    there = convert(source, tmp_path / "m", "megatron", tensor_parallel=4, say=quiet)
    assert_bytes_equal(weights(source), weights(convert(there, tmp_path / "hf", "hf", say=quiet)))
    fused = weights(source)
    q, k = (fused[f"model.layers.0.self_attn.{letter}_proj.weight"] for letter in "qk")
    rank = rank_weights(there, "mp_rank_03")["decoder.layers.0.self_attention.linear_qkv.weight"]
    v = fused["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(rank, torch.cat([q[28:], k[4:], v[4:]]))


@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "qwen3_moe", "reward"])
def test_the_folder_that_comes_back_loads_and_gives_the_same_outputs(folders, tmp_path, name):
    there = convert(folders[name], tmp_path / "m", "megatron", pipeline_parallel=2, say=quiet)
    back = convert(there, tmp_path / "hf", "hf", shard_gb=3e-5, say=quiet)
    assert len(list(back.glob("*.safetensors"))) > 2
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    tokens = torch.arange(20, 30)[None]
    with torch.no_grad():
        assert torch.equal(
            kind.from_pretrained(back)(tokens).logits, kind.from_pretrained(folders[name])(tokens).logits
        )
    assert AutoTokenizer.from_pretrained(back)("12+34") == AutoTokenizer.from_pretrained(folders[name])(
        "12+34"
    )


def test_a_reward_head_in_the_place_of_the_output_layer_is_found(folders, tmp_path):
    there = convert(folders["reward"], tmp_path / "m", "megatron", tensor_parallel=2, say=quiet)
    for path in there.rglob("*.pt"):
        content = torch.load(path, weights_only=True)
        content["model"]["output_layer.weight"] = content["model"].pop("rm_head.weight")
        torch.save(content, path)
    # The config of the language model that the reward model began as.
    back = convert(there, tmp_path / "hf", "hf", config=folders["qwen2_tied"], say=quiet)
    assert_bytes_equal(weights(folders["reward"]), weights(back))
    config = json.loads((back / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert AutoModelForSequenceClassification.from_pretrained(back).num_labels == 1


def test_a_folder_of_links_into_a_cache(folders, tmp_path):
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in folders["llama"].iterdir():
        (source / path.name).symlink_to(path)
    back = convert(source, tmp_path / "hf", "hf", say=quiet)
    assert_bytes_equal(weights(source), weights(back))
    assert not any(path.is_symlink() for path in back.iterdir())


def test_types_are_kept_unless_another_is_asked_for(tmp_path):
    source = saved(tmp_path / "source", "qwen2_tied", torch.bfloat16)
    there = convert(source, tmp_path / "m", "megatron", tensor_parallel=2, say=quiet)
    assert {tensor.dtype for tensor in rank_weights(there, "mp_rank_01").values()} == {torch.bfloat16}
    assert_bytes_equal(weights(source), weights(convert(there, tmp_path / "hf", "hf", say=quiet)))
    wide = convert(there, tmp_path / "fp32", "hf", dtype="fp32", say=quiet)
    assert_bytes_equal({k: v.float() for k, v in weights(source).items()}, weights(wide))
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_adapter_equals_pefts_merge(tmp_path, dtype, rslora):
    source = saved(tmp_path / "source", "qwen3", dtype)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    settings = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(network("qwen3", dtype), settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    merged.pop("lm_head.weight")  # tied
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    options = {"lora": tmp_path / "adapter", "say": quiet}
    straight = convert(source, tmp_path / "hf", "hf", **options)
    assert_bytes_equal(merged, weights(straight))
    there = convert(source, tmp_path / "m", "megatron", **layout, **options)
    assert_bytes_equal(merged, weights(convert(there, tmp_path / "back", "hf", say=quiet)))
    plain = convert(source, tmp_path / "plain", "megatron", **layout, say=quiet)
    assert_bytes_equal(merged, weights(convert(plain, tmp_path / "late", "hf", **options)))


def test_progress_names_the_layouts_and_every_file(folders, tmp_path):
    lines: list[str] = []
    there = convert(
        folders["llama"],
        tmp_path / "m",
        "megatron",
        pipeline_parallel=2,
        layers_per_stage="3,1",
        say=lines.append,
    )
    assert lines[0] == "writing Megatron-Core: tensor 1, pipeline 2 (layers 3, 1), vocabulary 266"
    assert lines[1].startswith("release/mp_rank_00_000/model_optim_rng.pt  ")
    size = sum(tensor.nbytes for tensor in rank_weights(there, "mp_rank_00_000").values())
    assert f"{size:,} bytes  (1 of 2)" in lines[1]
    lines.clear()
    convert(there, tmp_path / "hf", "hf", say=lines.append)
    assert re.match(r"reading .*release: tensor 1, pipeline 2 \(layers 3, 1\), vocabulary 266", lines[0])
    assert lines[1].startswith("model.safetensors  ")


def test_what_goes_along(folders, tmp_path):
    there = convert(
        folders["qwen3_moe"],
        tmp_path / "m",
        "megatron",
        tensor_parallel=2,
        pipeline_parallel=2,
        virtual_pipeline=2,
        expert_parallel=2,
        say=quiet,
    )
    assert (there / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    values = json.loads((there / "megatron_arguments.json").read_text())
    assert values["tensor_model_parallel_size"] == values["expert_model_parallel_size"] == 2
    assert values["num_layers_per_virtual_pipeline_stage"] == 1
    assert values["moe_router_pre_softmax"]  # Transformers' default for the family
    assert values["moe_layer_freq"] == [1, 0, 1, 1] and values["num_query_groups"] == 4
    # Megatron's own default is learned positions, and its base a whole number.
    assert values["position_embedding_type"] == "rope"
    assert isinstance(values["rotary_base"], int) and values["rotary_base"] == 10000
    assert AutoTokenizer.from_pretrained(there).chat_template


def test_scaled_positions_go_along():
    """Megatron has a name for Llama 3's; others are kept as they are."""
    llama = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    assert rope_scaling(llama) == {"use_rope_scaling": True, "rope_scaling_factor": 8.0}
    assert rope_scaling({"rope_type": "default", "rope_theta": 1e4}) == {}
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    assert rope_scaling(yarn) == {"rope_parameters": yarn}
    assert rope_scaling(llama | {"low_freq_factor": 2.0}) == {
        "rope_parameters": llama | {"low_freq_factor": 2.0}
    }


def test_every_byte_of_a_rank_file_is_its_own(folders, tmp_path):
    """A saved view would bring the whole tensor behind it along."""
    there = convert(folders["llama"], tmp_path / "m", "megatron", tensor_parallel=4, say=quiet)
    for path in there.rglob("*.pt"):
        tensors: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
        assert path.stat().st_size < sum(t.nbytes for t in tensors.values()) + 600 * len(tensors)
