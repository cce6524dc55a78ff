"""What a training step holds in a GPU's memory, and how long runs take, without a GPU: train.py's
own step on fake tensors. `python -m experiments.cost.step_cost fit` prints and writes it.

Builds Stable Diffusion 3.5 Medium, its three text encoders and its VAE of fake tensors, which have
shapes and no values, and runs a step by train.py's functions: images and prompts encoded, the SOAR
terms with their backwards, clipping, AdamW. torch's MemTracker counts what is alive. What that
cannot show: CUDA's context (0.5 GB or so), what the allocator reserves beyond what is used, nccl's
buffers, and workspaces of cuBLAS and cuDNN.

The tensors are on a fake CPU, as torch takes no backward on a fake GPU where there is no real one.
Two things differ there. Autocast on CUDA keeps layer norms in float32: cuda_autocast does the same.
DDP is written in C++ and takes no fake tensors: in its place gradients are there from the start, as
its buckets are, and the process group is torch's fake one.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import soar
import train
from experiments.cost.rehearsal import empty_pipeline
from experiments.environment import markdown
from sample import ENCODERS, encode_images, encode_prompts, seeded
from soar import SoarConfig, draw, soar_terms

CPU = torch.device("cpu")
for end in ("", "_backward"):  # torch alone does not count a CPU's attention
    gpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{end}")
    cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")
    flop_registry[cpu] = flop_registry[gpu]

CHECKPOINTING, ON_CPU = {"checkpointing": True}, {"encoders_on_cpu": True}
LORA = {"lora_rank": 16}
WAYS = {  # train.py's flags: what measure takes
    "none": {},
    "--gradient_checkpointing": CHECKPOINTING,
    "--gradient_checkpointing --text_encoder_device cpu": CHECKPOINTING | ON_CPU,
    "the same and --train_batch_size 1": CHECKPOINTING | ON_CPU | {"images": 1},
    "--lora_rank 16": LORA,
    "--lora_rank 16 --gradient_checkpointing": LORA | CHECKPOINTING,
    "--lora_rank 16 --gradient_checkpointing --text_encoder_device cpu":
        LORA | CHECKPOINTING | ON_CPU,
}  # fmt: skip


def cuda_autocast() -> contextlib.AbstractContextManager:
    """In a CPU's autocast, layer norms in float32, as in CUDA's (ATen/autocast_mode.h)."""
    own = F.layer_norm

    def layer_norm(x: Tensor, *args) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x, *args = (y.float() if isinstance(y, Tensor) else y for y in (x, *args))
        return own(x, *args)

    return mock.patch.object(F, "layer_norm", layer_norm)


class Tracker(MemTracker):
    """MemTracker without its figures per module, which it has for one forward per step only."""

    def no_hook(self, *args) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = no_hook


def peak_of(tracker: Tracker) -> dict[str, int]:
    """Bytes at the peak: "Total", and by what they are."""
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(key, "value", key)): size for key, size in peak.items()}


def flops(action: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention, both passes."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


# --- A step on fake tensors ---------------------------------------------------------------------


def to_fake(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device fake weights: what is trained in float32, the rest in dtype.
    What torch has for that, Module.to, does not take fake tensors."""
    made = {}
    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            if x not in made:  # tied ones stay tied
                fake = torch.empty(x.shape, dtype=torch.float32 if x.requires_grad else dtype)
                made[x] = torch.nn.Parameter(fake, x.requires_grad)
            setattr(module, name, made[x])
        for name, x in module.named_buffers(recurse=False):
            own = dtype if x.is_floating_point() else x.dtype
            setattr(module, name, torch.empty(x.shape, dtype=own))


def load(checkpointing: bool, lora_rank: int | None, blocks: int | None):
    """What train.set_up loads: (pipe, optimizer), with gradients as DDP has them, and moments as
    after a step."""
    with unset_fake_temporarily():
        pipe = empty_pipeline(blocks)
        transformer = pipe.transformer.train()
        frozen = {name: getattr(pipe, name).eval() for name in ("vae", *ENCODERS)}
        if lora_rank:
            with torch.device("meta"):
                train.add_lora(transformer, lora_rank, 0)
    for name, model in frozen.items():
        to_fake(model.requires_grad_(False), torch.float32 if name == "vae" else torch.bfloat16)
    to_fake(transformer, torch.bfloat16 if lora_rank else torch.float32)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    trained = train.trained(transformer)
    for x in trained.values():
        x.grad = torch.zeros_like(x)
    optimizer = train.make_optimizer(train.TrainingConfig(), trained, None)
    optimizer.step()  # the first makes AdamW's moments
    return pipe, optimizer


@contextlib.contextmanager
def faked() -> Iterator[None]:
    """Fake tensors and a fake process group; what asks for values or a real GPU is left out."""
    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
            stack.callback(dist.destroy_process_group)
        unchecked = mock.patch.object(soar, "_checked_draws", lambda draws, z0, config: draws)
        stack.enter_context(unchecked)
        stack.enter_context(FakeTensorMode())
        yield


def measure(
    checkpointing: bool = False, lora_rank: int | None = None, encoders_on_cpu: bool = False,
    images: int = 4, blocks: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Peak bytes while train.train takes a step, in all and by what they are. N is 1: one graph is
    alive at a time, so more points change nothing. blocks: per network, of a few channels, at
    64 x 64 pixels; by default all, of their real size, at 512 x 512."""
    config, side = SoarConfig(num_aux_points=1), 512 if blocks is None else 64
    tracker, shape = Tracker(), (images, 16, side // 8, side // 8)
    with faked(), cuda_autocast():
        pipe, optimizer = load(checkpointing, lora_rank, blocks)
        velocity = train.make_velocity(pipe.transformer, CPU, True)
        draws = draw(shape, config, seeded("memory"))
        pixels, noise = torch.zeros(images, 3, side, side), torch.zeros(shape)
        texts = [getattr(pipe, name) for name in ENCODERS]
        ddp = SimpleNamespace(no_sync=contextlib.nullcontext)
        parameters = list(train.trained(pipe.transformer).values())
        tracker.track_external(pipe.transformer, optimizer, pipe.vae, *texts)
        with tracker:
            uncond = encode_prompts(pipe, [""] * images, 77)
            sums = train.zero_sums(CPU)
            z0 = encode_images(pipe, pixels, noise)
            cond = encode_prompts(pipe, ["picture"] * images, 77)
            terms = soar_terms(velocity, z0, draws, cond, uncond, config, normalizer=1.0)
            train.backward(terms, config.num_terms, ddp, sums, last=True)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    found = peak_of(tracker)
    if encoders_on_cpu:  # one device stands for both
        encoders = sum(x.nbytes for model in texts for x in model.parameters())
        found["Parameter"] -= encoders
        found["Total"] -= encoders
    return {
        "trained": sum(x.numel() for x in parameters),
        "total": found["Total"],
        "weights": found["Parameter"] + found["Buffer"],
        "gradients": found["Gradient"],
        "moments": found["Optstate"],
        "activations": found["Activation"] + found["Temp"] + found["Other"],  # and bf16 copies
    }


# --- What fits, and hours -----------------------------------------------------------------------


def forward_flops() -> dict[str, float]:
    """TFLOP for an image of 512 x 512 and its caption of 77 tokens: a forward of the transformer,
    the text encoders, the VAE's encoder."""
    with faked(), torch.no_grad():
        latents, level, pixels = map(torch.zeros, ((1, 16, 64, 64), (1,), (1, 3, 512, 512)))
        pipe, _ = load(False, None, None)
        velocity = train.make_velocity(pipe.transformer, CPU, True)
        cond = {}
        texts = flops(lambda: cond.update(encode_prompts(pipe, ["picture"], 77)))
        found = {
            "transformer": flops(lambda: velocity(latents, level, cond)),
            "text encoders": texts,
            "VAE": flops(lambda: encode_images(pipe, pixels, latents)),
        }
    return {name: x / 1e12 for name, x in found.items()}


def hours(tflop: dict[str, float]) -> dict[str, float]:
    """Of runs on 8 H100 at 40 % of their peak: 989 TFLOP a second in bf16, and 495 in TF32, in
    which torch's float32 convolutions run, so the VAE. tflop: of forward_flops."""
    runs = {
        "SOAR, 5,000 steps of 32": (22, 32 * 5000),
        "SOAR, N = 1, 5,000 steps of 32": (7, 32 * 5000),
        "SFT, 5,000 steps of 32": (3, 32 * 5000),
        "SOAR, 10,000 steps of 512": (22, 512 * 10_000),
    }
    found = {}
    for name, (forwards, images) in runs.items():
        seconds = (forwards * tflop["transformer"] + tflop["text encoders"]) / 989
        seconds += tflop["VAE"] / 495
        found[name] = images * seconds / (0.4 * 8) / 3600
    return found


def as_table(memory: dict[str, dict[str, int]]) -> str:
    lines = [["flags", "GB per GPU"]]
    for flags, row in memory.items():
        lines.append([re.sub("--.*", r"`\g<0>`", flags), f"{row['total'] / 1e9:.1f}"])
    return markdown(lines)


def fit() -> dict:
    memory = {flags: measure(**way) for flags, way in WAYS.items()}
    print(as_table(memory), end="")
    tflop = forward_flops()
    print(", ".join(f"{name} {x:.2f} TFLOP" for name, x in tflop.items()))
    print("on 8 H100 at 40 % of their peak, hours:")
    for name, x in hours(tflop).items():
        print(f"{x:.2f}, {name}")
    return {"memory": memory, "forward_tflop": tflop, "hours": hours(tflop)}
