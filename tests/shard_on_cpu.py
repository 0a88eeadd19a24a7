"""Run a script with FSDP2 or DeepSpeed on CPUs: accelerate shards on accelerators only, though its code works there too.

python tests/shard_on_cpu.py SCRIPT [arguments]
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

from diffusers_hdit.training import trainer


def shard_on_cpu(state) -> None:
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        sharding, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    else:
        from deepspeed import comm

        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        sharding, plugin = DistributedType.DEEPSPEED, DeepSpeedPlugin()
        plugin._set_selected(True)
        plugin.set_mixed_precision(state.mixed_precision)
        state.deepspeed_plugins = {"default": plugin}
    PartialState().distributed_type = state.distributed_type = sharding


def adapt_plugins(accelerator, network, config, original=trainer.adapt_plugins) -> None:
    shard_on_cpu(accelerator.state)
    original(accelerator, network, config)


trainer.adapt_plugins = adapt_plugins
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
