"""FSDP on CPUs, to rehearse and to test with: Accelerate itself takes it on accelerators only."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import tools.many_gpus as many


def shard_on_cpus() -> None:
    """Let Accelerate shard over gloo, and let the page ask for it without a GPU.

    On CPUs `AcceleratorState` drops the plugin and trains with DDP, without a word. All the rest,
    from `fully_shard` to the sharded checkpoint, is the code that runs on GPUs.
    """
    make = AcceleratorState.__init__

    def make_sharded(self, *args, fsdp_plugin=None, **kwargs) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = make_sharded
    many.check_sharded = lambda profile: profile
