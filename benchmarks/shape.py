"""Shapes of the Qwen2 models that are raced, and the folder of weights that every contender loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

PAD = 0
"""Pads rows."""
FIRST_WORD = 257
"""After the pad token and the bytes; prompts are made of words."""
SPACE = "\u0120"
"""How byte-level tokenizers write the space that begins a word."""
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Qwen2 with tied embeddings; weights are random, for speed does not depend on their values."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    dtype: str = "fp32"
    positions: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def block_parameters(self) -> int:
        """Matrix weights of the layers, without embedding and head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied by: layers and output head."""
        return self.block_parameters + self.vocab * self.hidden

    def write(self, folder: Path, seed: int = 0) -> None:
        """A Hugging Face folder with random weights and a tokenizer."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
        tokenizer(self.vocab).save_pretrained(folder)


def small(hidden: int, layers: int, vocab: int = 2048) -> Shape:
    """Heads of 64, half as many key heads, four times the width inside: 4.5 M parameters at 256 x 4."""
    heads = max(2, hidden // 64)
    return Shape(
        name=str(hidden),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        intermediate=4 * hidden,
        vocab=vocab,
    )


def tokenizer(vocab: int) -> "Qwen2Tokenizer":
    """A Qwen2 tokenizer in which every id from FIRST_WORD on is a word, so that texts and ids say the same thing.

    Its end token is an id past the network's last row: it cannot be sampled, so answers have the length asked for.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    words = [word(i) for i in range(FIRST_WORD, vocab)]
    symbols = ["<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    # A word is its prefix and a letter; the prefix of a one-letter word is the space.
    merges = [(w[:-1], w[-1]) for w in words]
    return Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=merges,
        unk_token="<|pad|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
    )


def word(token: int) -> str:
    """Words in order of length, then of the alphabet, so that every prefix comes before what it begins."""
    left, letters = token - FIRST_WORD, ""
    length, count = 1, 26
    while left >= count:
        left -= count
        length, count = length + 1, count * 26
    for _ in range(length):
        left, letter = divmod(left, 26)
        letters = chr(ord("a") + letter) + letters
    return SPACE + letters


def text(tokens: list[int]) -> str:
    """The text that the tokenizer reads as these ids."""
    return "".join(map(word, tokens)).replace(SPACE, " ")


QWEN = {
    "qwen2.5-0.5b": Shape(
        name="qwen2.5-0.5b",
        hidden=896,
        layers=24,
        heads=14,
        kv_heads=2,
        intermediate=4864,
        vocab=151936,
        dtype="bf16",
    ),
    "qwen2.5-1.5b": Shape(
        name="qwen2.5-1.5b",
        hidden=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        intermediate=8960,
        vocab=151936,
        dtype="bf16",
    ),
}
