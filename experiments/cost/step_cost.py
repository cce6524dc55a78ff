"""What a training step costs: SFT, SOAR, and SOAR as the published code schedules it.

    python -m experiments.cost.step_cost --size small                       on a CPU
    python -m experiments.cost.step_cost --size sd3.5-medium --device cuda
    python -m experiments.cost.step_cost fit     computed: what fits a GPU, and hours (memory.py)
    python -m experiments.cost.step_cost host    what the host does between two steps

Weights are random, from the config: nothing is downloaded. A step is train.py's, by its own
functions, from latents and prompt embeddings on, so VAE and text encoders are left out. The
learning rate is 0, so that all steps see the same weights and must give the same losses and
gradients, which is asserted. Ways alternate within a repeat, forth and back; seconds are medians
over the repeats, ratios medians of the ratios within a repeat. Operations are counted in units of
one forward. Written to experiments/cost/results, as JSON.

Memory: on CUDA max_memory_allocated; on a CPU what torch's MemTracker counts, eager ways only.
"""

import functools
import gc
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import datasets
import diffusers
import numpy as np
import torch
import torch.distributed as dist
import tyro
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import Tensor

import soar
import train
from experiments.cost import memory
from experiments.cost.rehearsal import TRANSFORMER
from experiments.environment import commit, markdown
from sample import check_numbers, init_distributed, save_whole, seeded

RESULTS = Path(__file__).parent / "results"
SMALL = TRANSFORMER | {
    "num_layers": 8, "num_attention_heads": 6, "caption_projection_dim": 384,
    "dual_attention_layers": (0, 1),
}  # fmt: skip
SIZES = {"small": (SMALL, 32), "sd3.5-medium": (TRANSFORMER, 64)}  # and the latents' side


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["table", "fit", "host"], tyro.conf.Positional] = "table"
    size: Literal["small", "sd3.5-medium"] = "small"
    """small: 8 blocks of width 384, 46 M parameters; sd3.5-medium: 24 of 1536, 2.243 B."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On cuda forwards run in bf16, on a CPU in float32."""
    repeats: int = 5
    batch_size: int = 4
    num_aux_points: int = 6
    """N."""
    compiled: bool = True
    """Have the compiled ways in the table."""
    output_dir: Path = RESULTS
    """Where JSON is written."""

    def __post_init__(self):
        check_numbers(self, may_be_0=("num_aux_points",))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda, but torch sees no GPU here; expected cpu")


# --- Ways to take a step ------------------------------------------------------------------------


class Bench:
    """A model with random weights, an optimizer, and a batch of latents and embeddings."""

    def __init__(self, args: Args, device: torch.device):
        self.device = device
        self.config = soar.SoarConfig(num_aux_points=args.num_aux_points)
        config, side = SIZES[args.size]
        self.shape = (args.batch_size, 16, side, side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.transformer = SD3Transformer2DModel(**config).to(device).train()
        bf16 = device.type == "cuda"
        self.ddp = train.make_ddp(self.transformer)
        self.velocity = train.make_velocity(self.ddp, device, bf16)
        self.optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=0.0, fused=True)
        # What train.update asks for.
        training = SimpleNamespace(max_grad_norm=math.inf, learning_rate=0.0)
        self.settings = SimpleNamespace(training=training)
        self.step, self.lr_factor = 0, lambda step: 1.0
        fixed, dtype = seeded("step_cost"), torch.bfloat16 if bf16 else torch.float32
        tokens = (args.batch_size, 154, config["joint_attention_dim"])  # 77 of CLIP, 77 of T5
        pooled = (args.batch_size, config["pooled_projection_dim"])
        self.cond, self.uncond = (
            {
                "encoder_hidden_states": torch.randn(tokens, generator=fixed).to(device, dtype),
                "pooled_projections": torch.randn(pooled, generator=fixed).to(device, dtype),
            }
            for _ in range(2)
        )
        self.z0 = torch.randn(self.shape, generator=fixed).to(device)

    def draws(self, config: soar.SoarConfig) -> tuple[soar.Draws, float]:
        """A step's draws on the device, and the normalizer of its loss."""
        draws = soar.draw(self.shape, config, seeded("step_cost", "draws"))
        moved = soar.Draws(*(x if x is None else x.to(self.device) for x in draws))
        return moved, soar.loss_normalizer(draws.t, config).item()


def ours(bench: Bench, sums: Tensor, lambda_aux: float = 1.0) -> None:
    """What train.py does: soar.py's terms, each with its backward."""
    config = replace(bench.config, lambda_aux=lambda_aux)
    draws, normalizer = bench.draws(config)
    inputs = (bench.z0, draws, bench.cond, bench.uncond, config)
    terms = soar.soar_terms(bench.velocity, *inputs, normalizer=normalizer)
    train.backward(terms, config.num_terms, bench.ddp, sums, last=True)


def published(bench: Bench, sums: Tensor) -> None:
    """The same terms as the published code schedules them: the conditional forward twice, the
    rollout with a graph that is then detached, one backward through all N + 1 graphs. From its
    description; the arithmetic is soar.py's."""
    config, velocity, z0 = bench.config, bench.velocity, bench.z0
    draws, normalizer = bench.draws(config)
    t_next = (draws.t - 1 / config.num_sampling_steps).clamp(min=config.t_min)
    sigma = soar.sigma_from_t(draws.t, config.shift)
    sigma_next = soar.sigma_from_t(t_next, config.shift)
    terms, everyone = [], torch.ones_like(draws.t, dtype=torch.bool)

    def add(z: Tensor, target: Tensor, sigma: Tensor) -> None:
        error = ((velocity(z, sigma, bench.cond).float() - target) ** 2).mean((1, 2, 3))
        terms.append(soar.Term(error.sum() / normalizer, error.detach(), sigma, everyone))

    z = soar.interpolate(z0, draws.z1, sigma)
    add(z, draws.z1 - z0, sigma)
    v_uncond, v_cond = (velocity(z, sigma, x) for x in (bench.uncond, bench.cond))
    v = soar.guided_velocity(v_uncond, v_cond, config.guidance_scale)
    z_hat = soar.rollout_step(z, v, sigma, sigma_next).detach()
    del v, v_uncond, v_cond
    for u in draws.u[0]:
        sigma_aux = sigma_next + u * (1 - sigma_next)
        z_aux = soar.renoise(z_hat, draws.z1, sigma_next, sigma_aux)
        add(z_aux, soar.correction_target(z_aux, z0, sigma_aux), sigma_aux)
    sum(term.loss for term in terms).backward()
    for i, term in enumerate(terms):
        train.add_term(sums, term, auxiliary=i > 0)


sft = functools.partial(ours, lambda_aux=0.0)


class Way(NamedTuple):
    gradients: Callable[[Bench, Tensor], None]
    checkpointing: bool = False
    compiled: bool = False


WAYS = {
    "SFT": Way(sft),
    "published schedule": Way(published),
    "published schedule, checkpointing (as run)": Way(published, checkpointing=True),
    "SOAR": Way(ours),
    "SFT, compiled": Way(sft, compiled=True),
    "SOAR, compiled": Way(ours, compiled=True),
}


def take_step(bench: Bench, name: str) -> Tensor:
    """A training step, with train.py's clipping, check and update: the sums of train.METRICS."""
    way, sums = WAYS[name], train.zero_sums(bench.device)
    bench.transformer.disable_gradient_checkpointing()
    if way.checkpointing:
        bench.transformer.enable_gradient_checkpointing()
    with torch.compiler.set_stance("default" if way.compiled else "force_eager"):
        way.gradients(bench, sums)
        train.update(bench.settings, bench, [], sums)
    return sums


# --- Measures -----------------------------------------------------------------------------------


def timed(bench: Bench, name: str) -> float:
    """Seconds of a step, until the device is done."""
    wait = torch.cuda.synchronize if bench.device.type == "cuda" else lambda: None
    gc.collect()
    wait()
    start = time.perf_counter()
    take_step(bench, name)
    wait()
    return time.perf_counter() - start


def host_waits(bench: Bench, name: str) -> int | None:
    """How often the host waits for the GPU in a step; None on a CPU, where it can't be seen."""
    if bench.device.type == "cpu":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        take_step(bench, name)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak_memory(bench: Bench, name: str) -> int | None:
    """Bytes; a step was taken before, so moments and DDP's buckets exist and all is compiled."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        take_step(bench, name)
        return torch.cuda.max_memory_allocated()
    if WAYS[name].compiled:
        return None
    tracker = memory.Tracker()
    tracker.track_external(bench.transformer, bench.optimizer)
    with tracker:
        take_step(bench, name)
    return memory.peak_of(tracker)["Total"]


def check_same(sums: dict[str, Tensor], bf16: bool) -> None:
    """All SOAR ways have the same loss, errors and gradient norm, up to rounding; SFT's error is
    their base term's. Raises AssertionError."""
    tolerance = 2e-2 if bf16 else 1e-4
    base = slice(train.METRICS.index("base"), train.METRICS.index("aux"))
    for name, found in sums.items():
        rows = base if name.startswith("SFT") else slice(None)
        torch.testing.assert_close(
            found[rows], sums["SOAR"][rows], rtol=tolerance, atol=tolerance, msg=f"{name} differs"
        )


def count(bench: Bench, name: str, unit: int) -> dict | None:
    """What is counted of a way; None: out of memory. A compiled way has its eager one's units."""
    eager = name.removesuffix(", compiled")
    try:
        units = memory.flops(lambda: take_step(bench, eager)) / unit
        take_step(bench, name)
        peak = peak_memory(bench, name)
        return {"forward_units": units, "bytes": peak, "host_waits": host_waits(bench, name)}
    except torch.OutOfMemoryError:
        print(f"{name}: out of memory, left out")
        bench.optimizer.zero_grad()
        return None


def table(args: Args, device: torch.device) -> dict:
    """All ways, alternating. Raises AssertionError: they differ in losses or gradients."""
    bench = Bench(args, device)
    inputs = (bench.z0, torch.ones(args.batch_size, device=device), bench.cond)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        unit = memory.flops(lambda: bench.velocity(*inputs))
    take_step(bench, "SFT")  # makes AdamW's moments
    if args.compiled:
        train.compile_blocks(bench.transformer)
    asked = [name for name, way in WAYS.items() if args.compiled or not way.compiled]
    rows = {name: count(bench, name, unit) for name in asked}
    rows = {name: row | {"seconds": []} for name, row in rows.items() if row}
    check_same({name: take_step(bench, name) for name in rows}, device.type == "cuda")
    for repeat in range(args.repeats):
        for name in rows if repeat % 2 else reversed(rows):
            rows[name]["seconds"].append(timed(bench, name))
    made = {"forward_tflop": unit / 1e12, "ways": rows}
    print(as_table(made), end="")
    return made


def as_table(made: dict) -> str:
    lines = [["a step", "s", "x SFT", "units", "peak GB"]]
    sft = made["ways"]["SFT"]["seconds"]
    for name, row in made["ways"].items():
        ratio = statistics.median(a / b for a, b in zip(row["seconds"], sft))
        cells = [name, f"{statistics.median(row['seconds']):.2f}", f"{ratio:.2f}"]
        peak = f"{row['bytes'] / 1e9:.2f}" if row["bytes"] else ""
        cells += [f"{row['forward_units']:.2f}", peak]
        lines.append(cells)
    return markdown(lines)


# --- Between two steps --------------------------------------------------------------------------


def photographs(count: int, file: Path) -> None:
    """A parquet file of images of one megapixel, as JPEGs of photographs' size, and captions."""
    rng = np.random.default_rng(0)
    rows = {"image": [], "text": []}
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        grain = np.asarray(coarse.resize((1024, 1024))) + rng.normal(0, 6, (1024, 1024, 3))
        content = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
        rows["image"].append({"bytes": content.getvalue(), "path": f"{i}.jpg"})
        rows["text"].append(f"picture {i}")
    datasets.Dataset.from_dict(rows).to_parquet(file)


def host(args: Args, device: torch.device) -> dict:
    """Seconds that the host of one of 8 ranks takes between two steps, to take what its reader
    threads have ready, by the global batch; and the rows that it checks a second at a start."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "photographs.parquet"
        photographs(512, file)
        pairs = train.Pairs(train.DataConfig(str(file)))
        start = time.perf_counter()
        pairs.check(dist.group.WORLD)
        made = {"rows_checked_per_second": len(pairs) / (time.perf_counter() - start)}
        made["seconds"] = {n: seconds_to_take(pairs, n, args.repeats) for n in (32, 512)}
    print(made)
    return made


def seconds_to_take(pairs: train.Pairs, images: int, repeats: int) -> float:
    """The median for a global batch, over steps that take about as long as on 8 H100."""
    accumulated = images // 32
    training = train.TrainingConfig(4, accumulated, max_train_steps=repeats)
    settings = train.Args(pairs.data, Path("unused"), training=training)
    side = pairs.data.resolution // 8
    batches = train.read_batches(
        pairs, settings, (16, side, side), rank=0, global_batch=images, done=0
    )
    ready = [next(batches)]  # starts the threads
    seconds = []
    for _ in range(repeats):
        time.sleep(0.5 * accumulated)
        start = time.perf_counter()
        ready += islice(batches, accumulated - len(ready))
        sum(soar.loss_normalizer(batch.draws.t, soar.SoarConfig()) for batch in ready).item()
        seconds.append(time.perf_counter() - start)
        ready = []
    return statistics.median(seconds)


def describe(device: torch.device) -> dict:
    """Where and when it was measured, or computed."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    name = f"{os.cpu_count()} x " + next(x for x in cpus if "model name" in x).split(": ")[1]
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": " ".join(["python -m experiments.cost.step_cost", *sys.argv[1:]]),
        "device": name,
        "torch": torch.__version__,
    }


def main(args: Args) -> None:
    diffusers.utils.logging.set_verbosity_error()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    *_, device = init_distributed()
    measures = {"table": table, "host": host, "fit": lambda *_: memory.fit()}
    made = measures[args.what](args, device)
    name = f"step_cost_{args.what}"
    if args.what == "table":
        name += f"_{args.size}_{args.device}"
    text = json.dumps(describe(device) | made, indent=1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_whole(text + "\n", args.output_dir / f"{name}.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
