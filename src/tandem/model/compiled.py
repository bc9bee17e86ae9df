"""`torch.compile` for the parts of a layer that are chains of small operations."""

from tandem.model.language_model import LanguageModel


def compile_blocks(model: LanguageModel, backend: str = "inductor") -> int:
    """Compile norms and feed-forward blocks in place, for any number of tokens; returns how many there are.

    Attention stays as it is: its shapes change with every batch. Compilation itself happens at the first call.
    """
    blocks = [
        block
        for layer in model.decoder.layers
        for block in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)
    ]
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)
