"""Run the recipes of recipes.md's "Trainers with hooks" in those trainers' own code.

    python -m experiments.run_hooks --diffsynth CHECKOUT --musubi CHECKOUT --sd_scripts CHECKOUT \\
        --ai_toolkit CHECKOUT --simpletuner CHECKOUT

Each CHECKOUT, of modelscope/DiffSynth-Studio, kohya-ss/musubi-tuner, kohya-ss/sd-scripts,
ostris/ai-toolkit or bghira/SimpleTuner, may be left out. Real are the trainer's modules, its class
and method that make the loss, its model's class (small, random weights), its embeddings of text
where it has a class for them, and accelerate. The recipe is pasted, as it stands, where the page
says. Not real: latents and embeddings are random, so no VAE and no text encoder runs; no optimizer
steps; in ai-toolkit and SimpleTuner the trainer and its model are made without their constructors,
which load files, and get the attributes that this path reads; noise and levels are given to them.
A few casts in DiffSynth's and musubi's models are put right for a CPU. Needs torchvision, av,
easydict, ftfy, imageio, imagesize, kornia, lycoris-lora, sentencepiece, toml and voluptuous; what
else the trainers import and do not call here is in ABSENT.

"Off" is the relative difference of the trainer's own loss from the recipe's at lambda_aux = 0, on
the same noise and levels. SOAR "ran", with the recipe's settings, in float32 and bf16: seven terms,
whose sum is returned and finite, gradients in every weight that the trainer's own loss reaches, and
a rollout that is guided, by another text. Prints rows of the page's last table.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import ModuleType, SimpleNamespace
from unittest import mock

import accelerate
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import soar
from experiments.run_recipes import HERE, blocks

PAGE = blocks((HERE / "recipes.md").read_text())
BATCH = 2
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
ABSENT = (
    "albumentations", "atomicwrites", "bitsandbytes", "boto3", "botocore", "controlnet_aux",
    "fastapi", "k_diffusion", "library.lpw_stable_diffusion",
    "library.sdxl_lpw_stable_diffusion", "lpips", "modelscope", "open_clip", "optimum",
    "pytorch_fid", "simpletuner.simpletuner_sdk", "skrample", "timm", "torchao", "torchaudio",
    "trainingsample", "wandb",
)  # fmt: skip


# --- Importing the trainers, and pasting into them ---


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of ABSENT: whatever is imported from them is an empty class."""

    class Module(ModuleType):
        __path__: list[str] = []

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            methods = {"__init__": lambda *x, **y: None, "__getattr__": lambda self, name: self}
            return type(name, (), methods | {"__call__": lambda *x, **y: None})

    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(f"{absent}.") for absent in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return self.Module(spec.name)

    def exec_module(self, module):
        pass


def edited(path: Path, *edits: tuple[str, str]) -> ModuleType:
    """The module of a file in which each first text, found once, became the second."""
    source = path.read_text()
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"{path} has {source.count(old)} times {old!r}, expected 1")
        source = source.replace(old, new)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def above(line: str, block: str) -> tuple[str, str]:
    """The edit that puts a block above a line, at its indentation."""
    indent = line[: -len(line.lstrip())]
    return line, textwrap.indent(block, indent) + line


@dataclasses.dataclass
class Seen:
    """What soar.py did for a block: its terms' losses, and whether the rollout was guided."""

    terms: list[float] = dataclasses.field(default_factory=list)
    guided: bool = False


@contextlib.contextmanager
def blocks_see(z1: Tensor, lambda_aux: float | None = None):
    """What blocks import from soar.py: draws with the noise z1, and another default lambda_aux."""
    fields = [] if lambda_aux is None else [("lambda_aux", float, lambda_aux)]
    config = dataclasses.make_dataclass("SoarConfig", fields, bases=(soar.SoarConfig,), frozen=True)
    draw, terms, guided_velocity = soar.draw, soar.soar_terms, soar.guided_velocity
    seen = Seen()

    def seen_terms(*args, **options):
        for term in terms(*args, **options):
            seen.terms.append(term.loss.item())
            yield term

    def seen_guidance(v_uncond, v, scale):
        seen.guided = not torch.equal(v_uncond, v)
        return guided_velocity(v_uncond, v, scale)

    with mock.patch.multiple(
        soar, SoarConfig=config, draw=lambda *x: draw(*x)._replace(z1=z1.float()),
        soar_terms=seen_terms, guided_velocity=seen_guidance,
    ):  # fmt: skip
        streamed = sys.modules["streamed"] = ModuleType("streamed")
        exec(PAGE["Trainers with hooks"][0], streamed.__dict__)
        yield seen


# --- Models and data ---


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, also where a fresh one has zeros or nothing."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.2 * randn(i, *parameter.shape)
    return model.to(dtype)


def accelerator(dtype: torch.dtype) -> accelerate.Accelerator:
    accelerate.state.AcceleratorState._reset_state(True)
    mixed = "no" if dtype == torch.float32 else "bf16"
    return accelerate.Accelerator(cpu=True, mixed_precision=mixed)


# --- The trainers. Each returns (noise, trainer's own loss, the recipe's, model), given a dtype;
# the two losses are functions without arguments ---


def diffsynth(checkout: Path, dtype: torch.dtype) -> tuple:
    """ZImageTrainingModule.forward, from a prompt and an image on, with its pipeline's units."""
    sys.path.insert(0, str(checkout))
    from diffsynth.models.z_image_dit import ZImageDiT
    from diffsynth.pipelines.z_image import ZImagePipeline, ZImageUnit_PromptEmbedder

    def prompt_embeds(self, pipe, prompt, edit_image):
        return {"prompt_embeds": [randn(len(prompt), 6, 16).to(dtype)]}

    ZImageUnit_PromptEmbedder.process = prompt_embeds
    model = ZImageDiT(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    model = filled(model, dtype)
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, x: x[0].to(dtype))  # always bf16 there
    latents, noise = randn(1, 1, 16, 8, 8).to(dtype), randn(4, 1, 16, 8, 8).to(dtype)
    file = checkout / "examples" / "z_image" / "model_training" / "train.py"
    old = "lambda pipe, inputs_shared, inputs_posi, inputs_nega: FlowMatchSFTLoss(pipe, "
    old = f'"sft": {old}**inputs_shared, **inputs_posi),'
    new = '"sft": lambda pipe, *inputs: soar_sft_loss(pipe, *inputs),'

    def step(*edits):
        pipe = ZImagePipeline("cpu", dtype)
        pipe.dit, pipe.vae_encoder = model, lambda image: latents
        ZImagePipeline.from_pretrained = staticmethod(lambda **options: pipe)
        module = edited(file, *edits)
        if edits:
            exec(PAGE["DiffSynth-Studio"][0], module.__dict__)
        trainer = module.ZImageTrainingModule(trainable_models="dit")
        torch.manual_seed(5)  # the level
        with mock.patch("torch.randn_like", lambda x: noise):
            return trainer({"prompt": "a square", "image": Image.new("RGB", (64, 64))})

    return noise, step, lambda: step((old, new), ('"cfg_scale": 1,', '"cfg_scale": 2,')), model


def musubi(checkout: Path, dtype: torch.dtype) -> tuple:
    """WanNetworkTrainer.process_batch."""
    sys.path.insert(0, str(checkout / "src"))
    with mock.patch("torch.cuda.current_device", lambda: 0):  # a default of an argument
        from musubi_tuner import wan_train_network as script
    from musubi_tuner.wan.configs import WAN_CONFIGS
    from musubi_tuner.wan.modules.model import WanModel

    model = WanModel(
        dim=24, num_heads=2, text_dim=8, text_len=8, freq_dim=16, ffn_dim=32, num_layers=1,
        attn_mode="torch",
    )  # fmt: skip
    model = filled(model, dtype)
    norms = [x for x in model.modules() if isinstance(x, torch.nn.LayerNorm)]
    for part in (model.time_embedding, model.time_projection, *norms):
        part.float()  # as CUDA's autocast has them, and a CPU's does not
    parser = script.wan_setup_parser(script.setup_parser_common())
    words = "--task t2v-14B --timestep_sampling shift --discrete_flow_shift 5"
    args = parser.parse_args(words.split())
    latents, noise = randn(1, BATCH, 16, 3, 4, 4).to(dtype), randn(4, BATCH, 16, 3, 4, 4).to(dtype)
    batch = {"timesteps": [0.9, 0.2], "t5": list(randn(2, BATCH, 5, 8))}
    own = script.WanNetworkTrainer

    def step(kind):
        trainer = kind()
        trainer.config = WAN_CONFIGS[args.task]
        trainer._i2v_training = trainer._control_training = trainer.high_low_training = False
        call = (args, accelerator(dtype), model, None, batch, latents, noise, None, dtype, dtype)
        return trainer.process_batch(*call, None, 0)[0]

    def ours():
        names = {"__name__": "recipe"}
        with TemporaryDirectory() as work, contextlib.chdir(work):
            save_file({"varlen_t5": randn(3, 5, 8)}, "empty_wan_te.safetensors")
            with mock.patch.object(script, "WanNetworkTrainer", own):
                exec(PAGE["musubi-tuner"][0], names)
                return step(names["SoarTrainer"])

    return noise, lambda: step(own), ours, model


def sd_scripts(checkout: Path, dtype: torch.dtype) -> tuple:
    """Sd3NetworkTrainer.process_batch."""
    sys.path.insert(0, str(checkout))
    import sd3_train_network as script
    from library import strategy_base, strategy_sd3
    from library.sd3_models import MMDiT

    model = MMDiT(
        input_size=None, in_channels=16, depth=2, adm_in_channels=2048, pos_embed_max_size=8,
        context_embedder_in_features=4096, context_embedder_out_features=128, num_patches=64,
    )  # fmt: skip
    model.pos_embed.copy_(randn(9, *model.pos_embed.shape))
    model = filled(model, dtype)
    strategy_base.TextEncodingStrategy._strategy = None
    strategy = strategy_sd3.Sd3TextEncodingStrategy()
    strategy_base.TextEncodingStrategy.set_strategy(strategy)
    args = script.setup_parser().parse_args("--seed 0 --training_shift 3".split())
    latents, noise = randn(1, BATCH, 16, 8, 8), randn(4, BATCH, 16, 8, 8)

    def text(seed, rows):
        shapes = ((rows, 5, 2048), (rows, 5, 4096), (rows, 2048))
        return [randn(seed, *shape).to(dtype) for shape in shapes] + [None] * 3

    batch = {"latents": latents, "text_encoder_outputs_list": text(2, BATCH)}
    batch["loss_weights"] = torch.tensor([1.0, 3.0])

    def step(kind):
        trainer = kind()
        trainer.sample_prompts_te_outputs = {"": text(3, 1)}
        call = (batch, None, model, None, None, None, dtype, dtype, accelerator(dtype), args)
        torch.manual_seed(5)  # the levels
        with mock.patch("torch.randn_like", lambda x: noise):
            return trainer.process_batch(*call, strategy, None, train_text_encoder=False)

    def ours():
        names = {"__name__": "recipe"}
        exec(PAGE["sd-scripts"][0], names)
        return step(names["SoarTrainer"])

    return noise, lambda: step(script.Sd3NetworkTrainer), ours, model


def ai_toolkit(checkout: Path, dtype: torch.dtype) -> tuple:
    """SDTrainer.train_single_accumulation of a ZImageModel, with a mask."""
    sys.path.insert(0, str(checkout))
    package = sys.modules["extensions_built_in.diffusion_models"] = ModuleType("diffusion_models")
    package.__path__ = [str(checkout / "extensions_built_in" / "diffusion_models")]  # but not all
    from extensions_built_in.diffusion_models.z_image.z_image import ZImageModel
    from toolkit.config_modules import ModelConfig, TrainConfig
    from toolkit.models.v2.z_image import ZImageTransformer2DModel
    from toolkit.prompt_utils import PromptEmbeds
    from toolkit.timer import Timer

    model = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    model = filled(model, dtype)
    latents, noise = randn(1, BATCH, 16, 8, 8).to(dtype), randn(4, BATCH, 16, 8, 8).to(dtype)
    timesteps = torch.tensor([900.0, 200.0])
    name = next(name for name, x in DTYPES.items() if x == dtype)

    def text(seed, rows):
        return PromptEmbeds([list(randn(seed, rows, 6, 16).to(dtype)), None])

    sd = ZImageModel("cpu", ModelConfig(name_or_path="", arch="zimage"), dtype=name)
    sd.noise_scheduler = sd.get_train_scheduler()
    sd.model, sd.vae = model, SimpleNamespace(dtype=sd.vae_torch_dtype)
    sd.text_encoder = SimpleNamespace(dtype=sd.te_torch_dtype, eval=lambda: None)
    sd.encode_prompt = lambda *prompts, **options: text(2, BATCH)
    noisy = sd.add_noise(latents, noise, timesteps)
    item = SimpleNamespace(is_reg=False, prior_reg=False)
    batch = SimpleNamespace(
        latents=latents, file_items=[item] * BATCH, control_tensor=None, clip_image_tensor=None,
        clip_image_embeds=None, mask_tensor=randn(6, BATCH, 1, 8, 8).abs().half(),
        unconditional_latents=None, extra_values=None, prompt_embeds=None, audio_target=None,
        get_network_weight_list=lambda: [1.0] * BATCH, get_is_reg_list=lambda: [False] * BATCH,
        loss_multiplier_list=[1.0] * BATCH, audio_pred=None, sigmas=None,
    )  # fmt: skip
    given = (noisy, noise, timesteps, [""] * BATCH, None)
    file = checkout / "extensions_built_in" / "sd_trainer" / "SDTrainer.py"
    anchor = " " * 16 + "elif self.train_config.loss_type == 'mean_flow':\n"

    def step(loss_type, *edits):
        kind = edited(file, *edits).SDTrainer
        trainer = object.__new__(kind)
        settings = {"dtype": name, "loss_type": loss_type, "noise_scheduler": "flowmatch"}
        trainer.__dict__.update(
            train_config=TrainConfig(**settings), accelerator=accelerator(dtype), sd=sd,
            device_torch=CPU, timer=Timer(), adapter=None, assistant_adapter=None, network=None,
            embedding=None, adapter_config=None, decorator=None, dfe=None, do_long_prompts=False,
            do_prior_prediction=False, do_guided_loss=False, is_caching_text_embeddings=False,
            _clip_image_embeds_unconditional=None, unconditional_embeds=text(3, 1), snr_gos=None,
            negative_prompt_pool=None, model_config=sd.model_config, additional_logs={},
            process_general_training_batch=lambda batch: given,
        )  # fmt: skip
        return trainer.train_single_accumulation(batch)

    recipe = above(anchor, PAGE["ai-toolkit"][0])
    return noise, lambda: step("mse"), lambda: step("soar", recipe), model


def simpletuner(checkout: Path, dtype: torch.dtype) -> tuple:
    """Trainer._compute_model_prediction_loss of a model SD3."""
    sys.path.insert(0, str(checkout))
    from simpletuner.helpers.models.sd3.model import SD3
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    net = filled(net, dtype)
    config = SimpleNamespace(
        seed=None, loss_type="l2", disable_accelerator=False, controlnet=False,
        distillation_method=None, weight_dtype=dtype, base_weight_dtype=dtype,
    )  # fmt: skip
    model = object.__new__(SD3)
    model.__dict__.update(
        config=config, accelerator=accelerator(dtype), model=net, diff2flow_bridge=None
    )
    latents, noise = randn(1, BATCH, 16, 8, 8).to(dtype), randn(4, BATCH, 16, 8, 8).to(dtype)
    sigmas = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1)
    batch = {"latents": latents, "noise": noise, "sigmas": sigmas, "input_noise": noise}
    batch["timesteps"] = model.flow_matching_timesteps_from_sigmas(sigmas.flatten())
    model._prepare_flow_noisy_latents(batch)
    for seed, prefix in ((2, ""), (3, "negative_")):
        batch[f"{prefix}encoder_hidden_states"] = randn(seed, BATCH, 5, 8).to(dtype)
        batch[f"{prefix}add_text_embeds"] = randn(seed + 8, BATCH, 8).to(dtype)
    file = checkout / "simpletuner" / "helpers" / "training" / "trainer.py"
    call = "model_pred = self.model_predict(\n    prepared_batch=prepared_batch,\n)\nloss, "
    anchor = textwrap.indent(call, " " * 8)

    def step(*edits):
        trainer = object.__new__(edited(file, *edits).Trainer)
        trainer.__dict__.update(
            config=config, accelerator=accelerator(dtype), model=model, _tlora_active=False,
            noise_scheduler=SimpleNamespace(config=SimpleNamespace(prediction_type="flow")),
        )  # fmt: skip
        return trainer._compute_model_prediction_loss(dict(batch))[0]

    recipe = above(anchor, PAGE["SimpleTuner"][0])
    return noise, step, lambda: step(recipe), net


TRAINERS = {  # option: heading of the page, function, lines changed beside the block, driver
    "diffsynth": ("DiffSynth-Studio", "FlowMatchSFTLoss", 2, diffsynth),
    "musubi": ("musubi-tuner", "process_batch", 0, musubi),
    "ai_toolkit": ("ai-toolkit", "train_single_accumulation", 0, ai_toolkit),
    "simpletuner": ("SimpleTuner", "_compute_model_prediction_loss", 1, simpletuner),
    "sd_scripts": ("sd-scripts", "process_batch", 0, sd_scripts),
}


def reached(loss: Tensor, model: torch.nn.Module) -> set[str]:
    """The weights with a gradient, once the loss has run backward where the trainer had not."""
    if loss.requires_grad:
        loss.backward()
    named = [(name, x.grad) for name, x in model.named_parameters() if x.grad is not None]
    model.zero_grad()
    return {name for name, grad in named if grad.isfinite().all() and grad.any()}


def measure(make: Callable, checkout: Path, dtype: torch.dtype) -> tuple[float, bool]:
    """How far the recipe is off; whether SOAR ran, see the top."""
    noise, theirs, ours, model = make(checkout, dtype)
    with blocks_see(noise, 0.0):
        own, same = theirs(), ours()
    off = abs(same.item() / own.item() - 1)
    model.zero_grad()
    weights = reached(theirs(), model)
    with blocks_see(noise) as seen:
        loss = ours()
    whole = abs(loss.item() / sum(seen.terms) - 1) < 1e-5
    reaches = bool(weights) and weights <= reached(loss, model)
    return off, len(seen.terms) == 7 and whole and seen.guided and reaches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TRAINERS:
        parser.add_argument(f"--{name}", type=Path)
    args = vars(parser.parse_args())
    given = {name: args[name].resolve() for name in TRAINERS if args[name]}
    sys.meta_path.insert(0, Absent())
    os.chdir(mkdtemp())  # SimpleTuner writes a log there
    for name, checkout in given.items():
        heading, function, changed, make = TRAINERS[name]
        off, ran = zip(*(measure(make, checkout, dtype) for dtype in DTYPES.values()))
        added = sum(block.count("\n") for block in PAGE[heading]) + changed
        cells = [f"{heading}, `{function}`", f"{added}, {changed}"]
        cells += [f"{x:.0e}" for x in off] + ["yes" if all(ran) else "no"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
