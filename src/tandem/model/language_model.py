"""A causal language model: a Transformers module with its tokenizer, fed lines of tokens."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tandem.errors import ConfigError
from tandem.model.attention import Layout, Rows


class LanguageModel:
    """`module` is what trains and what decodes; sampler and trainer hold this same object."""

    def __init__(
        self, module: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, source: str
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.source = source
        """Where the weights came from, for messages."""
        self.network: PreTrainedModel = module.get_base_model() if isinstance(module, PeftModel) else module
        self._decoder: nn.Module = self.network.get_decoder()
        self._head: nn.Module = self.network.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def vocab_size(self) -> int:
        return int(self.network.config.vocab_size)

    @property
    def layers(self) -> int:
        return int(self.network.config.num_hidden_layers)

    @property
    def max_positions(self) -> int:
        """Longest row; within a sliding window, where there is one, attention is the ordinary one."""
        config = self.network.config
        return min(config.max_position_embeddings, getattr(config, "sliding_window", None) or sys.maxsize)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """End tokens: those of the generation config and the tokenizer's own."""
        listed = self.network.generation_config.eos_token_id
        ids = listed if isinstance(listed, list) else [listed]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def hidden(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        """[N, hidden] after the last layer, for a line of tokens."""
        out = self._decoder(
            input_ids=tokens_N[None], position_ids=position_N[None], use_cache=False, layout=layout
        )
        return out.last_hidden_state[0]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] in float32."""
        return self._head(hidden_NH).float()

    def base(self) -> AbstractContextManager[None]:
        """The model without its adapter, while inside; only for models that have one."""
        assert isinstance(self.module, PeftModel)
        return self.module.disable_adapter()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Weights, config and tokenizer as a Hugging Face folder; of a model with adapter, the adapter's folder."""
        self.module.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    def save_merged(self, folder: Path) -> None:
        """An ordinary Hugging Face folder, any adapter merged into the weights."""
        if not isinstance(self.module, PeftModel):
            return self.save(folder)
        self.module.merge_adapter()
        try:
            merged = {
                name.replace(".base_layer.", "."): tensor
                for name, tensor in self.network.state_dict().items()
                if ".lora_" not in name
            }
            self.network.save_pretrained(folder, state_dict=merged, safe_serialization=True)
        finally:
            self.module.unmerge_adapter()
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def check_forward(self) -> None:
        """Decoder plus head must be the model's own forward; some architectures do more to their logits."""
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
            raise ConfigError(
                f"model.path={self.source}: {type(self.network).__name__} changes its logits after the output head "
                "(soft-capping or scaling), which is not supported; use a Qwen2, Qwen2.5, Qwen3 or Llama model"
            )
