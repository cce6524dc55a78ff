"""Run the recipes of recipes.md's "Trainers with hooks" in those trainers' own code.

    python -m experiments.port.run_hooks --environment DIR --diffsynth CHECKOUT --musubi CHECKOUT \\
        --sd_scripts CHECKOUT --ai_toolkit CHECKOUT --simpletuner CHECKOUT --onetrainer CHECKOUT \\
        --ltx_video CHECKOUT --diffusion_pipe CHECKOUT --unirl CHECKOUT --flow_matching CHECKOUT

Each CHECKOUT, a clone of the repository that recipes.md names, may be left out. DIR is where the
packages go that the trainers need beside ours; it is kept for the next time. torchvision must be
installed already, of the same build as torch. What is real and what is not: see the page. Objects
whose constructor loads files are made without it, and get the attributes that this path reads. What
trainers import and do not call here is in ABSENT. A few casts in DiffSynth's and musubi's models
are put right for a CPU.

Prints rows of the page's last table; "What was run", there, says what "off" and "ran" mean.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import accelerate
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import soar
from experiments.environment import environment, run
from experiments.port.run_recipes import HERE, PAGE, SMALL

FILES = HERE / "recipes"
BATCH = 2
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
PACKAGES = (
    "av==18.1.0", "deepspeed==0.18.2", "easydict==1.14", "ftfy==6.3.1", "gguf==0.19.0",
    "imageio==2.38.1", "imagesize==2.0.1", "kornia==0.9.0", "lycoris-lora==4.1.3", "parse==1.22.4",
    "sentencepiece==0.2.3", "toml==0.10.2", "torchmetrics==1.9.0", "voluptuous==0.16.0",
)  # fmt: skip
ABSENT = (
    "albumentations", "atomicwrites", "bitsandbytes", "boto3", "botocore", "comfy", "comfy_api",
    "controlnet_aux", "fastapi", "k_diffusion", "library.lpw_stable_diffusion",
    "library.sdxl_lpw_stable_diffusion", "lpips", "ltxv_trainer.video_utils", "mgds", "modelscope",
    "open_clip", "optimum", "pytorch_fid", "ray", "simpletuner.simpletuner_sdk", "skrample",
    "timm", "torchao", "torchaudio", "trainingsample", "wandb",
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


# --- Running a loss ---


class Trainer(NamedTuple):
    """What is compared: the trainer's own loss and the recipe's, made anew by each call."""

    noise: Tensor  # of both
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    model: torch.nn.Module
    backward: Callable[[Tensor], None] = Tensor.backward


class Recipe:
    """The file recipes/<name>.py, imported as `name`, with each first text made the second."""

    edits: tuple[tuple[str, str], ...] = ()  # of the file that is run: a wrong version, say
    one_sum = False  # streamed's `whole` in place of `streamed`

    @classmethod
    def load(cls, name: str) -> ModuleType:
        streamed = edited(FILES / "streamed.py")
        if cls.one_sum:
            streamed.streamed = streamed.whole
        sys.modules["streamed"] = streamed
        sys.modules[name] = edited(FILES / f"{name}.py", *cls.edits)
        return sys.modules[name]


def called(
    loss: Callable, noise: Tensor, lambda_aux: float = 1.0, *, edits=(), one_sum: bool = False
) -> SimpleNamespace:
    """The loss where soar.py and the trainer draw this noise, and lambda_aux is by default another;
    of soar.py's making, the losses of its terms, and whether the rollout was guided. edits,
    one_sum: of the Recipe."""
    draw, soar_terms, seen = soar.draw, soar.soar_terms, SimpleNamespace(terms=[])
    guidance = mock.Mock(side_effect=soar.guided_velocity)

    def seen_terms(*args, **options):
        for term in soar_terms(*args, **options):
            seen.terms.append(term.loss.item())
            yield term

    ours = {"soar_terms": seen_terms, "guided_velocity": guidance}
    ours["SoarConfig"] = functools.partial(soar.SoarConfig, lambda_aux=lambda_aux)
    ours["draw"] = lambda *x: draw(*x)._replace(z1=noise.float())
    torch.manual_seed(5)  # of the trainer's levels
    recipe = mock.patch.multiple(Recipe, edits=edits, one_sum=one_sum)
    randn_like = mock.patch("torch.randn_like", lambda *_, **__: noise)
    with mock.patch.multiple(soar, **ours), recipe, randn_like:
        seen.loss = loss()
    seen.guided = any(not torch.equal(*call.args[:2]) for call in guidance.call_args_list)
    return seen


def gradients(loss: Tensor, trainer: Trainer) -> dict[str, Tensor]:
    """Those not 0, once the loss has run backward, unless the trainer already had it do so."""
    if loss.requires_grad:
        trainer.backward(loss)
    found = {name: x.grad for name, x in trainer.model.named_parameters() if x.grad is not None}
    trainer.model.zero_grad()
    return {name: x for name, x in found.items() if x.isfinite().all() and x.any()}


def failures(trainer: Trainer, wrong: list[tuple[str, str]], dtype: torch.dtype) -> list[str]:
    """What did not run as it must, with the recipe's settings. wrong: versions with a mistake."""
    noise, theirs, ours, model, _ = trainer
    model.zero_grad()
    weights = gradients(called(theirs, noise).loss, trainer)
    seen = called(ours, noise)
    found = gradients(seen.loss, trainer)
    at_once = gradients(called(ours, noise, one_sum=True).loss, trainer)
    none = torch.zeros(0, dtype=torch.float64)
    a, b = (torch.cat([none, *map(torch.flatten, x.values())]) for x in (found, at_once))
    rtol = 1e-4 if dtype == torch.float32 else 3e-2
    checks = {
        "seven terms": len(seen.terms) == 7,
        "their sum": abs(seen.loss.item() / sum(seen.terms) - 1) < 1e-5,
        "guided": seen.guided,
        "all weights": bool(weights) and set(weights) <= set(found),
        "gradients": list(found) == list(at_once) and bool((a - b).norm() < rtol * b.norm()),
    }
    for edit in wrong:
        loss = called(ours, noise, edits=[edit]).loss
        checks[edit[1]] = abs(loss.item() / seen.loss.item() - 1) > 1e-6
    return [check for check, holds in checks.items() if not holds]


def off(trainer: Trainer, *edits: tuple[str, str]) -> float:
    """How far the recipe's loss at lambda 0 is from the trainer's."""
    ours = called(trainer.ours, trainer.noise, 0.0, edits=edits).loss
    return abs(ours.item() / called(trainer.theirs, trainer.noise).loss.item() - 1)


# --- Models and data ---


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_and_noise(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(1, *shape).to(dtype), randn(4, *shape).to(dtype)


def filled(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, also where a fresh one has zeros or nothing."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.2 * randn(i, *parameter.shape)
    return model.to(dtype)


def sd3(kind: type, dtype: torch.dtype, text: int = 8, pooled: int = 8) -> torch.nn.Module:
    """A small model of diffusers' class, or of a trainer's with the same arguments."""
    model = kind(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=text, caption_projection_dim=16, pooled_projection_dim=pooled,
        pos_embed_max_size=8,
    )  # fmt: skip
    return filled(model, dtype)


class Loose:
    """Made of these attributes alone, whatever class comes next; others are None."""

    def __init__(self, **given):
        self.__dict__.update(given)

    def __getattr__(self, name):
        if name.startswith(("soar", "__")):  # the recipes ask whether they were here before
            raise AttributeError(name)


def made(kind: type, **attributes):
    loose = type(kind.__name__, (Loose, kind), {})
    loose.__abstractmethods__ = frozenset()
    return loose(**attributes)


def accelerator(dtype: torch.dtype) -> accelerate.Accelerator:
    accelerate.state.AcceleratorState._reset_state(True)
    mixed = "no" if dtype == torch.float32 else "bf16"
    # Of four micro-batches: backward divides by 4, which streamed must do too.
    return accelerate.Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=4)


def autocast(dtype: torch.dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


# --- The trainers, each given a dtype; its checkout can be imported from ---


def diffsynth(checkout: Path, dtype: torch.dtype) -> Trainer:
    """ZImageTrainingModule.forward, from a prompt and an image on, with its pipeline's units."""
    from diffsynth.models.z_image_dit import ZImageDiT
    from diffsynth.pipelines.z_image import ZImagePipeline, ZImageUnit_PromptEmbedder

    ZImageUnit_PromptEmbedder.process = lambda self, pipe, prompt, edit_image: {
        "prompt_embeds": [randn(len(prompt), 6, 16).to(dtype)]
    }
    model = filled(ZImageDiT(**SMALL["ZImageTransformer2DModel"]), dtype)
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, x: x[0].to(dtype))  # always bf16 there
    latents, noise = latents_and_noise(1, 16, 8, 8, dtype=dtype)
    file = checkout / "examples/z_image/model_training/train.py"
    old = "lambda pipe, inputs_shared, inputs_posi, inputs_nega: FlowMatchSFTLoss(pipe, "
    old = f'"sft": {old}**inputs_shared, **inputs_posi),'
    new = '"sft": lambda pipe, *inputs: soar_sft_loss(pipe, *inputs),'

    def step(*edits):
        pipe = ZImagePipeline("cpu", dtype)
        pipe.dit, pipe.vae_encoder = model, lambda image: latents
        ZImagePipeline.from_pretrained = staticmethod(lambda **options: pipe)
        module = edited(file, *edits)
        if edits:
            module.soar_sft_loss = Recipe.load("soar_diffsynth").soar_sft_loss
        trainer = module.ZImageTrainingModule(trainable_models="dit")
        return trainer({"prompt": "a square", "image": Image.new("RGB", (64, 64))})

    recipe = (old, new), ('"cfg_scale": 1,', '"cfg_scale": 2,')
    return Trainer(noise, step, lambda: step(*recipe), model)


def musubi(checkout: Path, dtype: torch.dtype) -> Trainer:
    """WanNetworkTrainer.process_batch."""
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
    latents, noise = latents_and_noise(BATCH, 16, 3, 4, 4, dtype=dtype)
    batch = {"timesteps": [0.9, 0.2], "t5": list(randn(2, BATCH, 5, 8))}
    own = script.WanNetworkTrainer

    def step(kind):
        trainer = kind()
        trainer.config = WAN_CONFIGS[args.task]
        trainer._i2v_training = trainer._control_training = trainer.high_low_training = False
        call = (args, accelerator(dtype), model, None, batch, latents, noise, None, dtype, dtype)
        return trainer.process_batch(*call, None, 0)[0]

    def ours():
        with TemporaryDirectory() as work, contextlib.chdir(work):
            save_file({"varlen_t5": randn(3, 5, 8)}, "empty_wan_te.safetensors")
            with mock.patch.object(script, "WanNetworkTrainer", own):
                return step(Recipe.load("soar_musubi").SoarTrainer)

    return Trainer(noise, lambda: step(own), ours, model, accelerator(dtype).backward)


def sd_scripts(checkout: Path, dtype: torch.dtype) -> Trainer:
    """Sd3NetworkTrainer.process_batch."""
    import sd3_train_network as script
    from library import strategy_base, strategy_sd3
    from library.sd3_models import MMDiT

    model = MMDiT(
        input_size=None, in_channels=16, depth=2, adm_in_channels=2048, pos_embed_max_size=8,
        context_embedder_in_features=4096, context_embedder_out_features=128, num_patches=64,
    )  # fmt: skip
    model.pos_embed.copy_(randn(9, *model.pos_embed.shape))
    model = filled(model, dtype)
    strategy_base.TextEncodingStrategy._strategy = None  # else it refuses a second one
    strategy = strategy_sd3.Sd3TextEncodingStrategy()
    strategy_base.TextEncodingStrategy.set_strategy(strategy)
    args = script.setup_parser().parse_args("--seed 0 --training_shift 3".split())
    latents, noise = latents_and_noise(BATCH, 16, 8, 8)

    def text(seed, rows):
        shapes = ((rows, 5, 2048), (rows, 5, 4096), (rows, 2048))
        return [randn(seed, *shape).to(dtype) for shape in shapes] + [None] * 3

    batch = {"latents": latents, "text_encoder_outputs_list": text(2, BATCH)}
    batch["loss_weights"] = torch.tensor([1.0, 3.0])

    def step(kind):
        trainer = kind()
        trainer.sample_prompts_te_outputs = {"": text(3, 1)}
        call = (batch, None, model, None, None, None, dtype, dtype, accelerator(dtype), args)
        return trainer.process_batch(*call, strategy, None, train_text_encoder=False)

    theirs = lambda: step(script.Sd3NetworkTrainer)  # noqa: E731
    ours = lambda: step(Recipe.load("soar_sd_scripts").SoarTrainer)  # noqa: E731
    return Trainer(noise, theirs, ours, model, accelerator(dtype).backward)


def ai_toolkit(checkout: Path, dtype: torch.dtype) -> Trainer:
    """SDTrainer.train_single_accumulation of a ZImageModel, with a mask."""
    package = sys.modules["extensions_built_in.diffusion_models"] = ModuleType("diffusion_models")
    package.__path__ = [str(checkout / "extensions_built_in/diffusion_models")]  # but not all
    from extensions_built_in.diffusion_models.z_image.z_image import ZImageModel
    from toolkit.config_modules import ModelConfig, TrainConfig
    from toolkit.models.v2.z_image import ZImageTransformer2DModel
    from toolkit.prompt_utils import PromptEmbeds
    from toolkit.timer import Timer

    def text(seed, rows):
        return PromptEmbeds([list(randn(seed, rows, 6, 16).to(dtype)), None])

    model = filled(ZImageTransformer2DModel(**SMALL["ZImageTransformer2DModel"]), dtype)
    latents, noise = latents_and_noise(BATCH, 16, 8, 8, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    sd = ZImageModel("cpu", ModelConfig(name_or_path="", arch="zimage"), dtype=name)
    sd.noise_scheduler = sd.get_train_scheduler()
    sd.model, sd.vae = model, SimpleNamespace(dtype=sd.vae_torch_dtype)
    sd.text_encoder = SimpleNamespace(dtype=sd.te_torch_dtype, eval=lambda: None)
    sd.encode_prompt = lambda *prompts, **options: text(2, BATCH)
    timesteps = torch.tensor([900.0, 200.0])
    given = (sd.add_noise(latents, noise, timesteps), noise, timesteps, [""] * BATCH, None)
    item = SimpleNamespace(is_reg=False, prior_reg=False)
    batch = Loose(
        latents=latents, mask_tensor=randn(6, BATCH, 1, 8, 8).abs().half(),
        file_items=[item] * BATCH, loss_multiplier_list=[1.0] * BATCH,
        get_network_weight_list=lambda: [1.0] * BATCH, get_is_reg_list=lambda: [False] * BATCH,
    )
    file = checkout / "extensions_built_in" / "sd_trainer" / "SDTrainer.py"
    anchor = " " * 16 + "elif self.train_config.loss_type == 'mean_flow':\n"

    def step(loss_type, *edits):
        Recipe.load("soar_ai_toolkit")
        config = TrainConfig(dtype=name, loss_type=loss_type, noise_scheduler="flowmatch")
        trainer = made(
            edited(file, *edits).SDTrainer, train_config=config, accelerator=accelerator(dtype),
            sd=sd, timer=Timer(), device_torch=CPU, unconditional_embeds=text(3, 1),
            model_config=sd.model_config, additional_logs={},
            process_general_training_batch=lambda batch: given,
        )
        return trainer.train_single_accumulation(batch)

    recipe = above(anchor, PAGE["ai-toolkit"][0])
    return Trainer(noise, lambda: step("mse"), lambda: step("soar", recipe), model)


def simpletuner(checkout: Path, dtype: torch.dtype) -> Trainer:
    """Trainer._compute_model_prediction_loss of a model SD3."""
    from simpletuner.helpers.models.sd3.model import SD3
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    net = sd3(SD3Transformer2DModel, dtype)
    config = Loose(loss_type="l2", weight_dtype=dtype, base_weight_dtype=dtype)
    parts = {"config": config, "accelerator": accelerator(dtype)}
    model = made(SD3, model=net, **parts)
    latents, noise = latents_and_noise(BATCH, 16, 8, 8, dtype=dtype)
    sigmas = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1)
    batch = {"latents": latents, "noise": noise, "sigmas": sigmas, "input_noise": noise}
    batch["timesteps"] = model.flow_matching_timesteps_from_sigmas(sigmas.flatten())
    model._prepare_flow_noisy_latents(batch)
    for seed, prefix in ((2, ""), (3, "negative_")):
        batch[f"{prefix}encoder_hidden_states"] = randn(seed, BATCH, 5, 8).to(dtype)
        batch[f"{prefix}add_text_embeds"] = randn(seed + 8, BATCH, 8).to(dtype)
    file = checkout / "simpletuner" / "helpers" / "training" / "trainer.py"
    call = "model_pred = self.model_predict(\n    prepared_batch=prepared_batch,\n)\nloss, "

    def step(*edits):
        Recipe.load("soar_simpletuner")
        trainer = made(edited(file, *edits).Trainer, model=model, **parts)
        trainer.noise_scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type="flow"))
        return trainer._compute_model_prediction_loss(dict(batch))[0]

    recipe = above(textwrap.indent(call, " " * 8), PAGE["SimpleTuner"][0])
    return Trainer(noise, step, lambda: step(recipe), net, accelerator(dtype).backward)


def onetrainer(checkout: Path, dtype: torch.dtype) -> Trainer:
    """BaseStableDiffusion3Setup.predict and calculate_loss."""
    from diffusers import SD3Transformer2DModel
    from modules.model.StableDiffusion3Model import StableDiffusion3Model
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.enum.DataType import DataType
    from modules.util.enum.LossScaler import LossScaler
    from modules.util.enum.ModelType import ModelType
    from modules.util.TrainProgress import TrainProgress

    net = sd3(SD3Transformer2DModel, dtype, 4096, 2048)
    model = StableDiffusion3Model(ModelType.STABLE_DIFFUSION_35)
    model.transformer, model.autocast_context = net, contextlib.nullcontext()
    model.train_dtype = DataType.FLOAT_32 if dtype == torch.float32 else DataType.BFLOAT_16
    model.vae = SimpleNamespace(config={"scaling_factor": 1.5, "shift_factor": 0.06})
    table = SimpleNamespace(config={"num_train_timesteps": 1000}, timesteps=torch.arange(1000))
    model.noise_scheduler = SimpleNamespace(**vars(table), sigmas=torch.arange(1000) / 1000)
    model.materialize_only_text_encoders = lambda: None
    config = TrainConfig.default_values()
    config.train_device, config.model_type = "cpu", ModelType.STABLE_DIFFUSION_35
    config.text_encoder.train = config.text_encoder_2.train = config.text_encoder_3.train = False
    config.timestep_shift, config.loss_scaler = 3.0, LossScaler.BATCH
    latents, noise = latents_and_noise(BATCH, 16, 8, 8, dtype=dtype)
    batch = {"latent_image": latents, "loss_weight": torch.tensor([1.0, 3.0])}
    batch["concept_type"] = ["STANDARD"] * BATCH
    widths = (768, 1280, 4096)
    for i, width in enumerate(widths):
        batch[f"text_encoder_{i + 1}_hidden_state"] = randn(2 + i, BATCH, 5, width).to(dtype)
        batch[f"text_encoder_{i + 1}_pooled_state"] = randn(5 + i, BATCH, width).to(dtype)
    empty = [randn(8, 1, 5, width) for width in widths] + [randn(9, 1, x) for x in widths[:2]]
    encode = model.encode_text
    model.encode_text = lambda text=None, **x: encode(**x) if text is None else empty
    file = checkout / "modules" / "modelSetup" / "BaseStableDiffusion3Setup.py"
    predict, loss = " " * 12 + "predicted_flow = ", " " * 8 + "return self._flow_matching_losses("
    recipe = [above(x, block) for x, block in zip((predict, loss), PAGE["OneTrainer"])]

    def step(*edits):
        Recipe.load("soar_onetrainer")
        setup = made(edited(file, *edits).BaseStableDiffusion3Setup, train_device=CPU)
        setup._create_noise = lambda *x: noise
        setup.setup_train_device = lambda *x: None
        data = setup.predict(model, batch, config, TrainProgress())
        return setup.calculate_loss(model, batch, data, config)

    return Trainer(noise, step, lambda: step(*recipe), net)


def ltx_video(checkout: Path, dtype: torch.dtype) -> Trainer:
    """LtxvTrainer._training_step with a given first frame."""
    from diffusers import LTXVideoTransformer3DModel
    from ltxv_trainer.config import ConditioningConfig
    from ltxv_trainer.timestep_samplers import UniformTimestepSampler
    from ltxv_trainer.training_strategies import StandardTrainingStrategy

    net = LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=8,
    )  # fmt: skip
    net = filled(net, dtype)
    latents, noise = latents_and_noise(BATCH, 24, 16, dtype=dtype)
    sizes = {"num_frames": 2, "height": 3, "width": 4}
    mask = torch.ones(BATCH, 5, dtype=torch.bool)
    mask[0, 3:] = False
    batch = {"latents": {name: torch.full((BATCH,), x) for name, x in sizes.items()}}
    batch["latents"]["latents"] = latents
    text = {"prompt_embeds": randn(2, BATCH, 5, 8).to(dtype), "prompt_attention_mask": mask}
    batch["conditions"] = text
    tokens = SimpleNamespace(input_ids=torch.zeros(1, 5), attention_mask=torch.ones(1, 5))
    text_encoder = mock.Mock(device=CPU, dtype=torch.float32, return_value=(randn(3, 1, 5, 8),))
    settings = SimpleNamespace(negative_prompt="", inference_steps=50, guidance_scale=3.5)
    conditioning = ConditioningConfig(mode="none", first_frame_conditioning_p=1.0)
    file = checkout / "src" / "ltxv_trainer" / "trainer.py"
    recipe = above(" " * 8 + "# Run transformer forward pass\n", PAGE["LTX-Video-Trainer"][0])

    def transformer(**inputs):  # as accelerate wraps the model
        with autocast(dtype):
            return net(**inputs)

    def step(*edits):
        Recipe.load("soar_ltx_video")
        trainer = made(
            edited(file, *edits).LtxvTrainer, _accelerator=accelerator(dtype),
            _config=SimpleNamespace(validation=settings, seed=42), _transformer=transformer,
            _tokenizer=lambda *x, **y: tokens, _text_encoder=text_encoder,
            _training_strategy=StandardTrainingStrategy(conditioning),
            _timestep_sampler=UniformTimestepSampler(0.1, 0.9),
        )
        return trainer._training_step(batch)

    return Trainer(noise, step, lambda: step(recipe), net, accelerator(dtype).backward)


def diffusion_pipe(checkout: Path, dtype: torch.dtype) -> Trainer:
    """SD3Pipeline.prepare_inputs, the layers and the loss, as DeepSpeed's engine calls them."""
    from diffusers import SD3Transformer2DModel
    from models.sd3 import SD3Pipeline

    net = sd3(SD3Transformer2DModel, dtype, 16, 16)

    def text(seed, rows):
        shapes = {"prompt_embed": (5, 6), "prompt_2_embed": (5, 6), "t5_prompt_embed": (4, 16)}
        shapes |= {"pooled_prompt_embed": (8,), "pooled_prompt_2_embed": (8,)}
        return {name: randn(seed, rows, *shape).to(dtype) for name, shape in shapes.items()}

    latents, noise = latents_and_noise(BATCH, 16, 8, 8)
    inputs = text(2, BATCH) | {"latents": latents, "mask": None}
    encoders = {f"text_encoder{x}": object() for x in ("", "_2", "_3")}
    encode = lambda self, encoder: lambda captions, _: text(3, 1)  # noqa: E731

    def step(kind):
        pipe = object.__new__(kind)  # not made: what it lacks it takes from diffusers_pipeline
        pipe.config, pipe.model_config = {"activation_checkpointing": True}, {"shift": 3.0}
        pipe.diffusers_pipeline = SimpleNamespace(transformer=net, **encoders)
        with mock.patch.object(SD3Pipeline, "get_call_text_encoder_fn", encode):
            for encoder in encoders.values():
                pipe.get_call_text_encoder_fn(encoder)
        x, (target, _) = pipe.prepare_inputs(dict(inputs))
        with autocast(dtype):
            for layer in pipe.to_layers():
                x = layer(x)
        return pipe.get_loss_fn()(x, (target, torch.tensor([])))

    ours = lambda: step(Recipe.load("soar_diffusion_pipe").SoarPipeline)  # noqa: E731
    return Trainer(noise, lambda: step(SD3Pipeline), ours, net)


def unirl(checkout: Path, dtype: torch.dtype) -> Trainer:
    """FlowMatchSFT.compute_loss_and_backward with an SD3DiffusionStage."""
    from diffusers import SD3Transformer2DModel
    from unirl.algorithms.sft import FlowMatchSFT
    from unirl.models.sd3.conditions import SD3Conditions
    from unirl.models.sd3.diffusion import SD3DiffusionStage, SD3DiffusionStep
    from unirl.types.conditions import TextEmbedCondition
    from unirl.types.segments.latent import LatentSegment

    def text(seed):
        return TextEmbedCondition(embeds=randn(seed, BATCH, 5, 8), pooled=randn(seed, BATCH, 8))

    net = sd3(SD3Transformer2DModel, dtype)
    bundle = SimpleNamespace(transformer=net, device=CPU)
    stage = SD3DiffusionStage(model=bundle, step=SD3DiffusionStep(), strategy=None)
    embed = SimpleNamespace(embed=lambda texts: text(3))
    pipeline = SimpleNamespace(diffusion=stage, text_embed=embed)
    latents, noise = latents_and_noise(BATCH, 16, 8, 8)
    normal = torch.randn
    given = lambda shape, **x: noise if shape == noise.shape else normal(shape, **x)  # noqa: E731

    def step(kind):
        algorithm = kind(
            pipeline=pipeline, params=SimpleNamespace(guidance_scale=1.0),
            conditions_cls=SD3Conditions, timestep_shift=3.0,
        )  # fmt: skip
        with mock.patch("torch.randn", given):
            result = algorithm.compute_loss_and_backward(
                conditions={"text": text(2)}, segment=LatentSegment(latents=latents.unsqueeze(1)),
                advantages=None, training_progress=0.0, loss_scale=0.25,
            )  # fmt: skip
        return torch.tensor(result.loss)

    ours = lambda: step(Recipe.load("soar_unirl").FlowMatchSOAR)  # noqa: E731
    return Trainer(noise, lambda: step(FlowMatchSFT), ours, net)


def flow_matching(checkout: Path, dtype: torch.dtype) -> Trainer:
    """train_one_epoch, of one batch; its loss scaler is told of one micro-batch of two."""
    from models.unet import UNetModel

    net = UNetModel(
        in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1,
        attention_resolutions=(2,), channel_mult=(1, 2), num_classes=3,
    )  # fmt: skip
    net = filled(net, dtype)
    latents, noise = latents_and_noise(BATCH, 4, 8, 8)
    args = SimpleNamespace(
        accum_iter=2, discrete_flow_matching=False, class_drop_prob=0.0, skewed_timesteps=True,
        test_run=False, cfg_scale=1.5,
    )
    file = checkout / "examples" / "image" / "training" / "train_loop.py"
    text = file.read_text()
    start = text.index(" " * 12 + "path_sample = path.sample(t=t, x_0=noise, x_1=samples)")
    end = text.index("\n", text.index("torch.pow(", start)) + 1
    before, inside = PAGE["flow_matching"]
    loop = "    for data_iter_step, (samples, labels) in enumerate(data_loader):\n"
    recipe = above(loop, before), (text[start:end], textwrap.indent(inside, " " * 12))

    def step(*edits):
        Recipe.load("soar_flow_matching")
        losses, optimizer = [], torch.optim.SGD(net.parameters(), lr=0.0)

        def scaler(loss, optimizer, parameters, update_grad):
            losses.append(2 * loss)  # the loss was divided by accum_iter

        module = edited(file, *edits)
        module.skewed_timestep_sample = lambda count, device: torch.tensor([0.1, 0.8])
        lr = SimpleNamespace(step=lambda: None)
        data = [(latents, torch.tensor([0, 2]))]
        module.train_one_epoch(net, data, optimizer, lr, CPU, 0, scaler, args)
        return losses[0]

    return Trainer(noise, step, lambda: step(*recipe), net)


TRAINERS = {  # option: its driver; name on the page; mistakes in the recipe that change its loss
    "diffsynth": (diffsynth, "DiffSynth-Studio, `FlowMatchSFTLoss`", [
        ("timestep=(1000 * sigma)", "timestep=(sigma)"), ("cond, uncond,", "cond, cond,")]),
    "musubi": (musubi, "musubi-tuner, `process_batch`", [
        ("1000 * sigma + offset", "1000 * sigma"), ("[empty] * len", "[empty * 0] * len")]),
    "ai_toolkit": (ai_toolkit, "ai-toolkit, `train_single_accumulation`", [
        ("1000 * sigma, cond", "sigma, cond"), ("mask.sqrt()", "mask")]),
    "simpletuner": (simpletuner, "SimpleTuner, `_compute_model_prediction_loss`", [
        ('new["timesteps"] =', 'new["times"] =')]),
    "sd_scripts": (sd_scripts, "sd-scripts, `process_batch`", [
        ("w * sigma**2", "w"), ("context=cond[0]", "context=0 * cond[0]")]),
    "onetrainer": (onetrainer, "OneTrainer, `predict`", [
        ("1000 * sigma - 1", "1000 * sigma"), ("(timestep + 1)", "timestep")]),
    "ltx_video": (ltx_video, "LTX-Video-Trainer, `_training_step`", [
        ("torch.where(known, 0, ", "torch.where(known, 1000, "), ("1 / free", "0 * free + 1")]),
    "diffusion_pipe": (diffusion_pipe, "diffusion-pipe, `SD3Pipeline`", [
        ("detach(), 1000 * sigma", "detach(), sigma"), ("timestep / 1000", "timestep / 2000")]),
    "unirl": (unirl, "UniRL, `FlowMatchSFT`", [
        ('"sigma": sigma,', '"sigma": 1 - sigma,'), ("guidance_scale=4.5", "guidance_scale=1.5")]),
    "flow_matching": (flow_matching, "flow_matching, `train_one_epoch`", [
        ("-model(z, 1 - sigma", "model(z, 1 - sigma"), ("1 - t, config", "t, config")]),
}  # fmt: skip
ROUNDED = {  # of trainers that round their times: what makes the recipe do so, to compare
    "ltx_video": [("1000 * sigma.unsqueeze(1)", "(1000 * sigma).round().unsqueeze(1)")],
}
NO_BF16 = {"flow_matching"}  # in float32 under CUDA's autocast, which a CPU does not have


def row(name: str, checkout: str) -> str:
    """A line of the page's last table. In a process of its own: two trainers have packages of the
    same name."""
    driver, title, wrong = TRAINERS[name]
    folder = Path(checkout)
    sys.path[:0] = [str(folder), str(folder / "src"), str(folder / "examples" / "image")]
    sys.meta_path.insert(0, Absent())
    texts = [(FILES / f"soar_{name}.py").read_text(), *PAGE.get(title.split(",")[0], [])]
    cells, failed = [title, str(sum(text.count("\n") for text in texts))], []
    with TemporaryDirectory() as work, contextlib.chdir(work):  # SimpleTuner writes a log there
        for dtype in DTYPES:
            if name in NO_BF16 and dtype == torch.bfloat16:
                cells.append("-")
                continue
            trainer = driver(folder, dtype)
            cells.append(f"{off(trainer, *ROUNDED.get(name, [])):.0e}")
            failed += failures(trainer, wrong, dtype)
    return f"| {' | '.join(cells)} | {'no: ' + '; '.join(failed) if failed else 'yes'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True, help="made if it is not there")
    for name in TRAINERS:
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT")
    args = vars(parser.parse_args())
    python = environment(args["environment"], PACKAGES, with_ours=True)
    for name in TRAINERS:
        if args[name]:
            call = f"row({name!r}, {str(args[name].resolve())!r})"
            code = f"from experiments.port.run_hooks import row; print({call})"
            print(run(python, "-c", code).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
