"""lowtide: fine-tune every parameter of a large language model on the machine you have.

optimizer = lowtide.AdaLomo(model.parameters(), lr=5e-4)
engine = lowtide.fuse(model, optimizer)
for batch in loader:
    loss = model(**batch).loss
    engine.backward(loss)  # every parameter is updated as its gradient completes
    optimizer.step(); scheduler.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fused import LossScale
    from .fusing import Engine, fuse
    from .optim import AdaLomo, Lomo, PerParameter
    from .sharding import shard

__version__ = "0.1.0"
__all__ = ["AdaLomo", "Engine", "Lomo", "LossScale", "PerParameter", "__version__", "fuse", "shard"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `lowtide --help` should not wait for torch.
    if name in ("fuse", "Engine"):
        from .fusing import Engine, fuse

        globals().update(fuse=fuse, Engine=Engine)
    elif name == "shard":
        from .sharding import shard

        globals().update(shard=shard)
    elif name == "LossScale":
        from .fused import LossScale

        globals().update(LossScale=LossScale)
    elif name in ("AdaLomo", "Lomo", "PerParameter"):
        from . import optim

        globals().update({public: getattr(optim, public) for public in ("AdaLomo", "Lomo", "PerParameter")})
    else:
        raise AttributeError(f"module 'lowtide' has no attribute {name!r}")
    return globals()[name]
