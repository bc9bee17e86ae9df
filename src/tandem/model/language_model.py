"""A causal language model: a Transformers module with its tokenizer, fed lines of tokens."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tandem.errors import ConfigError, RunError
from tandem.model.adapter import adapter_of, adapts_weight, is_adapted
from tandem.model.attention import Layout, Rows
from tandem.model.feed_forward import lighten
from tandem.model.finite import check_read
from tandem.model.head import chosen_logprobs, head_of
from tandem.model.mixture import MIXTURES, apart, experts_first, is_mixture
from tandem.model.parallel.mesh import ALONE, Mesh, norm_of
from tandem.model.product import quicken
from tandem.types import BatchT

if TYPE_CHECKING:
    from peft import PeftModel


class LanguageModel:
    """`module` is what trains and what decodes; sampler and trainer hold this same object."""

    mesh: Mesh = ALONE
    """The processes that the model lies on."""

    def __init__(
        self, module: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase, source: str
    ) -> None:
        quicken(module)
        lighten(module)
        self.module = module
        self.tokenizer = tokenizer
        self.source = source
        """Where the weights came from, for messages."""
        self.adapter = adapter_of(module)
        """Its settings; None where all weights are the model's own."""
        self.network: PreTrainedModel = module.get_base_model() if self.adapter else module
        self.decoder: nn.Module = self.network.get_decoder()
        """The layers between embedding and output head, with both norms but without the head."""
        self.head: nn.Module = head_of(self.network)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def embedding(self) -> Tensor:
        """[V, hidden]"""
        return self.network.get_input_embeddings().weight

    @property
    def vocab_size(self) -> int:
        return int(self.network.config.vocab_size)

    @property
    def layers(self) -> int:
        return int(self.network.config.num_hidden_layers)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.network.config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        config = self.network.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def max_positions(self) -> int:
        """Longest row; within a sliding window, where there is one, attention is the ordinary one."""
        return longest_row(self.network.config)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """End tokens: those of the generation config and the tokenizer's own."""
        listed = self.network.generation_config.eos_token_id
        ids = listed if isinstance(listed, list) else [listed]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def hidden(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        """[N, hidden] after the last layer, for a line of tokens."""
        out = self.decoder(
            input_ids=tokens_N[None], position_ids=position_N[None], use_cache=False, layout=layout
        )
        return out.last_hidden_state[0]

    def at(
        self,
        line_N: Tensor,
        layout: Layout,
        at_M: Tensor,
        head: Callable[..., tuple[Tensor, ...]],
        *columns_M: Tensor,
    ) -> tuple[Tensor, ...]:
        """`head(hidden, *columns)`, the hidden states being those at the given places of the line."""
        hidden_NH = self.hidden(line_N, layout.position_N, layout)
        return head(hidden_NH.index_select(0, at_M), *columns_M)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] in float32."""
        return self.head(hidden_NH).float()

    @property
    def logits_width(self) -> int:
        """Columns of what `logits` returns."""
        return self.vocab_size

    def chosen_logprobs(
        self, logits_MV: Tensor, chosen_M: Tensor, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each chosen token and the entropy in nats, from what `logits` returns."""
        return chosen_logprobs(logits_MV, chosen_M, entropy_gradient)

    def forward_each(
        self,
        pieces: Iterable[tuple[Tensor, BatchT]],
        work: Callable[[Tensor, BatchT], object],
        *,
        attention: str = "padded",
    ) -> None:
        """`work(rows, part)` for every micro-batch: row indices, and those rows.

        `attention` is that of `token_logprobs`, for processes that have layers but not what `work` asks for.
        """
        for rows, part in pieces:
            work(rows, part)

    def backward_each(
        self,
        pieces: Iterable[tuple[Tensor, BatchT]],
        loss: Callable[[Tensor, BatchT], Tensor],
        after: Callable[[], None],
        *,
        attention: str = "padded",
    ) -> None:
        """The gradient of `loss(rows, part)` for every micro-batch, and `after()` each time it has come."""
        for rows, part in pieces:
            loss(rows, part).backward()
            after()

    def base(self) -> AbstractContextManager[None]:
        """The model without its adapter, while inside; only for models that have one."""
        assert self.adapter is not None
        return self.module.disable_adapter()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """2-norm over all gradients, by name, in float32; 0 where there is none."""
        return norm_of(gradients)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, by the name it has in a Hugging Face folder; adapters merged in, tied ones once.

        Where the model lies on several processes all of them iterate, in step.
        """
        for name, whole in self.whole_weights():
            yield from apart(self.network.config.model_type, name, whole)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As `weights`, with the tensors and names that Transformers' model has: all experts of a layer in one."""
        named = dict(self.module.named_parameters())
        adapted = self._adapted(named)
        for name, weight in named.items():
            if ".lora_" in name:
                continue
            whole = self.whole(name, weight).detach()
            if name in adapted:
                whole = whole + self._change(adapted[name], named, whole)
            yield self.hf_name(name), whole

    def _adapted(self, named: Mapping[str, Tensor]) -> dict[str, str]:
        """The module that adapts it, by each adapted weight; RunError where the weight is not to be found."""
        found = {}
        marks = (".lora_A.", ".lora_embedding_A.")
        for stem, mark in {(name.partition(m)[0], m) for name in named for m in marks if m in name}:
            layer, base = self.module.get_submodule(stem), stem
            leaf = layer.parameter_name if adapts_weight(layer) else "weight"
            while is_adapted(self.module.get_submodule(base)):
                base = f"{base}.base_layer"
            fused = adapts_weight(layer) and layer.num_experts > 1
            known = mark == marks[0] and (not fused or is_mixture(self.network.config))
            if f"{base}.{leaf}" not in named or not known:
                raise RunError(
                    f"model.lora.targets: the adapter of {stem} cannot be merged into its weights, for it is neither "
                    f"a plain linear layer nor the experts of {', '.join(sorted(MIXTURES))}; name other targets, "
                    "such as q_proj"
                )
            found[f"{base}.{leaf}"] = stem
        return found

    def _change(self, stem: str, named: Mapping[str, Tensor], whole: Tensor) -> Tensor:
        """What the adapter in this module adds to a weight."""
        experts = len(whole) if whole.ndim == 3 else 1
        a, b = (
            experts_first(name, self.whole(name, named[name]).detach(), experts)
            for name in (f"{stem}.lora_{x}.default.weight" for x in "AB")
        )
        return ((b @ a) * self.module.get_submodule(stem).scaling["default"]).to(whole.dtype)

    def hf_name(self, name: str) -> str:
        """The name in `network`, were there no adapter, of a parameter of `module`. A folder has it under the same
        name, but for mixtures (`model/mixture.py`)."""
        prefix = "base_model.model." if self.adapter else ""
        return name.removeprefix(prefix).replace(".base_layer", "")

    def whole(self, name: str, weight: Tensor) -> Tensor:
        """All of the parameter of this name."""
        return weight

    def wholes(self, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All of each of these parameters, and of those that only others have. All processes iterate, in step."""
        return ((name, self.whole(name, weight)) for name, weight in named.items())

    @torch.no_grad()
    def take_over(self, other: "LanguageModel") -> None:
        """Copy the weights of a model of the same shape, any adapter merged; the head, if it is the same."""
        ours = {self.hf_name(name): weight for name, weight in self.module.named_parameters()}
        for name, whole in other.whole_weights():
            if name in ours:
                ours[name].copy_(whole)

    def save(self, folder: Path) -> None:
        """Weights, config and tokenizer as a Hugging Face folder; of a model with adapter, the adapter's folder."""
        self.module.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    def save_merged(self, folder: Path) -> None:
        """An ordinary Hugging Face folder, any adapter merged into the weights."""
        if self.adapter is None:
            return self.save(folder)
        self.module.merge_adapter()
        try:
            merged = {
                name.replace(".base_layer", ""): tensor
                for name, tensor in self.network.state_dict().items()
                if ".lora_" not in name
            }
            self.network.save_pretrained(folder, state_dict=merged, safe_serialization=True)
        finally:
            self.module.unmerge_adapter()
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def check_forward(self) -> None:
        """Decoder plus head must be the model's own forward; some architectures do more to their logits.

        Nothing can be said of weights that are not finite: they are refused before."""
        check_read(self)
        tokens_N = torch.arange(min(8, self.vocab_size), device=self.device)
        rows = Rows(torch.tensor([len(tokens_N)], device=self.device))
        ours_NV = self.logits(self.hidden(tokens_N, rows.position_N, rows))
        theirs_NV = (
            self.network(
                input_ids=tokens_N[None], position_ids=rows.position_N[None], use_cache=False, layout=rows
            )
            .logits[0]
            .float()
        )
        # Small logits pass a cap almost unchanged, so that comparing values would not show it.
        capped = getattr(self.network.config, "final_logit_softcapping", None) is not None
        if capped or not torch.allclose(ours_NV, theirs_NV, atol=1e-4, rtol=1e-4):
            raise ConfigError(self.changes_logits)

    @property
    def changes_logits(self) -> str:
        """The error of a model that `check_forward` refuses."""
        return (
            f"model.path={self.source}: {type(self.network).__name__} changes its logits after the output head "
            "(soft-capping or scaling), which is not supported; use a Qwen2, Qwen2.5, Qwen3 or Llama model"
        )


def longest_row(config: PreTrainedConfig) -> int:
    """Of a model with this configuration, in tokens."""
    return min(config.max_position_embeddings, getattr(config, "sliding_window", None) or sys.maxsize)
