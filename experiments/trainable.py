"""What train.py trains: all weights, or LoRA matrices beside them; AdamW, whole on every rank or in shares."""

import math
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from experiments.sd3 import seeded

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for a parameter
LORA = "pytorch_lora_weights.safetensors"
LORA_MODULES = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()


def add_lora(transformer: SD3Transformer2DModel, rank: int) -> None:
    """Freeze all weights and put matrices A and B of this rank, alpha = rank, beside those of every attention."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_MODULES))


def load_trainable(args, checkpoint: Path | None, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
    """The transformer of checkpoint, or else of the pipeline, on device; what requires gradients is float32: all of it,
    or with --lora_rank the matrices, B zero and A as peft draws it, from (seed, name), the rest then being in dtype."""
    source = checkpoint if checkpoint and not args.lora_rank else args.pretrained_model_name_or_path
    options = {"dtype": dtype if args.lora_rank else torch.float32, "use_safetensors": True}
    transformer = SD3Transformer2DModel.from_pretrained(source, subfolder="transformer", **options)
    if args.lora_rank:
        add_lora(transformer, args.lora_rank)
        for name, parameter in trained(transformer).items():
            parameter.data = torch.zeros(parameter.shape)
            if "lora_A" in name:
                torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=seeded(args.seed, name))
        if checkpoint:
            weights = {key.removeprefix("transformer."): x for key, x in load_file(checkpoint / LORA).items()}
            set_peft_model_state_dict(transformer, weights)
    return transformer.to(device).train()


def compile_blocks(transformer: SD3Transformer2DModel) -> None:
    """torch.compile each block, on first use: one graph for each kind of block, with gradients and without."""
    # Or every graph would be cut at the borders of DDP's buckets, so that all-reduces start early: blocks do for that.
    torch._dynamo.config.optimize_ddp = False
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def make_ddp(transformer: SD3Transformer2DModel, gradient_as_bucket_view: bool = True) -> DistributedDataParallel:
    """DDP; buffers are constants, so they are not sent before each forward (SD3.5's positions are 0.9 GB)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13's name for broadcast_buffers, which 2.9 lacks
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": gradient_as_bucket_view}
        return DistributedDataParallel(transformer, **options)


def trained(transformer: SD3Transformer2DModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: x for name, x in transformer.named_parameters() if x.requires_grad}


def make_optimizer(args, parameters: dict[str, torch.nn.Parameter], checkpoint: Path | None):
    """AdamW over parameters, its moments those of checkpoint; with --shard_optimizer inside ZeroRedundancyOptimizer."""
    # Fused: the kernel that leaves weights and moments alone where found_inf is set, with no wait for the device.
    options = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay, "fused": True}
    if args.shard_optimizer:
        optimizer = ZeroRedundancyOptimizer(parameters.values(), torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(parameters.values(), **options)
    if checkpoint:
        adamw, names = local(optimizer), {parameter: name for name, parameter in parameters.items()}
        with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
            own = enumerate(adamw.param_groups[0]["params"])
            state = {i: {key: file.get_tensor(f"{names[x]}.{key}") for key in MOMENTS} for i, x in own}
        adamw.load_state_dict(adamw.state_dict() | {"state": state})
    return optimizer


def local(optimizer: torch.optim.Optimizer) -> torch.optim.AdamW:
    """The AdamW that updates this rank's parameters: all of them, or a share."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def moments(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as NAME.KEY: tensor, the same sharded or not. All ranks call it; only rank 0's result is whole."""
    state = local(optimizer).state
    found = {f"{name}.{key}": x for name, p in parameters.items() for key, x in state.get(p, {}).items()}
    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return found
    whole = {}
    for name, parameter in parameters.items():
        for key in (f"{name}.{key}" for key in MOMENTS):
            empty = parameter.new_zeros(() if key.endswith(".step") else parameter.shape)
            x = found[key].clone() if key in found else empty  # 0 on all ranks but the one that has it
            dist.reduce(x, 0)
            whole |= {key: x.cpu()} if dist.get_rank() == 0 else {}
    return whole
