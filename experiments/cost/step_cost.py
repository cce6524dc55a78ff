"""What a training step costs: seconds, memory, operations; SFT, SOAR, and SOAR as the published code schedules it.

    python -m experiments.cost.step_cost --size small                       the table, on a CPU
    python -m experiments.cost.step_cost --size sd3.5-medium --device cuda
    python -m experiments.cost.step_cost options --size small               what was tried, one by one
    python -m experiments.cost.step_cost growth --size small                by batch, N, resolution, processes: a figure
    python -m experiments.cost.step_cost host                               what the host does between two steps
    python -m experiments.cost.step_cost fit          computed, not measured: what fits into which GPU

Weights are random, from the config: nothing is downloaded. A step is train.py's, by its own functions, from latents and
prompt embeddings on, so VAE and text encoders are left out. The learning rate is 0, so that all steps see the same
weights and must give the same losses and gradients, which is asserted. Ways alternate within a repeat, forth and back;
seconds are medians over the repeats, ratios medians of the ratios within a repeat. Written to experiments/cost/results,
as JSON.

Memory: on CUDA max_memory_allocated. On a CPU the peak of the resident set, in a process of its own for each way: what
weights, gradients and moments take (16 bytes per parameter) and by how much the third step exceeds that.
"""

import ctypes
import gc
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import datasets
import diffusers
import numpy as np
import torch
import torch.distributed as dist
import tyro
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import train
from sample import init_distributed, save_whole, seeded
from soar import (
    Draws,
    SoarConfig,
    Term,
    correction_target,
    draw,
    guided_velocity,
    interpolate,
    loss_normalizer,
    renoise,
    rollout_step,
    sigma_from_t,
    soar_terms,
)
from train import compile_blocks, make_ddp

RESULTS = Path(__file__).parent / "results"
SD3 = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "attention_head_dim": 64, "qk_norm": "rms_norm"}
SD3 |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "sample_size": 128, "pos_embed_max_size": 384}
WIDTHS = {"tiny": (2, 64, 1), "small": (8, 384, 2), "sd3.5-medium": (24, 1536, 13), "sd3.5-large": (38, 2432, 0)}
SIDES = {"tiny": 8, "small": 32, "sd3.5-medium": 64, "sd3.5-large": 64}  # of latents, an eighth of the image's
TOKENS = 154  # 77 of CLIP, 77 of T5


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["table", "options", "growth", "host", "fit", "one"], tyro.conf.Positional] = "table"
    """one: a single --way, as JSON; the others run it in processes of their own."""
    size: Literal["tiny", "small", "sd3.5-medium", "sd3.5-large"] = "small"
    """tiny: 2 blocks of width 64; small: 8 of width 384, 46 M parameters; the others as published."""
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: int = 5
    batch_size: int = 4
    side: int | None = None
    """Height and width of the latents, by default 8, 32, 64, 64."""
    num_aux_points: int = 6
    """N."""
    mixed_precision: Literal["bf16", "no"] | None = None
    """What forwards run in; by default no on a CPU, bf16 on CUDA."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: time of this process's threads, which other work on the machine disturbs less; not for CUDA."""
    compiled: bool = True
    """Have the compiled ways in the table."""
    way: str = "SOAR"
    """For one."""
    output_dir: Path = RESULTS
    """Where JSON and the figure are written."""

    def __post_init__(self):
        for name in ("repeats", "batch_size", "num_aux_points", "side"):
            value = getattr(self, name)
            if value is not None and value < (name != "num_aux_points"):
                raise ValueError(f"--{name} is {value}, expected at least {int(name != 'num_aux_points')}")
        if self.device == "cuda" and (self.clock == "cpu" or not torch.cuda.is_available()):
            raise ValueError("--device cuda: torch sees no GPU, or --clock is cpu, which does not see the GPU's time")

    @property
    def bf16(self) -> bool:
        return (self.mixed_precision or ("bf16" if self.device == "cuda" else "no")) == "bf16"


def config(size: str) -> dict:
    """Of SD3Transformer2DModel; SD3.5 Medium's and Large's are the published ones."""
    layers, width, dual = WIDTHS[size]
    own = {"num_layers": layers, "num_attention_heads": width // 64, "caption_projection_dim": width}
    own |= {"pos_embed_max_size": 192} if size == "sd3.5-large" else {}
    if size == "tiny":
        own |= {"joint_attention_dim": 64, "pooled_projection_dim": 64, "sample_size": 16, "pos_embed_max_size": 16}
    return SD3 | own | {"dual_attention_layers": tuple(range(dual))}


# --- Ways to take a step ----------------------------------------------------------------------------------------------


class Bench:
    """A model with random weights, an optimizer, and a batch of latents and embeddings; functions of args alone."""

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device, self.config = args, device, SoarConfig(num_aux_points=args.num_aux_points)
        fixed, b = seeded("step_cost"), args.batch_size
        self.shape = (b, 16, *[args.side or SIDES[args.size]] * 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.transformer = SD3Transformer2DModel(**config(args.size)).to(device).train()
        self.ddp = make_ddp(self.transformer)
        self.velocity = train.make_velocity(self.ddp, device, args.bf16)
        training = SimpleNamespace(max_grad_norm=math.inf, learning_rate=0.0)
        self.settings = SimpleNamespace(training=training)  # what train.update asks for
        self.optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=0.0, fused=True)
        self.step, self.lr_factor = 0, lambda step: 1.0
        like = {"generator": fixed, "dtype": torch.float32}
        shapes = {"encoder_hidden_states": (b, TOKENS, self.transformer.config.joint_attention_dim)}
        shapes |= {"pooled_projections": (b, self.transformer.config.pooled_projection_dim)}
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.cond, self.uncond = (
            {key: torch.randn(shape, **like).to(device, dtype) for key, shape in shapes.items()} for _ in range(2)
        )
        self.z0 = torch.randn(self.shape, **like).to(device)

    def draws(self, config: SoarConfig):
        """A step's draws on the device, and the normalizer of its loss."""
        draws = draw(self.shape, config, seeded("step_cost", "draws"))
        moved = Draws(*(x if x is None else x.to(self.device) for x in draws))
        return moved, loss_normalizer(draws.t, config).item()

    def take(self, gradients: Callable[["Bench", Tensor], None], checkpointing: bool = False) -> Tensor:
        """One training step, with train.py's own clipping, check and update: the sums of train.METRICS."""
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()
        sums = train.zero_sums(self.device)
        gradients(self, sums)
        train.update(self.settings, self, [], sums)
        return sums


def soar(bench: Bench, sums: Tensor, config: SoarConfig | None = None) -> None:
    """What train.py does: soar.py's terms, each with its backward."""
    config = config or bench.config
    draws, normalizer = bench.draws(config)
    terms = soar_terms(bench.velocity, bench.z0, draws, bench.cond, bench.uncond, config, normalizer=normalizer)
    train.backward(terms, config.num_terms, bench.ddp, sums, last=True)


def sft(bench: Bench, sums: Tensor) -> None:
    """The same with lambda = 0."""
    soar(bench, sums, replace(bench.config, lambda_aux=0.0))


def published(bench: Bench, sums: Tensor) -> None:
    """The same terms as the published code schedules them: the conditional forward twice, the rollout with a graph that
    is then detached, one backward through all N + 1 graphs. From its description; the arithmetic is soar.py's."""
    config, velocity, z0 = bench.config, bench.velocity, bench.z0
    draws, normalizer = bench.draws(config)
    t_next = (draws.t - 1 / config.num_sampling_steps).clamp(min=config.t_min)
    sigma, sigma_next = sigma_from_t(draws.t, config.shift), sigma_from_t(t_next, config.shift)
    z, terms, everyone = interpolate(z0, draws.z1, sigma), [], torch.ones_like(draws.t, dtype=torch.bool)

    def add(z: Tensor, target: Tensor, sigma: Tensor) -> None:
        error = ((velocity(z, sigma, bench.cond).float() - target) ** 2).mean((1, 2, 3))
        terms.append(Term(error.sum() / normalizer, error.detach(), sigma, everyone))

    add(z, draws.z1 - z0, sigma)
    v = guided_velocity(velocity(z, sigma, bench.uncond), velocity(z, sigma, bench.cond), config.guidance_scale)
    z_hat = rollout_step(z, v, sigma, sigma_next).detach()
    del v
    for u in draws.u[0]:
        sigma_aux = sigma_next + u * (1 - sigma_next)
        z_aux = renoise(z_hat, draws.z1, sigma_next, sigma_aux)
        add(z_aux, correction_target(z_aux, z0, sigma_aux), sigma_aux)
    sum(term.loss for term in terms).backward()
    for i, term in enumerate(terms):
        train.add_term(sums, term, auxiliary=i > 0)


WAYS = {  # name: gradients, with gradient checkpointing, compiled
    "SFT": (sft, False, False),
    "published": (published, False, False),
    "published, checkpointing": (published, True, False),
    "SOAR": (soar, False, False),
    "SFT, compiled": (sft, False, True),
    "SOAR, compiled": (soar, False, True),
}


def take_step(bench: Bench, way: str) -> Tensor:
    gradients, checkpointing, compiled = WAYS[way]
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        return bench.take(gradients, checkpointing)


# --- Measures ---------------------------------------------------------------------------------------------------------


def timed(bench: Bench, action: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds by --clock until the device is done, and what action returned."""
    clock = time.process_time if bench.args.clock == "cpu" else time.perf_counter
    wait = torch.cuda.synchronize if bench.device.type == "cuda" else lambda: None
    gc.collect()
    wait()
    start = clock()
    result = action()
    wait()
    return clock() - start, result


def flops(action: Callable[[], Tensor]) -> int:
    """Of matrix products, convolutions and attention, both passes. torch alone does not count a CPU's attention."""
    aten = torch.ops.aten

    def forward(q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, q, k, v)

    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: forward}
    mapping |= {aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        action()
    return counter.get_total_flops()


def forward_flops(bench: Bench) -> int:
    """Of one forward of the batch."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return flops(lambda: bench.velocity(bench.z0, torch.ones(len(bench.z0), device=bench.device), bench.cond))


def matmul_rate(bench: Bench) -> float:
    """FLOP/s of a large matrix product, the best of four."""
    n = 8192 if bench.device.type == "cuda" else 256 if bench.args.size == "tiny" else 2048
    dtype = torch.bfloat16 if bench.args.bf16 else torch.float32
    a, b = (torch.ones(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(bench, lambda: a @ b)[0] for _ in range(4))


def host_syncs(action: Callable[[], Tensor]) -> int | None:
    """How often the host waits for the GPU in action; None on a CPU, where it can't be seen."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        action()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def resident(name: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at its peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def peak_memory(bench: Bench, action: Callable[[], Tensor]) -> int:
    """Bytes; action has run before, so that moments and DDP's buckets exist and all is compiled."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier steps have freed
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    rest = resident("VmRSS")
    action()
    return 16 * sum(x.numel() for x in bench.transformer.parameters()) + resident("VmHWM") - rest


def run_one(args: Args, way: str, processes: int = 1, **env: str) -> dict:
    """--way in fresh processes: what one prints."""
    changes = {"what": "one", "way": way, "compiled": None}
    flags = {name: value for name, value in (asdict(args) | changes).items() if value is not None}
    words = [flags.pop("what"), *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "experiments.cost.step_cost", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- What is asked for ------------------------------------------------------------------------------------------------


def one(args: Args, device: torch.device) -> dict:
    """A single way: median seconds of a step and of AdamW's update in it, the first step's seconds, peak memory."""
    bench = Bench(args, device)
    if WAYS[args.way][2]:
        compile_blocks(bench.transformer)
    action = lambda: take_step(bench, args.way)  # noqa: E731
    first, sums = timed(bench, action)
    seconds = [timed(bench, action)[0] for _ in range(args.repeats)]
    row = {"seconds": statistics.median(seconds), "first": first, "loss": sums[train.METRICS.index("loss"), 0].item()}
    return row | {"memory": peak_memory(bench, action)}


def table(args: Args, device: torch.device) -> dict:
    """All ways, alternating. Raises AssertionError: they differ in losses or gradients."""
    ways = [way for way in WAYS if args.compiled or not WAYS[way][2]]
    found = {way: run_one(replace(args, repeats=1), way) for way in ways} if device.type == "cpu" else {}
    bench = Bench(args, device)
    unit, rows = forward_flops(bench), {}
    for way in [way for way in ways if not WAYS[way][2]]:
        try:
            rows[way] = {"forward_units": flops(lambda: take_step(bench, way)) / unit}
        except torch.OutOfMemoryError:
            print(f"{way}: out of memory, left out")
            bench.optimizer.zero_grad()
            ways.remove(way)
    if args.compiled:
        compile_blocks(bench.transformer)
    rows |= {way: dict(rows[way.split(",")[0]]) for way in ways if WAYS[way][2]}
    seconds, rates = {way: [] for way in ways}, []
    for repeat in range(-1, args.repeats):  # the first warms up, compiles, and is compared
        rates.append(matmul_rate(bench))
        for way in ways if repeat % 2 else ways[::-1]:
            duration, sums = timed(bench, lambda: take_step(bench, way))
            if repeat >= 0:
                seconds[way].append(duration)
                continue
            rows[way] |= {"first_step_seconds": duration, "sums": sums.tolist()}
            rows[way]["host_syncs"] = host_syncs(lambda: take_step(bench, way))
            memory = found[way]["memory"] if found else peak_memory(bench, lambda: take_step(bench, way))
            rows[way]["memory_gb"] = memory / 1e9
    check_same(rows, args.bf16)
    rate = statistics.median(rates)
    for way, row in rows.items():
        row |= {"seconds": statistics.median(seconds[way]), "all_seconds": seconds[way]}
        for name, other in (("ratio_to_sft", "SFT"), ("times_faster_than_published", "published, checkpointing")):
            ratios = [a / b for a, b in zip(seconds[way], seconds.get(other, [math.nan]))]
            row[name] = statistics.median(ratios if other == "SFT" else [1 / x for x in ratios])
        row["tflops_per_second"] = row["forward_units"] * unit / row["seconds"] / 1e12
        row["share_of_matmul_rate"] = row["tflops_per_second"] * 1e12 / rate
        row["memory_ratio_to_sft"] = row["memory_gb"] / rows["SFT"]["memory_gb"]
    print("| a step | s | x SFT | times faster than published | units | peak GB | x SFT | TFLOP/s | of matmul rate |")
    print("| --- " * 9 + "|")
    for way, row in rows.items():
        cells = (f"{row['seconds']:.2f}", f"{row['ratio_to_sft']:.2f}", f"{row['times_faster_than_published']:.2f}")
        cells += (f"{row['forward_units']:.2f}", f"{row['memory_gb']:.2f}", f"{row['memory_ratio_to_sft']:.2f}")
        cells += (f"{row['tflops_per_second']:.3f}", f"{100 * row['share_of_matmul_rate']:.0f} %")
        print(f"| {way} | {' | '.join(cells)} |")
    print(f"a matrix product: {rate / 1e12:.3f} TFLOP/s")
    for way in ways:
        if WAYS[way][2]:
            first = found[way]["first"] if found else rows[way]["first_step_seconds"]
            print(f"first step of {way}: {first:.1f} s")
    return {"forward_tflop": unit / 1e12, "matmul_tflops_per_second": rate / 1e12, "ways": rows, "fresh": found}


def check_same(rows: dict[str, dict], bf16: bool) -> None:
    """All SOAR ways have the same loss, errors and gradient norm, up to rounding; SFT's error is their base term's.
    Raises AssertionError."""
    tolerance = 2e-2 if bf16 else 1e-4
    reference = torch.tensor(rows["SOAR"]["sums"])
    for way, row in rows.items():
        sums = torch.tensor(row["sums"])
        rest = slice(0, len(sums))
        if way.startswith("SFT"):
            rest = slice(train.METRICS.index("base"), train.METRICS.index("aux"))
        torch.testing.assert_close(sums[rest], reference[rest], rtol=tolerance, atol=tolerance, msg=f"{way} differs")


def casting_each_time(bench: Bench, sums: Tensor) -> None:
    """soar, but with weights cast to bf16 in every forward."""
    draws, total = bench.draws(bench.config)
    terms = soar_terms(bench.velocity, bench.z0, draws, bench.cond, bench.uncond, bench.config, normalizer=total)
    for i, term in enumerate(terms):
        term.loss.backward()
        train.add_term(sums, term, auxiliary=i > 0)


def options(args: Args, device: torch.device) -> dict:
    """What else could make a step cheaper, each against what train.py does, alternating."""
    plain, bf16 = Bench(args, device), Bench(replace(args, mixed_precision="bf16"), device)
    parameters = list(plain.transformer.parameters())
    adamw = {name: torch.optim.AdamW(parameters, lr=0.0, **{name: True}) for name in ("fused", "foreach")}
    adamw["neither"] = torch.optim.AdamW(parameters, lr=0.0, foreach=False)

    def updating(name: str) -> Callable[[], None]:
        def action() -> None:
            for x in parameters:
                x.grad = torch.ones_like(x) if x.grad is None else x.grad
            adamw[name].step()
        return action

    def math_attention() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return take_step(plain, "SOAR")

    tried = {f"AdamW {name}": updating(name) for name in adamw}
    tried |= {"SOAR, attention fused": lambda: take_step(plain, "SOAR")}
    tried |= {"SOAR, attention by separate products": math_attention}
    tried |= {"SOAR in bf16, weights cast once a step": lambda: take_step(bf16, "SOAR")}
    tried |= {"SOAR in bf16, weights cast in every forward": lambda: bf16.take(casting_each_time)}
    seconds = {name: [] for name in tried}
    with torch.compiler.set_stance("force_eager"):
        for repeat in range(-1, args.repeats):
            for name in tried if repeat % 2 else reversed(tried):
                duration, _ = timed(plain, tried[name])
                seconds[name] += [duration] if repeat >= 0 else []
    for name, values in seconds.items():
        print(f"{statistics.median(values):8.3f} s ({min(values):.3f} to {max(values):.3f})  {name}")
    return {name: {"seconds": statistics.median(values), "all_seconds": values} for name, values in seconds.items()}


def growth(args: Args, device: torch.device) -> dict:
    """Seconds of a SOAR step by batch, N, resolution and processes, one changed at a time; a figure."""
    points, tiny = {}, args.size == "tiny"
    points["batch_size"] = [replace(args, batch_size=n) for n in ((1, 2) if tiny else (1, 2, 4, 8, 16))]
    points["num_aux_points"] = [replace(args, num_aux_points=n) for n in ((0, 2) if tiny else (0, 1, 2, 3, 6, 9, 12))]
    sides = (4, 8) if tiny else (32, 48, 64, 96, 128)
    points["side"] = [replace(args, side=n, batch_size=1) for n in sides]
    made = {}
    for name, changed in points.items():
        for point in changed:
            bench = Bench(point, device)
            take_step(bench, "SFT")  # warms up
            seconds = [timed(bench, partial(take_step, bench, "SOAR"))[0] for _ in range(args.repeats)]
            units = 3 * point.num_aux_points + 4 if point.num_aux_points else 3
            row = {"seconds": statistics.median(seconds), "all_seconds": seconds}
            row["tflop"] = units * forward_flops(bench) / 1e12
            made.setdefault(name, {})[getattr(point, name)] = row
            print(f"{name} {getattr(point, name)}: {row['seconds']:.2f} s, {row['tflop']:.2f} TFLOP", flush=True)
            del bench  # before the next one is made
    made["processes"] = {}
    for n in (1, 2) if device.type == "cpu" else range(1, torch.cuda.device_count() + 1):
        made["processes"][n] = run_one(args, "SOAR", n, OMP_NUM_THREADS="1")  # weak scaling: batch_size in each
        print(f"processes {n}: {made['processes'][n]['seconds']:.2f} s", flush=True)
    draw_growth(made, args)
    return made


def draw_growth(made: dict[str, dict], args: Args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    labels = {"batch_size": "images a forward (B)", "num_aux_points": "auxiliary points (N)"}
    labels |= {"side": "resolution, B = 1", "processes": "processes, one core each"}
    for axis, (name, label) in zip(axes, labels.items()):
        x = [8 * n if name == "side" else n for n in made[name]]
        axis.plot(x, [row["seconds"] for row in made[name].values()], "o-")
        axis.set(xlabel=label, ylim=(0, None), xticks=x)
    axes[0].set_ylabel("seconds a SOAR step")
    figure.savefig(args.output_dir / "step_cost.png", dpi=110)
    pyplot.close(figure)


# --- What fits, and what the network takes, computed ------------------------------------------------------------------

CLIP = {"L": (768, 3072, 12, 12), "G": (1280, 5120, 32, 20)}  # width, inner width, layers, heads; T5 is the XXL
T5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2}  # in float32
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
LINKS = {8: ("NVLink, 450 GB/s a GPU", 450e9), 64: ("8 nodes, each with 8 x 400 Gb/s", 400e9)}  # bytes/s, data sheets


class Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that operations within have made, not been given, and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note((args, kwargs), given=True)
        result = function(*args, **(kwargs or {}))
        self.note(result, given=False)
        return result

    def note(self, tensors, given: bool) -> None:
        for storage in (x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, Tensor)):
            if storage._cdata not in self.seen:
                size = 0 if given else storage.nbytes()
                self.seen.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, size)

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_of_terms(size: str, batch_size: int, checkpointing: bool, lora_rank: int | None) -> dict[str, int]:
    """Bytes of weights, the count of trained parameters, and the peak in bytes of what two terms, forward and backward,
    allocate: gradients, bf16 copies of the weights, activations. The tensors are fake, on a CPU in autocast to bf16."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config(size)).train()
    if lora_rank:  # as train.add_lora does, which also fills the matrices
        transformer.to(torch.bfloat16).requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=lora_rank, target_modules=list(train.LORA_MODULES)))
    with FakeTensorMode():
        for module in transformer.modules():  # fake ones in place of meta ones, which autocast passes over
            for name, x in module.named_parameters(recurse=False):
                dtype = torch.float32 if x.requires_grad else x.dtype
                setattr(module, name, torch.nn.Parameter(torch.empty(x.shape, dtype=dtype), x.requires_grad))
            for name, x in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(x.shape, dtype=x.dtype))
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        parameters = list(transformer.parameters())
        velocity = train.make_velocity(transformer, torch.device("cpu"), True)
        z = torch.randn(batch_size, 16, SIDES[size], SIDES[size])
        shapes = (TOKENS, transformer.config.joint_attention_dim), (transformer.config.pooled_projection_dim,)
        names = ("encoder_hidden_states", "pooled_projections")
        cond = {name: torch.randn(batch_size, *x, dtype=torch.bfloat16) for name, x in zip(names, shapes)}
        with Allocated() as allocated, torch.autocast("cpu", enabled=False):
            for _ in range(2):
                ((velocity(z, torch.rand(batch_size), cond).float() - z) ** 2).mean().backward()
        trained = sum(x.numel() for x in parameters if x.requires_grad)
        weights = sum(x.nbytes for x in (*parameters, *transformer.buffers()))
        return {"weights": weights, "trained": trained, "peak": allocated.peak}


def encoders(batch_size: int) -> dict[str, int]:
    """Parameters of SD3.5's three text encoders, which are kept in bf16, and the operations of a batch of 77 tokens."""
    with FakeTensorMode(), torch.no_grad():
        models = [T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu", use_cache=False))]
        for width, inner, layers, heads in CLIP.values():
            size = {"hidden_size": width, "intermediate_size": inner, "projection_dim": width}
            size |= {"num_hidden_layers": layers, "num_attention_heads": heads}
            models.append(CLIPTextModelWithProjection(CLIPTextConfig(**size)))
        tokens = torch.zeros(batch_size, 77, dtype=torch.long)
        parameters = sum(x.numel() for model in models for x in model.parameters())
        return {"parameters": parameters, "flop": sum(flops(partial(model, tokens)) for model in models)}


def peak_of_vae(batch_size: int, side: int) -> dict[str, int]:
    """Bytes of the VAE's weights, the peak of what it allocates to encode images in float32, and its operations."""
    with FakeTensorMode(), torch.no_grad():
        vae, images = AutoencoderKL(**VAE), torch.randn(batch_size, 3, 8 * side, 8 * side)
        with Allocated() as allocated:
            vae.encode(images)
        flop = flops(lambda: vae.encode(images))
        return {"weights": sum(x.nbytes for x in vae.parameters()), "peak": allocated.peak, "flop": flop}


def forward_of(size: str, images: int) -> int:
    """Operations of a forward of the transformer."""
    with FakeTensorMode(), torch.no_grad():
        transformer, side = SD3Transformer2DModel(**config(size)), SIDES[size]
        cond = {"encoder_hidden_states": torch.randn(images, TOKENS, 4096)}
        cond |= {"pooled_projections": torch.randn(images, 2048)}
        z, timestep = torch.randn(images, 16, side, side), torch.ones(images)
        return flops(lambda: transformer(z, timestep=timestep, **cond))


def shares(args: Args, size: str, text: dict[str, int], vae: dict[str, int]) -> dict[str, float]:
    """Of a whole SOAR step's operations: the transformer's share, the text encoders' and the VAE's. text and vae: what
    encoders and peak_of_vae found for the batch."""
    transformer = (3 * args.num_aux_points + 4) * forward_of(size, args.batch_size)
    made = {"transformer": transformer, "text encoders": text["flop"], "VAE": vae["flop"]}
    return {name: flop / sum(made.values()) for name, flop in made.items()}


def hours(size: str) -> dict[str, float]:
    """Of runs on 8 H100 at 40 % of their bf16 peak, 989 TFLOP a second: train.py's defaults, the same for SFT, the
    paper's broad run."""
    speed = 0.4 * 8 * 989e12
    runs = {"5,000 steps of 32": (22, 32 * 5000), "SFT": (3, 32 * 5000), "10,000 steps of 512": (22, 512 * 10_000)}
    return {name: units * images * forward_of(size, 1) / speed / 3600 for name, (units, images) in runs.items()}


def gigabytes(terms: dict[str, int], vae: dict[str, int], text: dict[str, int]) -> dict[str, float]:
    """What a training step takes on a GPU, of what peak_of_terms, peak_of_vae and encoders found."""
    frozen = vae["weights"] + 2 * text["parameters"]
    peak = max(terms["peak"], 4 * terms["trained"] + vae["peak"])  # images are encoded while gradients are there
    moments = 8 * terms["trained"]
    found = {"total_gb": terms["weights"] + peak + moments + frozen, "weights_gb": terms["weights"]}
    found |= {"moments_gb": moments, "gradients_bf16_weights_activations_gb": peak, "encoders_vae_gb": frozen}
    return {name: size / 1e9 for name, size in found.items()}


def fit(args: Args, device: torch.device) -> dict:
    """The ladder of what fits where, and the all-reduce on paper: computed, none of it measured."""
    size, made = "sd3.5-medium", []
    vae, text = peak_of_vae(args.batch_size, SIDES[size]), encoders(args.batch_size)
    ladder = [(80, False, None, False), (80, True, None, False), (48, True, None, True)]
    ladder += [(24, True, 16, False), (24, True, 16, True)]
    for gpu, checkpointing, rank, on_cpu in ladder:
        flags = ["--gradient_checkpointing"] if checkpointing else []
        flags += [f"--lora_rank {rank}"] if rank else []
        flags += ["--text_encoder_device cpu"] if on_cpu else []
        found = peak_of_terms(size, args.batch_size, checkpointing, rank)
        memory = gigabytes(found, vae, {"parameters": 0} if on_cpu else text)
        row = {"gpu_gb": gpu, "flags": " ".join(flags) or "as is"} | memory
        made.append(row)
        print(f"{gpu} GB, {row['flags']}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k.endswith("_gb")))
    parameters, network = peak_of_terms(size, 1, True, None)["trained"], {}
    for n, (link, bandwidth) in LINKS.items():
        sent = 2 * (n - 1) / n * 4 * parameters
        network[n] = {"link": link, "bytes_a_gpu": sent, "seconds": sent / bandwidth}
        print(f"{n} GPUs: 2 ({n} - 1) / {n} x 4 bytes x {parameters / 1e9:.3f} G = {sent / 1e9:.1f} GB a GPU; "
              f"{link}: {1000 * sent / bandwidth:.0f} ms a step")  # fmt: skip
    share = shares(args, size, text, vae)
    print("of a step's operations: " + ", ".join(f"{name} {100 * x:.1f} %" for name, x in share.items()))
    duration = hours(size)
    print("on 8 H100 at 40 %: " + ", ".join(f"{name} {x:.2f} hours" for name, x in duration.items()))
    made = {"ladder": made, "all_reduce": network, "share_of_operations": share, "hours": duration}
    return {"computed": "not measured", "batch_size": args.batch_size} | made


def photographs(count: int, file: Path) -> None:
    """A parquet file of images of one megapixel, as JPEGs of the size that photographs have, and captions."""
    rng = np.random.default_rng(0)
    rows = {"image": [], "text": []}
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((1024, 1024))
        grain = np.asarray(coarse) + rng.normal(0, 6, (1024, 1024, 3))
        content = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
        rows["image"].append({"bytes": content.getvalue(), "path": f"{i}.jpg"})
        rows["text"].append(f"picture {i}")
    datasets.Dataset.from_dict(rows).to_parquet(file)


def host(args: Args, device: torch.device) -> dict:
    """Seconds that the host of one of 8 ranks takes between two steps for its images, by the global batch: if it draws
    for the whole batch, as train.py did up to commit d3c4dc4; and to take what reader threads have ready, as now. Also
    the readers' rate."""
    made = {"ranks": 8, "reader_threads": train.DataConfig("").reader_threads, "images": {}}
    with tempfile.TemporaryDirectory() as folder:
        photographs(32 if args.size == "tiny" else 512, Path(folder) / "photographs.parquet")
        data = train.DataConfig(f"{folder}/photographs.parquet", resolution=64 if args.size == "tiny" else 512)
        pairs = train.Pairs(data)
        start = time.perf_counter()
        pairs.check(dist.group.WORLD)
        made["rows_checked_per_second"] = len(pairs) / (time.perf_counter() - start)
        for images in (32,) if args.size == "tiny" else (32, 512):
            made["images"][images] = row = host_seconds(args, pairs, images)
            print(f"{images} images: {row['drawn']:.4f} s to draw for all, {row['taken']:.4f} s to take what is ready")
    print(f"{made['rows_checked_per_second']:.0f} rows of one megapixel checked a second")
    return made


def host_seconds(args: Args, pairs: train.Pairs, images: int) -> dict[str, float]:
    """host's seconds for a global batch, medians over --repeats."""
    side, accumulated = SIDES["tiny" if args.size == "tiny" else "sd3.5-medium"], images // 32
    shape = (16, side, side)
    training = train.TrainingConfig(4, accumulated, max_train_steps=args.repeats)
    settings = train.Args(pairs.data, Path("unused"), training=training)
    batches = train.read_batches(pairs, settings, shape, rank=0, global_batch=images, done=0)
    first = next(batches)  # starts the threads
    drawn, taken = [], []
    for step in range(args.repeats):
        time.sleep(0.5 * accumulated)  # about a step of 8 H100 (computed)
        start = time.perf_counter()
        generator = seeded("step_cost", step)
        draw((images, *shape), SoarConfig(), generator)
        torch.randn((images, *shape), generator=generator)
        drawn.append(time.perf_counter() - start)
        start = time.perf_counter()
        ready = [first, *islice(batches, accumulated - 1)] if step == 0 else list(islice(batches, accumulated))
        sum(loss_normalizer(batch.draws.t, SoarConfig()) for batch in ready).item()
        taken.append(time.perf_counter() - start)
    return {"drawn": statistics.median(drawn), "taken": statistics.median(taken)}


def describe(device: torch.device) -> dict:
    """Where and when it was measured, or computed."""
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} x {names[0]}"
    versions = {package: version(package) for package in ("torch", "diffusers")} | {"python": platform.python_version()}
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "device": name, "versions": versions,
            "threads": torch.get_num_threads(), "load": os.getloadavg(),
            "command": " ".join(["python -m experiments.cost.step_cost", *sys.argv[1:]])}  # fmt: skip


def main(args: Args) -> None:
    diffusers.utils.logging.set_verbosity_error()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rank, _, device = init_distributed()
    measures = {"table": table, "options": options, "growth": growth, "host": host, "fit": fit, "one": one}
    made = measures[args.what](args, device)
    if args.what == "one" and rank == 0:
        print(json.dumps(made), flush=True)
    elif args.what != "one":
        name = f"step_cost_{args.what}"
        if args.what not in ("fit", "host"):
            name += f"_{args.size}_{args.device}"
        flags = {key: str(x) if isinstance(x, Path) else x for key, x in asdict(args).items()}
        text = json.dumps(describe(device) | {"args": flags, args.what: made}, indent=1)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        save_whole(text + "\n", args.output_dir / f"{name}.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
