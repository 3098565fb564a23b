"""The vocabulary matrices of a fused Hugging Face model: which of them give their gradients in slices.

The head is the largest gradient of a small model. In slices it costs nothing with a rule that walks over it once and an untied
embedding; with tied ones the logits are made once more where the batch touches many rows, because the embedding's part comes last; a rule that walks three times makes
the head's products three times. An embedding that is not tied costs less in rows than as a matrix.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..fused import Engine
from ..fused.embedding import EmbeddingForward, takes_embedding
from .chunked_loss import ChunkedLoss, HeadForward


class VocabularySlices:
    """Head and embedding of one model, whose gradients come in slices.

    Attributes:
        head: the head's gradient does.
        embedding: the embedding's does, or None.
    """

    def __init__(self) -> None:
        self.head = False
        self.embedding: EmbeddingForward | None = None

    @classmethod
    def install(
        cls, engine: Engine, model: Any, loss: ChunkedLoss | None, head: HeadForward | None, wanted: bool | None
    ) -> VocabularySlices:
        """Arrange it where it can be.

        Args:
            engine: of the model.
            model: a Hugging Face model, or any other: then nothing is done.
            loss: computes the head, or None if the model does it itself.
            head: the head's forward, where it is a block.
            wanted: None for the head if it costs one product of four at most; True in any case where it can be.
        """
        slices = cls()
        module = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        runner = None if module is None else engine.block_of(module)
        if isinstance(module, nn.Embedding) and takes_embedding(module, is_block=runner is not None):
            intake = engine.intake_of(module.weight, _num_places(model, module.weight))
            if intake is not None:
                slices.embedding = EmbeddingForward(module, intake, runner)
                slices.embedding.install()
        if loss is not None and (wanted or slices._is_cheap(engine, loss.head.weight)):
            loss.intake = engine.intake_of(loss.head.weight, _num_places(model, loss.head.weight))
            if head is not None:
                head.intake = loss.intake
            slices.head = loss.intake is not None
        return slices

    @staticmethod
    def _is_cheap(engine: Engine, weight: Tensor) -> bool:
        """One walk is enough, for the rule and for the norm."""
        walks = next(
            (o.num_slice_walks for o in engine.optimizers for g in o.param_groups for p in g["params"] if p is weight),
            0,
        )
        return walks == 1 and engine.adaptive is None and engine.loss_scale is None

    def remove(self) -> None:
        """The embedding's own forward again; the loss is removed by whoever installed it."""
        if self.embedding is not None:
            self.embedding.remove()
            self.embedding = None


def _num_places(model: nn.Module, weight: Tensor) -> int:
    """Modules that have it: their gradients come one after the other."""
    return sum(any(param is weight for param in module.parameters(recurse=False)) for module in model.modules())
