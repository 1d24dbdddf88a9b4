"""stages.train under FSDP on CPUs, where torch can do it and accelerate does not ask for it."""

import runpy
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

initialise = AcceleratorState.__init__


def initialise_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = initialise_sharded  # type: ignore[method-assign]
runpy.run_module("stages.train", run_name="__main__", alter_sys=True)
