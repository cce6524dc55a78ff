"""Run the recipes of recipes.md's "Trainers with hooks" in those trainers' own code.

    python -m experiments.port.run_hooks --diffsynth CHECKOUT --musubi CHECKOUT --sd_scripts CHECKOUT \\
        --ai_toolkit CHECKOUT --simpletuner CHECKOUT --onetrainer CHECKOUT --ltx_video CHECKOUT \\
        --diffusion_pipe CHECKOUT --unirl CHECKOUT --flow_matching CHECKOUT

Each CHECKOUT, a clone of the repository that recipes.md names, may be left out. Real are the
trainer's modules, its class and method that make the loss, its model's class (small, random
weights), its embeddings of text where it has a class for them, and accelerate. The recipe is
recipes/'s file, and the lines that the page shows, pasted where it says. Not real: latents and
embeddings are random, so no VAE and no text encoder runs; no optimizer steps; some trainers and
models are made without their constructors, which load files, and get the attributes that this path
reads; noise and levels are given to them. A few casts in DiffSynth's and musubi's models are put
right for a CPU. Needs torchvision, av, deepspeed, easydict, ftfy, gguf, imageio, imagesize, kornia,
lycoris-lora, parse, sentencepiece, toml, torchmetrics and voluptuous; what else the trainers import
and do not call here is in ABSENT.

"Off" is the relative difference of the trainer's own loss from the recipe's at lambda_aux = 0, on
the same noise and levels. SOAR "ran", with the recipe's settings: seven terms, whose sum is
returned and finite; gradients in every weight that the trainer's own loss reaches, which are those
of one sum, where the recipe goes term by term; a rollout that is guided, by another text; and each
version of WRONG, which is the recipe with one mistake, has another loss. Prints rows of the page's
last table.
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
from experiments.port.run_recipes import HERE, blocks

PAGE = blocks((HERE / "recipes.md").read_text())
FILES = HERE / "recipes"
BATCH = 2
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
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


def forget(*packages: str) -> None:
    """Two trainers have packages of these names."""
    for name in [x for x in sys.modules if x.split(".")[0] in packages]:
        del sys.modules[name]


def above(line: str, block: str) -> tuple[str, str]:
    """The edit that puts a block above a line, at its indentation."""
    indent = line[: -len(line.lstrip())]
    return line, textwrap.indent(block, indent) + line


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
        module = edited(FILES / f"{name}.py", *cls.edits)
        sys.modules[name] = module
        return module


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
    # Of four micro-batches: backward divides by 4, which streamed must do too.
    return accelerate.Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=4)


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
            module.soar_sft_loss = Recipe.load("soar_diffsynth").soar_sft_loss
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
        with TemporaryDirectory() as work, contextlib.chdir(work):
            save_file({"varlen_t5": randn(3, 5, 8)}, "empty_wan_te.safetensors")
            with mock.patch.object(script, "WanNetworkTrainer", own):
                return step(Recipe.load("soar_musubi").SoarTrainer)

    return noise, lambda: step(own), ours, model, accelerator(dtype).backward


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
        return step(Recipe.load("soar_sd_scripts").SoarTrainer)

    theirs = lambda: step(script.Sd3NetworkTrainer)  # noqa: E731
    return noise, theirs, ours, model, accelerator(dtype).backward


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
        Recipe.load("soar_ai_toolkit")
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
        Recipe.load("soar_simpletuner")
        trainer = object.__new__(edited(file, *edits).Trainer)
        trainer.__dict__.update(
            config=config, accelerator=accelerator(dtype), model=model, _tlora_active=False,
            noise_scheduler=SimpleNamespace(config=SimpleNamespace(prediction_type="flow")),
        )  # fmt: skip
        return trainer._compute_model_prediction_loss(dict(batch))[0]

    recipe = above(anchor, PAGE["SimpleTuner"][0])
    return noise, step, lambda: step(recipe), net, accelerator(dtype).backward


def onetrainer(checkout: Path, dtype: torch.dtype) -> tuple:
    """BaseStableDiffusion3Setup.predict and calculate_loss."""
    sys.path.insert(0, str(checkout))
    from diffusers import SD3Transformer2DModel
    from modules.model.StableDiffusion3Model import StableDiffusion3Model
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.enum.DataType import DataType
    from modules.util.enum.LossScaler import LossScaler
    from modules.util.enum.ModelType import ModelType
    from modules.util.TrainProgress import TrainProgress

    net = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=4096, caption_projection_dim=16, pooled_projection_dim=2048,
        pos_embed_max_size=8,
    )  # fmt: skip
    net = filled(net, dtype)
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
    batch = {"latent_image": randn(1, BATCH, 16, 8, 8).to(dtype)}
    batch["loss_weight"] = torch.tensor([1.0, 3.0])
    widths = (768, 1280, 4096)
    for i, width in enumerate(widths):
        batch[f"text_encoder_{i + 1}_hidden_state"] = randn(2 + i, BATCH, 5, width).to(dtype)
        batch[f"text_encoder_{i + 1}_pooled_state"] = randn(5 + i, BATCH, width).to(dtype)
    empty = [randn(8, 1, 5, width) for width in widths] + [randn(9, 1, x) for x in widths[:2]]
    encode = model.encode_text
    model.encode_text = lambda text=None, **x: encode(**x) if text is None else empty
    noise = randn(4, BATCH, 16, 8, 8).to(dtype)
    file = checkout / "modules" / "modelSetup" / "BaseStableDiffusion3Setup.py"
    predict, loss = " " * 12 + "predicted_flow = ", " " * 8 + "return self._flow_matching_losses("
    recipe = [above(x, block) for x, block in zip((predict, loss), PAGE["OneTrainer"])]

    def step(*edits):
        Recipe.load("soar_onetrainer")
        kind = edited(file, *edits).BaseStableDiffusion3Setup
        kind.__abstractmethods__ = frozenset()
        setup = kind(CPU, CPU, False)
        setup._create_noise = lambda *x: noise
        setup.setup_train_device = lambda *x: None
        data = setup.predict(model, batch, config, TrainProgress())
        return setup.calculate_loss(model, batch, data, config)

    return noise, step, lambda: step(*recipe), net


def ltx_video(checkout: Path, dtype: torch.dtype) -> tuple:
    """LtxvTrainer._training_step with a given first frame."""
    sys.path.insert(0, str(checkout / "src"))
    from diffusers import LTXVideoTransformer3DModel
    from ltxv_trainer.config import ConditioningConfig
    from ltxv_trainer.timestep_samplers import UniformTimestepSampler
    from ltxv_trainer.training_strategies import StandardTrainingStrategy

    net = LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=8,
    )  # fmt: skip
    net = filled(net, dtype)
    latents, noise = randn(1, BATCH, 24, 16).to(dtype), randn(4, BATCH, 24, 16).to(dtype)
    sizes = {"num_frames": 2, "height": 3, "width": 4}
    batch = {"latents": {name: torch.full((BATCH,), x) for name, x in sizes.items()}}
    batch["latents"]["latents"] = latents
    mask = torch.ones(BATCH, 5, dtype=torch.bool)
    mask[0, 3:] = False
    prompts = {"prompt_embeds": randn(2, BATCH, 5, 8).to(dtype), "prompt_attention_mask": mask}
    batch["conditions"] = prompts
    tokens = SimpleNamespace(input_ids=torch.zeros(1, 5), attention_mask=torch.ones(1, 5))

    class Text:
        device, dtype = CPU, torch.float32

        def __call__(self, ids):
            return (randn(3, 1, 5, 8),)

    file = checkout / "src" / "ltxv_trainer" / "trainer.py"
    recipe = above(" " * 8 + "# Run transformer forward pass\n", PAGE["LTX-Video-Trainer"][0])
    def autocast(**inputs):  # as accelerate wraps the model
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return net(**inputs)

    settings = SimpleNamespace(negative_prompt="", inference_steps=50, guidance_scale=3.5)
    conditioning = ConditioningConfig(mode="none", first_frame_conditioning_p=1.0)

    def step(*edits):
        Recipe.load("soar_ltx_video")
        trainer = object.__new__(edited(file, *edits).LtxvTrainer)
        trainer._config = SimpleNamespace(validation=settings, seed=42)
        trainer._accelerator, trainer._transformer = accelerator(dtype), autocast
        trainer._tokenizer, trainer._text_encoder = (lambda *x, **y: tokens), Text()
        trainer._training_strategy = StandardTrainingStrategy(conditioning)
        trainer._timestep_sampler = UniformTimestepSampler(0.1, 0.9)
        torch.manual_seed(5)  # the levels
        with mock.patch("torch.randn_like", lambda x, **y: noise):
            return trainer._training_step(batch)

    return noise, step, lambda: step(recipe), net, accelerator(dtype).backward


def diffusion_pipe(checkout: Path, dtype: torch.dtype) -> tuple:
    """SD3Pipeline.prepare_inputs, the layers and the loss, as DeepSpeed's engine calls them."""
    forget("models", "utils")
    sys.path.insert(0, str(checkout))
    from diffusers import SD3Transformer2DModel
    from models.sd3 import SD3Pipeline

    net = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    net = filled(net, dtype)

    def text(seed, rows):
        shapes = {"prompt_embed": (5, 6), "prompt_2_embed": (5, 6), "t5_prompt_embed": (4, 16)}
        shapes |= {"pooled_prompt_embed": (8,), "pooled_prompt_2_embed": (8,)}
        return {name: randn(seed, rows, *shape).to(dtype) for name, shape in shapes.items()}

    inputs = text(2, BATCH) | {"latents": randn(1, BATCH, 16, 8, 8), "mask": None}
    noise = randn(4, BATCH, 16, 8, 8)
    encoders = {f"text_encoder{x}": object() for x in ("", "_2", "_3")}

    def step(kind):
        pipe = object.__new__(kind)
        pipe.config, pipe.model_config = {"activation_checkpointing": True}, {"shift": 3.0}
        pipe.diffusers_pipeline = SimpleNamespace(transformer=net, **encoders)
        with mock.patch.object(SD3Pipeline, "get_call_text_encoder_fn",
                               lambda self, encoder: lambda captions, _: text(3, 1)):  # fmt: skip
            for encoder in encoders.values():
                pipe.get_call_text_encoder_fn(encoder)
        torch.manual_seed(5)  # the levels
        with mock.patch("torch.randn_like", lambda x: noise):
            x, (target, _) = pipe.prepare_inputs(dict(inputs))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for layer in pipe.to_layers():
                x = layer(x)
        return pipe.get_loss_fn()(x, (target, torch.tensor([])))

    def ours():
        return step(Recipe.load("soar_diffusion_pipe").SoarPipeline)

    return noise, lambda: step(SD3Pipeline), ours, net


def unirl(checkout: Path, dtype: torch.dtype) -> tuple:
    """FlowMatchSFT.compute_loss_and_backward with an SD3DiffusionStage."""
    sys.path.insert(0, str(checkout))
    from diffusers import SD3Transformer2DModel
    from unirl.algorithms.sft import FlowMatchSFT
    from unirl.models.sd3.conditions import SD3Conditions
    from unirl.models.sd3.diffusion import SD3DiffusionStage, SD3DiffusionStep
    from unirl.types.conditions import TextEmbedCondition
    from unirl.types.segments.latent import LatentSegment

    net = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    net = filled(net, dtype)
    bundle = SimpleNamespace(transformer=net, device=CPU)
    stage = SD3DiffusionStage(model=bundle, step=SD3DiffusionStep(), strategy=None)

    def text(seed):
        return TextEmbedCondition(embeds=randn(seed, BATCH, 5, 8), pooled=randn(seed, BATCH, 8))

    pipeline = SimpleNamespace(
        diffusion=stage, text_embed=SimpleNamespace(embed=lambda texts: text(3))
    )
    noise = randn(4, BATCH, 16, 8, 8)
    segment = LatentSegment(latents=randn(1, BATCH, 1, 16, 8, 8))

    def step(kind):
        params = SimpleNamespace(guidance_scale=1.0)
        algorithm = kind(
            pipeline=pipeline, params=params, conditions_cls=SD3Conditions, timestep_shift=3.0
        )
        normal = torch.randn

        def given(shape, **options):
            return noise if shape == noise.shape else normal(shape, **options)

        torch.manual_seed(5)  # the levels
        with mock.patch("torch.randn", given):
            result = algorithm.compute_loss_and_backward(
                conditions={"text": text(2)}, segment=segment, advantages=None,
                training_progress=0.0, loss_scale=0.25,
            )  # fmt: skip
        return torch.tensor(result.loss)

    def ours():
        return step(Recipe.load("soar_unirl").FlowMatchSOAR)

    return noise, lambda: step(FlowMatchSFT), ours, net


def flow_matching(checkout: Path, dtype: torch.dtype) -> tuple:
    """train_one_epoch, of one batch; its loss scaler is told of one micro-batch of two."""
    forget("models", "training")
    sys.path[:0] = [str(checkout), str(checkout / "examples" / "image")]
    from models.unet import UNetModel

    net = UNetModel(
        in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1,
        attention_resolutions=(2,), channel_mult=(1, 2), num_classes=3,
    )  # fmt: skip
    net = filled(net, dtype)
    noise = randn(4, BATCH, 4, 8, 8)
    data = [(randn(1, BATCH, 4, 8, 8), torch.tensor([0, 2]))]
    args = SimpleNamespace(
        accum_iter=2, discrete_flow_matching=False, class_drop_prob=0.0, skewed_timesteps=True,
        test_run=False, cfg_scale=1.5,
    )  # fmt: skip
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
        levels = lambda count, device: torch.tensor([0.1, 0.8])  # noqa: E731

        def scaler(loss, optimizer, parameters, update_grad):
            losses.append(2 * loss)  # the loss was divided by accum_iter

        module = edited(file, *edits)
        module.skewed_timestep_sample = levels
        torch.manual_seed(5)
        with mock.patch("torch.randn_like", lambda x: noise):
            lr = SimpleNamespace(step=lambda: None)
            module.train_one_epoch(net, data, optimizer, lr, CPU, 0, scaler, args)
        return losses[0]

    return noise, step, lambda: step(*recipe), net


TRAINERS = {  # option: heading of the page, function, file of recipes/, driver
    "diffsynth": ("DiffSynth-Studio", "FlowMatchSFTLoss", "soar_diffsynth", diffsynth),
    "musubi": ("musubi-tuner", "process_batch", "soar_musubi", musubi),
    "ai_toolkit": ("ai-toolkit", "train_single_accumulation", "soar_ai_toolkit", ai_toolkit),
    "simpletuner": (
        "SimpleTuner", "_compute_model_prediction_loss", "soar_simpletuner", simpletuner),
    "sd_scripts": ("sd-scripts", "process_batch", "soar_sd_scripts", sd_scripts),
    "onetrainer": ("OneTrainer", "predict", "soar_onetrainer", onetrainer),
    "ltx_video": ("LTX-Video-Trainer", "_training_step", "soar_ltx_video", ltx_video),
    "diffusion_pipe": ("diffusion-pipe", "SD3Pipeline", "soar_diffusion_pipe", diffusion_pipe),
    "unirl": ("UniRL", "FlowMatchSFT", "soar_unirl", unirl),
    "flow_matching": ("flow_matching", "train_one_epoch", "soar_flow_matching", flow_matching),
}  # fmt: skip
WRONG = {  # of each recipe: what is written wrong in its file, so that its loss must change
    "diffsynth": [
        ("timestep=(1000 * sigma)", "timestep=(sigma)"),
        ("cond, uncond,", "cond, cond,"),
    ],
    "musubi": [
        ("1000 * sigma + offset", "1000 * sigma"),
        ("[empty] * len", "[empty * 0] * len"),
    ],
    "ai_toolkit": [("1000 * sigma, cond", "sigma, cond"), ("mask.sqrt()", "mask")],
    "simpletuner": [('new["timesteps"] =', 'new["times"] =')],
    "sd_scripts": [("w * sigma**2", "w"), ("context=cond[0]", "context=0 * cond[0]")],
    "onetrainer": [("1000 * sigma - 1", "1000 * sigma"), ("(timestep + 1)", "timestep")],
    "ltx_video": [
        ("torch.where(known, 0, ", "torch.where(known, 1000, "),
        ("1 / free", "0 * free + 1"),
    ],
    "diffusion_pipe": [
        ("(z.detach(), 1000 * sigma", "(z.detach(), sigma"),
        ("timestep / 1000", "timestep / 2000"),
    ],
    "unirl": [
        ('"sigma": sigma,', '"sigma": 1 - sigma,'),
        ("guidance_scale=4.5", "guidance_scale=1.5"),
    ],
    "flow_matching": [
        ("return -model(z, 1 - sigma", "return model(z, 1 - sigma"),
        ("1 - t, config)", "t, config)"),
    ],
}
ROUNDED = {  # of trainers that round their times: what makes the recipe do so, to compare
    "ltx_video": ("1000 * sigma.unsqueeze(1)", "(1000 * sigma).round().unsqueeze(1)"),
}
NO_BF16 = {"flow_matching"}  # in float32 under CUDA's autocast, which a CPU does not have


def gradients(loss: Tensor, model: torch.nn.Module, backward: Callable) -> dict[str, Tensor]:
    """Those not 0, once the loss has run backward, unless the trainer already had it do so."""
    if loss.requires_grad:
        backward(loss)
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {name: x for name, x in found.items() if x.isfinite().all() and x.any()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float) -> bool:
    both = (torch.cat([x[name].flatten() for name in sorted(x)]).double() for x in (left, right))
    left, right = both
    return left.shape == right.shape and bool((left - right).norm() < rtol * right.norm())


def failures(name: str, trainer: tuple, dtype: torch.dtype) -> list[str]:
    """What of SOAR did not run as it must, see the top."""
    noise, theirs, ours, model, *backward = trainer
    backward = backward[0] if backward else Tensor.backward
    model.zero_grad()
    with blocks_see(noise):
        weights = gradients(theirs(), model, backward)
    with blocks_see(noise) as seen:
        loss = ours()
        found = gradients(loss, model, backward)
    with blocks_see(noise), mock.patch.object(Recipe, "one_sum", True):
        at_once = gradients(ours(), model, backward)
    checks = {
        "seven terms": len(seen.terms) == 7,
        "their sum": abs(loss.item() / sum(seen.terms) - 1) < 1e-5,
        "guided": seen.guided,
        "all weights": bool(weights) and set(weights) <= set(found),
        "gradients": equal(found, at_once, 1e-4 if dtype == torch.float32 else 3e-2),
    }
    for wrong in WRONG[name]:
        with blocks_see(noise), mock.patch.object(Recipe, "edits", [wrong]):
            checks[wrong[1]] = abs(ours().item() / loss.item() - 1) > 1e-6
    return [check for check, holds in checks.items() if not holds]


def measure(name: str, checkout: Path, dtype: torch.dtype) -> tuple[float, list[str]]:
    """How far the recipe is off; what did not run."""
    trainer = TRAINERS[name][3](checkout, dtype)
    noise, theirs, ours, *_ = trainer
    edits = [ROUNDED[name]] if name in ROUNDED else []
    with blocks_see(noise, 0.0), mock.patch.object(Recipe, "edits", edits):
        off = abs(ours().item() / theirs().item() - 1)
    return off, failures(name, trainer, dtype)


def lines(name: str) -> int:
    """Of the recipe's file, and of what the page pastes."""
    heading, _, file, _ = TRAINERS[name]
    text = (FILES / f"{file}.py").read_text()
    return sum(block.count("\n") for block in [text, *PAGE.get(heading, [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TRAINERS:
        parser.add_argument(f"--{name}", type=Path)
    args = vars(parser.parse_args())
    given = {name: args[name].resolve() for name in TRAINERS if args[name]}
    sys.meta_path.insert(0, Absent())
    os.chdir(mkdtemp())  # SimpleTuner writes a log there
    for name, checkout in given.items():
        heading, function, *_ = TRAINERS[name]
        dtypes = [x for x in DTYPES if x == "float32" or name not in NO_BF16]
        off, failed = zip(*(measure(name, checkout, DTYPES[x]) for x in dtypes))
        cells = [f"{heading}, `{function}`", str(lines(name))]
        cells += [f"{x:.0e}" for x in off] + [""] * (len(DTYPES) - len(off))
        cells.append("no: " + "; ".join(sum(failed, [])) if any(failed) else "yes")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
