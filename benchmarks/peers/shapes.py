"""The models: Llama configurations with random weights, and how much memory a step of a method is expected to take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama configuration.

    Attributes:
        steps: training steps of a run, unless the command line says otherwise; the first one is reported apart.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    steps: int = 3

    @property
    def largest(self) -> int:
        """Elements of the largest matrix."""
        return max(self.vocab, self.intermediate) * self.hidden

    @property
    def num_parameters(self) -> int:
        kv = self.hidden * self.kv_heads // self.heads
        layer = 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def num_tensors(self) -> int:
        return 9 * self.layers + (2 if self.tied else 3)


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 160, 1000, tied=True),
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152, tied=True, steps=6),
    "tinyllama": Shape(2048, 22, 32, 4, 5632, 32000, tied=False),
    # More parameters; 0.1B is smollm2 and 1.1B is tinyllama.
    "0.4b": Shape(960, 32, 15, 5, 2560, 49152, tied=True),
    "3b": Shape(3200, 26, 32, 32, 8640, 32000, tied=False, steps=2),
    "7b": Shape(4096, 32, 32, 32, 11008, 32000, tied=False, steps=1),
    # About 0.1 B parameters, cut into more and more layers.
    "layers-8": Shape(1024, 8, 16, 16, 2816, 1000, tied=False),
    "layers-32": Shape(512, 32, 8, 8, 1408, 1000, tied=False),
    "layers-128": Shape(256, 128, 4, 4, 704, 1000, tied=False),
    "layers-512": Shape(128, 512, 2, 2, 352, 1000, tied=False),
}
# What grows: (model, batch size, tokens a sequence).
GROWTH = {
    "parameters": [(name, 1, 64) for name in ("smollm2", "0.4b", "tinyllama", "3b", "7b")],
    "tokens": [("smollm2", batch_size, 128) for batch_size in (2, 8, 32)],
    "tensors": [(f"layers-{count}", 4, 64) for count in (8, 32, 128, 512)],
}
LIBRARIES = 0.7e9  # bytes of an interpreter with everything imported, at most


def needed_bytes(shape: Shape, tokens: int, element_bytes: int, extra_bytes: float) -> float:
    """A rough count of what a run takes, to refuse those that cannot fit; never reported as a measurement.

    Args:
        shape: of the model.
        tokens: in a step.
        element_bytes: of a weight.
        extra_bytes: for every parameter besides its weight: gradients and states that exist together.
    """
    per_parameter = shape.num_parameters * (element_bytes + extra_bytes)
    kept = tokens * shape.hidden * shape.layers * element_bytes
    one_layer = tokens * (12 * shape.hidden + 6 * shape.intermediate) * element_bytes
    logits = tokens * shape.vocab * (element_bytes + 12)
    one_matrix = shape.largest * 8
    return LIBRARIES + per_parameter + kept + one_layer + max(logits, one_matrix)


def build(shape: Shape, dtype: str) -> Any:
    """The model in training mode, with random weights that were written once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate, vocab_size=shape.vocab, tie_word_embeddings=shape.tied, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, dtype))
    with no_init_weights():
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.uniform_(-0.03, 0.03)
            else:
                param.fill_(1.0)
    return model.train()
