"""What a training step holds in a GPU's memory, without a GPU: train.py's own step on fake tensors.

    python -m experiments.cost.memory            writes experiments/cost/results/memory.json and memory.md
    python -m experiments.cost.memory forward    one forward on a fake CPU and, with a torch that is
                                            built for CUDA, a fake GPU: memory_forward.json

Builds Stable Diffusion 3.5 Medium, its three text encoders and its VAE of fake tensors, which have
shapes and no values, and runs a step by train.py's functions: images and prompts encoded, the SOAR
terms with their backwards, clipping, AdamW. torch's MemTracker counts what is alive. What that
cannot show: CUDA's context (0.5 GB or so), what the allocator reserves beyond what is used, nccl's
buffers, and workspaces of cuBLAS and cuDNN.

The tensors are on a fake CPU, as torch takes no backward on a fake GPU where there is no real one.
Two things differ there. Autocast on CUDA keeps layer norms in float32: cuda_autocast does the same,
and `forward` shows that with it a forward leaves the same bytes as on a fake GPU. DDP is written in
C++ and takes no fake tensors: in its place gradients are there from the start, as its buckets are,
and the process group is torch's fake one.
"""

import contextlib
import json
import platform
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import soar
import train
from experiments.cost.rehearsal import ROOT, parts, write_tokenizers
from sample import encode_images, encode_prompts, save_whole, seeded
from soar import SoarConfig, draw, soar_terms

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
NOTES = (
    "Computed: by `python -m experiments.cost.step_cost fit`, whose autocast is a CPU's: to be compared",
    "with the column before it. The first column has CUDA's autocast, which keeps layer norms in",
    "float32. Activations include temporaries of the backward, and with LoRA what is cast of it.",
)


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["ladder", "forward"], tyro.conf.Positional] = "ladder"
    batch_size: int = 4
    """Images per GPU."""
    num_aux_points: int = 1
    """N. One graph is alive at a time, so more points change nothing, and take longer."""
    blocks: int | None = None
    """Blocks per network, of a few channels, at 64 x 64 pixels; by default all, of their real
    size, at 512 x 512."""
    output_dir: Path = RESULTS
    """Where the results are written."""


@dataclass(frozen=True)
class Way:
    """A row: train.py's flags that change memory."""

    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    encoders_on_cpu: bool = False

    @property
    def flags(self) -> str:
        words = ["--gradient_checkpointing"] * self.gradient_checkpointing
        words += [f"--lora_rank {self.lora_rank}"] if self.lora_rank else []
        words += ["--text_encoder_device cpu"] * self.encoders_on_cpu
        return " ".join(words) or "as is"


WAYS = [
    Way(),
    Way(gradient_checkpointing=True),
    Way(gradient_checkpointing=True, encoders_on_cpu=True),
    Way(lora_rank=16),
    Way(gradient_checkpointing=True, lora_rank=16),
    Way(gradient_checkpointing=True, lora_rank=16, encoders_on_cpu=True),
]


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


class Copies(TorchDispatchMode):
    """Bytes of copies of parameters in another dtype, as autocast makes them: now, at their peak,
    and of all that were made."""

    def __init__(self, parameters: Iterator[Tensor]):
        super().__init__()
        self.parameters = {x.untyped_storage()._cdata for x in parameters}
        self.now = self.peak = self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            if args[0].untyped_storage()._cdata in self.parameters:
                storage = made.untyped_storage()
                self.now += storage.nbytes()
                self.made += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return made

    def freed(self, size: int) -> None:
        self.now -= size


class Plain(torch.nn.Module):
    """What train.py calls of DDP."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def no_sync(self):
        return contextlib.nullcontext()


def to_fake(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device fake weights on device: what is trained in float32, the rest
    in dtype. What torch has for that, Module.to, does not take fake tensors."""
    made = {}
    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            if x not in made:  # tied ones stay tied
                own = torch.float32 if x.requires_grad else dtype
                fake = torch.empty(x.shape, dtype=own, device=device)
                made[x] = torch.nn.Parameter(fake, x.requires_grad)
            setattr(module, name, made[x])
        for name, x in module.named_buffers(recurse=False):
            own = dtype if x.is_floating_point() else x.dtype
            setattr(module, name, torch.empty(x.shape, dtype=own, device=device))


def empty_models(blocks: int | None) -> dict[str, torch.nn.Module]:
    """The pipeline's models on the meta device, frozen, by name."""
    models = {}
    for part in parts(blocks):
        with torch.device("meta"):
            if part.kind is CLIPTextModelWithProjection:
                model = part.kind(CLIPTextConfig(**part.config))
            elif part.kind is T5EncoderModel:
                model = part.kind(T5Config(**part.config))
            else:
                model = part.kind(**part.config)
        models[part.name] = model.requires_grad_(False).eval()
    return models


def empty_pipeline(models: dict[str, torch.nn.Module]) -> StableDiffusion3Pipeline:
    """A pipeline of models, with rehearsal's tokenizers."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(Path(folder))
        return StableDiffusion3Pipeline(
            transformer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=CLIPTokenizer.from_pretrained(f"{folder}/tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(f"{folder}/tokenizer_2"),
            tokenizer_3=T5TokenizerFast.from_pretrained(f"{folder}/tokenizer_3"),
            **models,
        )


def load(args: Args, way: Way):
    """What train.set_up loads: (pipe, transformer, optimizer), with gradients as DDP has them,
    and moments as after a step."""
    with unset_fake_temporarily():
        models = empty_models(args.blocks)
        transformer = models.pop("transformer").train()
        pipe = empty_pipeline(models)
        if way.lora_rank:
            with torch.device("meta"):
                train.add_lora(transformer, way.lora_rank, 0)
        else:
            transformer.requires_grad_(True)
    for name, model in models.items():
        to_fake(model, torch.float32 if name == "vae" else torch.bfloat16, CPU)
    to_fake(transformer, torch.bfloat16 if way.lora_rank else torch.float32, CPU)
    if way.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    trained = train.trained(transformer)
    for x in trained.values():
        x.grad = torch.zeros_like(x)
    optimizer = train.make_optimizer(train.TrainingConfig(), trained, None)
    optimizer.step()  # the first makes AdamW's moments
    return pipe, transformer, optimizer


def step(args: Args, way: Way, tracker: Tracker) -> tuple[Copies, int, int]:
    """A step as train.train takes it, on fake tensors. Returns the copies of weights, the count of
    trained parameters, and the bytes of the text encoders."""
    config = SoarConfig(num_aux_points=args.num_aux_points)
    pipe, transformer, optimizer = load(args, way)
    ddp = Plain(transformer)
    velocity = train.make_velocity(ddp, CPU, True)
    side = 512 if args.blocks is None else 64
    shape = (args.batch_size, 16, side // 8, side // 8)
    draws = draw(shape, config, seeded("memory"))
    pixels = torch.zeros(args.batch_size, 3, side, side)
    noise = torch.zeros(shape)
    texts = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    parameters = list(train.trained(transformer).values())
    tracker.track_external(transformer, optimizer, pipe.vae, *texts)
    with tracker, Copies(transformer.parameters()) as copies:
        uncond = encode_prompts(pipe, [""] * args.batch_size, 77)
        sums = train.zero_sums(CPU)
        z0 = encode_images(pipe, pixels, noise)
        cond = encode_prompts(pipe, ["picture"] * args.batch_size, 77)
        terms = soar_terms(velocity, z0, draws, cond, uncond, config, normalizer=1.0)
        train.backward(terms, config.num_terms, ddp, sums, True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    encoders = sum(x.nbytes for model in texts for x in model.parameters())
    return copies, sum(x.numel() for x in parameters), encoders


@contextlib.contextmanager
def faked() -> Iterator[None]:
    """Fake tensors and a fake process group; what asks for values or a real GPU is left out."""
    with contextlib.ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        stack.callback(dist.destroy_process_group)
        unchecked = mock.patch.object(soar, "_checked_draws", lambda draws, z0, config: draws)
        stack.enter_context(unchecked)
        stack.enter_context(FakeTensorMode())
        yield


def measure(args: Args, way: Way, rules: contextlib.AbstractContextManager) -> dict:
    """Peak bytes while a step runs, in all and by what they are. rules: of autocast."""
    tracker = Tracker()
    with faked(), rules:
        copies, trained, encoders = step(args, way, tracker)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    found = {str(getattr(key, "value", key)): size for key, size in peak.items()}
    if way.encoders_on_cpu:  # one device stands for both
        found["Parameter"] -= encoders
        found["Total"] -= encoders
    row = {"flags": way.flags, "trained": trained, "total": found["Total"]}
    row["weights"] = found["Parameter"] + found["Buffer"]
    row["bf16_copies"] = copies.peak
    row["casts_per_step"] = copies.made
    row["gradients"] = found["Gradient"]
    row["moments"] = found["Optstate"]
    row["activations"] = found["Activation"] + found["Temp"] - copies.peak
    row["rest"] = found["Other"]
    return row


def as_table(made: dict) -> str:
    """Markdown, in GB."""
    parts = ("weights", "bf16_copies", "gradients", "moments", "activations", "rest")
    names = ("total", *parts, "cpu_autocast", "computed")
    where = f"{made['date']}, commit {made['commit']}, torch {made['torch']}"
    size = f"{made['batch_size']} images, N = {made['num_aux_points']}"
    lines = [f"{where}, {size}; GB (10^9 bytes) at the peak.", ""]
    lines += ["| flags | " + " | ".join(names).replace("_", " ") + " | total / computed |"]
    lines += ["| --- |" + " ---: |" * (len(names) + 1)]
    for row in made["rows"]:
        cells = [f"{row[name] / 1e9:.2f}" if name in row else "" for name in names]
        ratio = f"{row['total'] / row['computed']:.3f}" if "computed" in row else ""
        lines.append(f"| `{row['flags']}` | " + " | ".join([*cells, ratio]) + " |")
    lines += ["", *NOTES]
    return "\n".join(lines) + "\n"


def computed_totals() -> dict[str, float]:
    """Bytes by flags, of step_cost_fit.json."""
    ladder = json.loads((RESULTS / "step_cost_fit.json").read_text())["fit"]["ladder"]
    return {row["flags"]: 1e9 * row["total_gb"] for row in ladder}


def ladder(args: Args) -> list[dict]:
    """A row per way: with CUDA's autocast, the total with a CPU's, and the one computed."""
    computed = computed_totals() if args.blocks is None else {}
    rows = []
    for way in WAYS:
        row = measure(args, way, cuda_autocast())
        row["cpu_autocast"] = measure(args, way, contextlib.nullcontext())["total"]
        if way.flags in computed:
            row["computed"] = computed[way.flags]
        rows.append(row)
        shown = [f"{key} {x / 1e9:.2f}" for key, x in row.items() if key != "flags"]
        print(f"{way.flags}: {', '.join(shown)}", flush=True)
    return rows


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **_) -> Tensor:
    """F.scaled_dot_product_attention as on a GPU in bf16; there it depends on the GPU."""
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q, k, v, dropout_p, is_causal)[0]


def left_by_forward(args: Args, device: torch.device) -> int:
    """Bytes alive after a forward in autocast: activations and bf16 copies of the weights."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            common = torch.cuda.amp.common  # else autocast turns itself off without a GPU
            for owner, name, value in (
                (common, "amp_definitely_not_available", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda: True),
                (F, "scaled_dot_product_attention", flash_attention),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
        transformer = empty_models(args.blocks)["transformer"].requires_grad_(True).train()
        config = transformer.config
        stack.enter_context(FakeTensorMode())
        to_fake(transformer, torch.float32, device)
        side = 64 if args.blocks is None else 8
        b, bf16 = args.batch_size, {"dtype": torch.bfloat16, "device": device}
        z = torch.empty(b, 16, side, side, device=device)
        cond = {
            "encoder_hidden_states": torch.empty(b, 154, config.joint_attention_dim, **bf16),
            "pooled_projections": torch.empty(b, config.pooled_projection_dim, **bf16),
        }
        sigma = torch.empty(b, device=device)
        tracker = Tracker()
        tracker.track_external(transformer, z, sigma, *cond.values())
        before = sum(x["Total"] for x in tracker.get_tracker_snapshot().values())
        stack.enter_context(tracker)
        stack.enter_context(torch.autocast(device.type, enabled=False))  # keeps the copies
        v = train.make_velocity(transformer, device, True)(z, sigma, cond)
        after = sum(x["Total"] for x in tracker.get_tracker_snapshot().values())
        del v
        return after - before


def forward(args: Args) -> dict[str, int]:
    """left_by_forward by device and rules of autocast."""
    found = {"fake CPU": left_by_forward(args, CPU)}
    with cuda_autocast():
        found["fake CPU, layer norms in float32"] = left_by_forward(args, CPU)
    if torch.version.cuda:
        found["fake GPU"] = left_by_forward(args, torch.device("cuda"))
    for name, size in found.items():
        print(f"{size:15,d} bytes after a forward: {name}", flush=True)
    return found


def main(args: Args) -> None:
    made = {"ladder": ladder, "forward": forward}[args.what](args)
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    made = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": commit,
        "torch": torch.__version__, "python": platform.python_version(),
        "batch_size": args.batch_size, "num_aux_points": args.num_aux_points, "rows": made,
    }  # fmt: skip
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = {"ladder": "memory", "forward": "memory_forward"}[args.what]
    save_whole(json.dumps(made, indent=1) + "\n", args.output_dir / f"{name}.json")
    if args.what == "ladder":
        save_whole(as_table(made), args.output_dir / "memory.md")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
