"""Experts that are cut by fewer ranks than the rest, and experts fused into two matrices."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from convert_models import assert_bytes_equal, rank_weights, rewrite, saved, weights
from tandem.checkpoint.convert import convert
from tandem.errors import ConfigError

LAYOUTS = {
    "tp2ep4etp1": {"tensor_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 1},
    "tp4etp1": {"tensor_parallel": 4, "expert_tensor_parallel": 1},
    "tp4pp2ep2etp2": {
        "tensor_parallel": 4,
        "pipeline_parallel": 2,
        "expert_parallel": 2,
        "expert_tensor_parallel": 2,
    },
    "fused": {"grouped_experts": True},
    "fused tp2ep2": {"grouped_experts": True, "tensor_parallel": 2, "expert_parallel": 2},
    "fused tp2ep2etp1": {
        "grouped_experts": True,
        "tensor_parallel": 2,
        "expert_parallel": 2,
        "expert_tensor_parallel": 1,
    },
    "grouped tp2ep4etp1": {
        "grouped_experts": True,
        "transformer_impl": "transformer_engine",
        "tensor_parallel": 2,
        "expert_parallel": 4,
        "expert_tensor_parallel": 1,
    },
}
FILES = {
    "tp2ep4etp1": {"00_000", "01_001", "00_002", "01_003"},
    "grouped tp2ep4etp1": {"00_000", "01_001", "00_002", "01_003"},
    "tp4etp1": {"00", "01", "02", "03"},
    # Tensor ranks 0 and 1 share the experts of rank 0, 2 and 3 those of rank 1.
    "tp4pp2ep2etp2": {f"{t:02d}_{p:03d}_{e:03d}" for p in (0, 1) for t, e in enumerate((0, 0, 1, 1))},
    "fused": {"00"},
    "fused tp2ep2": {"00_000", "01_000", "00_001", "01_001"},
    "fused tp2ep2etp1": {"00_000", "01_001"},
}
"""Numbers of the ranks that Megatron's processes have, in its order of ranks, one process for each."""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    return {name: saved(root / name, name) for name in ("mixtral", "qwen3_moe")}


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, sparse, tmp_path_factory):
    """Name of a layout and qwen3_moe in it."""
    target = tmp_path_factory.mktemp("written") / "m"
    return request.param, convert(
        sparse["qwen3_moe"], target, "megatron", **LAYOUTS[request.param], say=quiet
    )


def test_there_and_back_is_byte_equal(sparse, written, tmp_path):
    name, there = written
    assert {path.name.removeprefix("mp_rank_") for path in (there / "release").iterdir()} == FILES[name]
    back = convert(there, tmp_path / "hf", "hf", say=quiet)
    assert_bytes_equal(weights(sparse["qwen3_moe"]), weights(back))


@pytest.mark.parametrize("first", ["tp2ep4etp1", "fused tp2ep2etp1", "fused tp2ep2"])
def test_another_layout_equals_the_direct_conversion(sparse, written, tmp_path, first):
    name, direct = written
    source = convert(sparse["qwen3_moe"], tmp_path / "first", "megatron", **LAYOUTS[first], say=quiet)
    other = convert(source, tmp_path / "other", "megatron", **LAYOUTS[name], say=quiet)
    for folder in (direct / "release").iterdir():
        assert_bytes_equal(rank_weights(direct, folder.name), rank_weights(other, folder.name))


def test_a_rank_has_whole_experts_and_its_share_of_the_rest(sparse, tmp_path):
    there = convert(sparse["mixtral"], tmp_path / "m", "megatron", **LAYOUTS["tp2ep4etp1"], say=quiet)
    source = weights(sparse["mixtral"])
    rank = rank_weights(there, "mp_rank_01_003")
    at = "model.layers.0.block_sparse_moe.experts.3"
    gate_up = torch.cat([source[f"{at}.w1.weight"], source[f"{at}.w3.weight"]])
    room = "decoder.layers.0.mlp.experts.local_experts.0"
    assert torch.equal(rank[f"{room}.linear_fc1.weight"], gate_up)
    assert torch.equal(rank[f"{room}.linear_fc2.weight"], source[f"{at}.w2.weight"])
    assert torch.equal(rank["embedding.word_embeddings.weight"], source["model.embed_tokens.weight"][133:])
    o = source["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(rank["decoder.layers.0.self_attention.linear_proj.weight"], o[:, 16:])


def test_fused_matrices_compute_what_the_experts_do(sparse, tmp_path):
    """As Megatron's GroupedMLP does: matrices viewed per expert, gate before up, results summed over tensor ranks."""
    there = convert(sparse["mixtral"], tmp_path / "m", "megatron", **LAYOUTS["fused tp2ep2"], say=quiet)
    source = weights(sparse["mixtral"])
    x_BH = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for expert in range(4):
        rank, local = divmod(expert, 2)
        found_BH = torch.zeros(5, 32)
        for tensor in range(2):
            held = rank_weights(there, f"mp_rank_{tensor:02d}_{rank:03d}")
            first, second = (held[f"decoder.layers.2.mlp.experts.weight{n}"] for n in (1, 2))
            assert (first.shape, second.shape) == ((32, 2 * 2 * 24), (2 * 24, 32))
            gate, up = (x_BH @ first.view(2, 32, -1)[local]).chunk(2, -1)
            found_BH += (F.silu(gate) * up) @ second.view(2, -1, 32)[local]
        at = f"model.layers.2.block_sparse_moe.experts.{expert}"
        gate, up = (F.linear(x_BH, source[f"{at}.{w}.weight"]) for w in ("w1", "w3"))
        wanted_BH = F.linear(F.silu(gate) * up, source[f"{at}.w2.weight"])
        torch.testing.assert_close(found_BH, wanted_BH, rtol=1e-4, atol=1e-4)


def test_fused_matrices_beside_norms_of_transformer_engine_are_read(sparse, tmp_path):
    """`--moe-use-legacy-grouped-gemm`: built here from the experts of the grouped layer."""
    there = convert(
        sparse["qwen3_moe"], tmp_path / "m", "megatron", **LAYOUTS["grouped tp2ep4etp1"], say=quiet
    )

    def fuse(content):
        model = content["model"]
        for layer in (0, 2, 3):
            room = f"decoder.layers.{layer}.mlp.experts"
            for n in (1, 2):
                model[f"{room}.weight{n}"] = model.pop(f"{room}.linear_fc{n}.weight0").T.contiguous()

    for path in there.rglob("*.pt"):
        rewrite(path, fuse)
    back = convert(there, tmp_path / "hf", "hf", say=quiet)
    assert_bytes_equal(weights(sparse["qwen3_moe"]), weights(back))


def test_what_megatron_is_told(sparse, tmp_path):
    there = convert(sparse["mixtral"], tmp_path / "m", "megatron", **LAYOUTS["fused tp2ep2etp1"], say=quiet)
    values = json.loads((there / "megatron_arguments.json").read_text())
    assert (values["tensor_model_parallel_size"], values["expert_tensor_parallel_size"]) == (2, 1)
    assert values["moe_grouped_gemm"] and values["moe_use_legacy_grouped_gemm"]
    lines: list[str] = []
    convert(there, tmp_path / "hf", "hf", say=lines.append)
    assert "expert 2, expert tensor 1, vocabulary 266" in lines[0]


def test_experts_that_the_files_cannot_name_are_refused(sparse, tmp_path):
    with pytest.raises(
        ConfigError, match="3 expert-tensor-parallel ranks do not divide 2 tensor-parallel ranks"
    ):
        convert(
            sparse["mixtral"],
            tmp_path / "m",
            "megatron",
            tensor_parallel=2,
            expert_tensor_parallel=3,
            say=quiet,
        )


def lose(*names: str):
    return lambda release: [shutil.rmtree(release / name) for name in names]


def make_gates_whole(release):
    """While the other matrix of each expert stays cut."""

    def change(content):
        for name, tensor in content["model"].items():
            if name.endswith("linear_fc1.weight"):
                content["model"][name] = torch.cat([tensor, tensor])

    for path in release.rglob("*.pt"):
        rewrite(path, change)


@pytest.mark.parametrize(
    ("layout", "spoil", "said"),
    [
        ("tp2ep4etp1", lose("mp_rank_01_001"), r"lacks .* 1 ranks .*: \(1, 0, 1\)"),
        ("tp2ep4etp1", lose("mp_rank_00_002", "mp_rank_01_003"), "missing: .*local_experts.1"),
        ("tp2", make_gates_whole, r"local_experts.0.linear_fc2.weight \[32, 24\] instead of \[32, 48\]"),
    ],
    ids=["a rank", "half of the experts", "one matrix of two"],
)
def test_experts_that_do_not_fit_are_noticed(sparse, tmp_path, layout, spoil, said):
    options = LAYOUTS.get(layout, {"tensor_parallel": 2})
    there = convert(sparse["mixtral"], tmp_path / "m", "megatron", **options, say=quiet)
    spoil(there / "release")
    with pytest.raises(ConfigError, match=said):
        convert(there, tmp_path / "hf", "hf", say=quiet)
