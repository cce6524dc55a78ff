"""The recipes for trainers with hooks, in stubs of those trainers: what each method has or calls.

The trainers' real code is run by `python -m experiments.port.run_hooks`, whose checks these are.
"""

import contextlib
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

import soar
from experiments.port.run_hooks import (
    BATCH,
    TRAINERS,
    Recipe,
    Trainer,
    called,
    failures,
    gradients,
    latents_and_noise,
    off,
    randn,
    sd3,
)  # fmt: skip
from experiments.port.run_recipes import PAGE

Z0, NOISE = latents_and_noise(BATCH, 16, 8, 8)
COND, EMPTY = randn(10, BATCH, 5, 8), randn(12, 1, 5, 8)
SIGMAS = torch.tensor([0.9, 0.2])
ROWS = torch.tensor([1.0, 3.0])  # weights of rows
F32 = torch.float32


class Net(torch.nn.Module):
    """A small Stable Diffusion 3, called as net(z, time, cond)."""

    def __init__(self):
        super().__init__()
        self.sd3 = sd3(SD3Transformer2DModel, F32)

    def forward(self, z, time, cond):
        pooled = torch.ones(len(z), 8, dtype=z.dtype)
        text = {"encoder_hidden_states": cond, "pooled_projections": pooled}
        return self.sd3(z, timestep=time, return_dict=False, **text)[0]

    def plain_loss(self):
        return errors(lambda z, s: self(z, 1000 * s, COND)).mean()


def errors(model, sigmas: Tensor = SIGMAS, rows: int = BATCH) -> Tensor:
    """(B, ...): of a model(z, sigma) on the ideal path."""
    z0, z1, s = Z0[:rows], NOISE[:rows], sigmas.view(-1, 1, 1, 1)
    return (model((1 - s) * z0 + s * z1, sigmas) - (z1 - z0)) ** 2


def fake(patch, path: str, **names) -> ModuleType:
    """A module that has these names, and its packages."""
    package, _, name = path.rpartition(".")
    module = sys.modules.get(path, ModuleType(path))
    patch.setitem(sys.modules, path, module)
    vars(module).update(names)
    if package:
        setattr(fake(patch, package), name, module)
    return module


def pasted(block: str, **names):
    """What a block of the page returns, as a function's body where these names are."""
    exec(f"def function():\n{textwrap.indent(block, '    ')}", names)
    return names["function"]()


def plain() -> SimpleNamespace:
    """What the recipes call of accelerate's Accelerator."""
    return SimpleNamespace(
        backward=Tensor.backward, process_index=0, device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )  # fmt: skip


# --- The stubs ---


def musubi(patch, offset: int = 1) -> Trainer:
    """WanNetworkTrainer, called at 1000 sigma + 1 but in mode sigma."""
    net = Net()

    class WanNetworkTrainer:
        def get_noisy_model_input_and_timesteps(self, *_):
            return None, 1000 * SIGMAS + offset

        def call_dit(self, args, accelerator, transformer, latents, batch, noise, noisy, time, _):
            return SimpleNamespace(pred=net(noisy, time, torch.stack(batch["t5"])))

    save_file({"varlen_t5_float32": EMPTY[0]}, "empty_wan_te.safetensors")
    mode = "shift" if offset else "sigma"
    args = SimpleNamespace(seed=None, weighting_scheme="none", timestep_sampling=mode)
    call = (args, plain(), None, None, {"timesteps": None, "t5": list(COND)}, Z0, NOISE)

    def ours():
        fake(patch, "musubi_tuner.wan_train_network", WanNetworkTrainer=WanNetworkTrainer)
        trainer = Recipe.load("soar_musubi").SoarTrainer()
        loss, metrics = trainer.process_batch(*call, None, F32, F32, None, 0)
        assert metrics == {}
        return loss

    theirs = lambda: errors(lambda z, s: net(z, 1000 * s + offset, COND)).mean()  # noqa: E731
    return Trainer(NOISE, theirs, ours, net)


def ai_toolkit(patch, **settings) -> Trainer:
    """SDTrainer's method, at the place of its chain of losses; the loss is multiplied later."""
    names = "linear_timesteps linear_timesteps2 do_guidance_loss diff_output_preservation"
    config = dict.fromkeys(f"{names} blank_prompt_preservation".split(), False)
    config |= {"loss_type": "soar", "timestep_type": "sigmoid"} | settings
    net, mask = Net(), randn(6, BATCH, 1, 8, 8).abs()
    trainer = {
        "train_config": SimpleNamespace(**config), "accelerator": plain(), "device_torch": "cpu",
        "sd": SimpleNamespace(condition_noisy_latents=lambda z, batch: 2 * z),
        "predict_noise": lambda x, time, cond, batch: net(x, time, cond),
        "unconditional_embeds": EMPTY,
    }  # fmt: skip

    def ours():
        Recipe.load("soar_ai_toolkit")
        return pasted(
            f"if False:\n    pass\n{PAGE['ai-toolkit'][0]}return loss\n",
            self=SimpleNamespace(**trainer), timesteps=1000 * SIGMAS, conditional_embeds=COND,
            batch=SimpleNamespace(latents=Z0), pred_kwargs={}, mask_multiplier=mask,
            loss_multiplier=torch.full((BATCH, 1, 1, 1), 3.0), concat_prompt_embeds=torch.cat,
        )  # fmt: skip

    theirs = lambda: (errors(lambda z, s: net(2 * z, 1000 * s, COND)) * mask).mean()  # noqa: E731
    return Trainer(NOISE, theirs, ours, net, lambda loss: (3 * loss).backward())


def simpletuner(patch, loss_type: str = "l2") -> Trainer:
    """Trainer._compute_model_prediction_loss, and the model that it calls."""
    net = Net()
    model = SimpleNamespace(
        flow_matching_timesteps_from_sigmas=lambda sigmas: 1000 * sigmas,
        prediction_to_noiseward_flow=lambda v: -v,
    )

    def model_predict(prepared_batch):
        b = prepared_batch
        text = b["encoder_hidden_states"]
        assert b["encoder_attention_mask"] == ("prompt's" if text is COND else "empty's")
        return {"model_prediction": net(b["noisy_latents"], b["timesteps"], text)}

    batch = {
        "latents": Z0, "encoder_hidden_states": COND, "encoder_attention_mask": "prompt's",
        "sigmas": SIGMAS, "timesteps": 1000 * SIGMAS, "negative_encoder_attention_mask": "empty's",
        "negative_encoder_hidden_states": EMPTY.expand(BATCH, -1, -1),
    }  # fmt: skip

    def ours():
        Recipe.load("soar_simpletuner")
        trainer = SimpleNamespace(
            config=SimpleNamespace(seed=None, loss_type=loss_type), model=model,
            accelerator=plain(), model_predict=model_predict,
        )  # fmt: skip
        loss, *rest = pasted(PAGE["SimpleTuner"][0], self=trainer, prepared_batch=batch)
        assert rest == [{}, loss, None, {}] and not rest[1].requires_grad
        return loss

    theirs = lambda: errors(lambda z, s: -net(z, 1000 * s, COND)).mean()  # noqa: E731
    return Trainer(NOISE, theirs, ours, net)


def sd_scripts(patch, **more) -> Trainer:
    """Sd3NetworkTrainer, between its parent's process_batch and post_process_loss."""
    net = Net()
    utils = SimpleNamespace(
        get_noisy_model_input_and_timesteps=lambda *_: (None, 1000 * SIGMAS, None),
        compute_loss_weighting_for_sd3=lambda weighting_scheme, sigmas: torch.ones_like(sigmas),
    )
    concat = lambda lg, t5, pooled: (torch.cat([lg, t5], 1), pooled)  # noqa: E731
    strategy = SimpleNamespace(get_strategy=lambda: SimpleNamespace(concat_encodings=concat))
    base = SimpleNamespace(TextEncodingStrategy=strategy)
    fake(patch, "library", sd3_train_utils=utils, strategy_base=base)
    text = [EMPTY, torch.zeros(1, 0, 8), torch.zeros(1, 8)]
    kind = type("Trainer", (), {"sample_prompts_te_outputs": {"": text}})
    fake(patch, "sd3_train_network", Sd3NetworkTrainer=kind)
    args = SimpleNamespace(loss_type="l2", masked_loss=False, seed=0, weighting_scheme="none",
                           gradient_checkpointing=False)  # fmt: skip
    conds = [COND, torch.zeros(BATCH, 0, 8), torch.zeros(BATCH, 8), None, None, None]
    unet = lambda z, t, context, y: net(z, t, context)  # noqa: E731
    call = (args, plain(), None, Z0, {"loss_weights": ROWS} | more, conds, unet, None)

    def ours():
        trainer = Recipe.load("soar_sd_scripts").SoarTrainer()
        pred, target, *_ = trainer.get_noise_pred_and_target(*call, F32, True)
        loss = F.mse_loss(pred, target, reduction="none").mean([1, 2, 3]) * ROWS
        return trainer.post_process_loss(loss, args, None, None).mean()

    def theirs():  # it compares clean latents
        error = errors(lambda z, s: net(z, 1000 * s, COND)).mean([1, 2, 3])
        return (ROWS * SIGMAS**2 * error).mean()

    return Trainer(NOISE, theirs, ours, net)


def diffsynth(patch, **more) -> Trainer:
    """What task_to_loss gives a loss, one sample, and what of the pipeline it uses."""
    net, sigmas = Net(), soar.sigma_from_t(torch.linspace(1, 0.001, 1000), 3.0)

    def model_fn(dit, latents, timestep, prompt_emb, use_gradient_checkpointing, **kwargs):
        return dit(latents, timestep, prompt_emb)

    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=1000 * sigmas)
    scheduler.training_weight = lambda time: 1 + time.sum() / 1000
    pipe = SimpleNamespace(in_iteration_models=("dit",), torch_dtype=F32, device="cpu", dit=net,
                           model_fn=model_fn, scheduler=scheduler)  # fmt: skip
    shared = {"input_latents": Z0[:1], "use_gradient_checkpointing": True, "cfg_scale": 2} | more
    text = {"prompt_emb": COND[:1]}, {"prompt_emb": EMPTY}

    def theirs():
        sigma = sigmas[torch.randint(0, 1000, (1,))]
        return (1 + sigma) * errors(lambda z, s: net(z, 1000 * s, COND[:1]), sigma, 1).mean()

    ours = lambda: Recipe.load("soar_diffsynth").soar_sft_loss(pipe, shared, *text)  # noqa: E731
    return Trainer(NOISE[:1], theirs, ours, net)


def onetrainer(patch, kind="STANDARD", offload=False, activations=False, **settings) -> Trainer:
    """BaseStableDiffusion3Setup.predict at the place of the page's block, then calculate_loss."""
    level_weights = SimpleNamespace(SIGMA="sigma", CONSTANT="constant")
    fake(patch, "modules.util.enum.LossWeight", LossWeight=level_weights)
    net, (predict, calculate_loss) = Net(), PAGE["OneTrainer"]

    def transformer(hidden_states, timestep, encoder_hidden_states, **_):
        return (net(hidden_states, timestep, encoder_hidden_states),)

    model = SimpleNamespace(
        transformer=transformer, train_dtype=SimpleNamespace(torch_dtype=lambda: F32),
        materialize_only_text_encoders=lambda: None, encode_text=lambda **_: (EMPTY, EMPTY[:, 0]),
        combine_text_encoder_output=lambda *x: x,
    )  # fmt: skip
    zeros = "mae_strength log_cosh_strength huber_strength masked_training offset_noise_weight"
    zeros += " perturbation_noise_weight multi_gpu text_encoder_layer_skip"
    zeros += " text_encoder_2_layer_skip text_encoder_3_layer_skip"
    encoders = [f"train_text_encoder{i}_or_embedding" for i in ("", "_2", "_3")]
    config = SimpleNamespace(**(
        dict.fromkeys(zeros.split(), 0) | dict.fromkeys(encoders, lambda: False) | settings
    ))  # fmt: skip
    config.mse_strength, config.loss_weight_fn = 0.5, "sigma"
    config.batch_size, config.gradient_accumulation_steps = 2, 3
    config.loss_scaler = SimpleNamespace(get_scale=lambda batch, steps: batch * steps)
    config.optimizer = SimpleNamespace(fused_back_pass=True)
    config.model_type = SimpleNamespace(has_conditioning_image_input=lambda: False)
    config.transformer = SimpleNamespace(
        attention_mask=False, offloading_enabled=lambda: offload, activation_offloading=activations
    )
    setup = {"train_device": "cpu", "setup_train_device": lambda *x: None}

    def ours():
        Recipe.load("soar_onetrainer")
        data = pasted(
            f"{predict}return {{'own': 'the own loss'}}\n", torch=torch, model=model,
            self=SimpleNamespace(**setup), generator=torch.Generator().manual_seed(0),
            batch={"loss_weight": ROWS, "concept_type": [kind] * 2}, config=config,
            scaled_latent_image=Z0, timestep=(1000 * SIGMAS - 1).round(),
            text_encoder_output=COND, pooled_text_encoder_output=COND[:, 0],
        )  # fmt: skip
        return pasted(f"{calculate_loss}return data['own']\n", data=data)

    def theirs():
        error = errors(lambda z, s: net(z, 1000 * s - 1, COND)).mean([1, 2, 3])
        return (0.5 * 6 * ROWS * SIGMAS * error).mean()

    return Trainer(NOISE, theirs, ours, net)


def ltx_video(patch) -> Trainer:
    """LtxvTrainer._training_step from the page's block on; tokens are (B, 64, 16)."""
    net, mask = Net(), torch.ones(BATCH, 5, dtype=torch.bool)
    known = torch.arange(64) < torch.tensor([[16], [40]])
    tokens = lambda x: x.flatten(2).mT  # noqa: E731
    negative = {"prompt_embeds": EMPTY, "prompt_attention_mask": mask[:1]}
    sampler = SimpleNamespace(_get_shift_for_sequence_length=lambda tokens: tokens / 64)
    fake(patch, "ltxv_trainer.ltxv_utils", encode_prompt=lambda *x: negative)
    fake(patch, "ltxv_trainer.timestep_samplers", ShiftedLogitNormalTimestepSampler=sampler)

    def transformer(hidden_states, timestep, encoder_hidden_states, **rest):
        image = hidden_states.mT.reshape(Z0.shape)
        assert torch.equal(hidden_states[known], tokens(Z0)[known])
        time = timestep[:, -1] + timestep[:, 0]  # of the free tokens, and 0
        return (tokens(net(image, time, encoder_hidden_states)),)

    sampled = SimpleNamespace(negative_prompt="blurry", inference_steps=30, guidance_scale=3.5)
    trainer = {"_config": SimpleNamespace(validation=sampled, seed=1), "_accelerator": plain()}
    trainer |= {"_tokenizer": None, "_text_encoder": None, "_transformer": transformer}
    prepared = SimpleNamespace(
        latents=tokens(Z0), conditioning_mask=known, prompt_embeds=COND,
        prompt_attention_mask=mask, sigmas=SIGMAS.view(-1, 1, 1),
    )  # fmt: skip

    def ours():
        Recipe.load("soar_ltx_video")
        names = {"batch": {"latents": {"latents": tokens(Z0)}}, "training_batch": prepared}
        names |= {"self": SimpleNamespace(**trainer), "model_inputs": {"return_dict": False}}
        return pasted(PAGE["LTX-Video-Trainer"][0], **names)

    def theirs():
        given = known.view(BATCH, 1, 8, 8)
        error = errors(lambda z, s: net(torch.where(given, Z0, z), 1000 * s, COND))
        return sum(tokens(x[None])[0, ~row].mean() for x, row in zip(error, known)) / BATCH

    return Trainer(NOISE.flatten(2).mT, theirs, ours, net)


def diffusion_pipe(patch, **config) -> Trainer:
    """SD3Pipeline in DeepSpeed's engine: prepare_inputs, one layer, the loss of its output."""
    net = Net()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return net(*x[:3])

    class SD3Pipeline:
        def __init__(self, config):
            self.config = {"activation_checkpointing": True} | config

        def get_call_text_encoder_fn(self, encoder):
            return lambda captions, is_video: {"text": EMPTY, "pooled": EMPTY[:, 0]}

        def prepare_inputs(self, inputs, timestep_quantile=None):
            s = SIGMAS.view(-1, 1, 1, 1)
            noisy = (1 - s) * inputs["latents"] + s * NOISE
            features = (noisy, 1000 * SIGMAS, inputs["text"], inputs["pooled"])
            return features, (NOISE - inputs["latents"], inputs["mask"])

        def to_layers(self):
            return [Layer()]

        def get_loss_fn(self):
            return lambda output, label: F.mse_loss(output, label[0])

    fake(patch, "models.sd3", SD3Pipeline=SD3Pipeline)

    def ours():
        Recipe.load("soar_diffusion_pipe")
        pipe = eval(PAGE["diffusion-pipe"][0], {"config": config})
        pipe.get_call_text_encoder_fn(None)
        inputs = {"latents": Z0, "text": COND, "pooled": COND[:, 0], "mask": None}
        features, label = pipe.prepare_inputs(inputs)
        (layer,) = pipe.to_layers()
        return pipe.get_loss_fn()(layer(features), label)

    return Trainer(NOISE, net.plain_loss, ours, net)


def unirl(patch, scale: float = 1.0) -> Trainer:
    """FlowMatchSFT, which calls backward itself."""
    net = Net()

    class FlowMatchSFT:
        conditions_cls, params = None, SimpleNamespace(guidance_scale=1.0)

        def __init__(self, pipeline):
            self.stage = SimpleNamespace(predict_noise_at_step=self.predict)

        def predict(self, cond, sample, sigma, params):
            return net(sample, 1000 * sigma, cond.text)

        def _clean_latents(self, segment):
            return segment

        def _draw_sigma(self, batch, device, generator):
            return SIGMAS

    result = lambda loss, metrics, num_steps, has_backward: torch.tensor(loss)  # noqa: E731
    base = {"AlgorithmStepResult": result, "typed_conditions": lambda x, _: x}
    fake(patch, "unirl.algorithms.base", **base)
    fake(patch, "unirl.algorithms.sft", FlowMatchSFT=FlowMatchSFT)
    fake(patch, "unirl.types.primitives", Texts=lambda texts: texts)
    text = SimpleNamespace(embed=lambda texts: EMPTY.expand(len(texts), -1, -1))

    def ours():
        kind = Recipe.load("soar_unirl").FlowMatchSOAR
        return kind(pipeline=SimpleNamespace(text_embed=text)).compute_loss_and_backward(
            conditions=SimpleNamespace(text=COND), segment=Z0, advantages=None,
            training_progress=0.0, loss_scale=scale,
        )  # fmt: skip

    return Trainer(NOISE, net.plain_loss, ours, net)


def flow_matching(patch) -> Trainer:
    """train_one_epoch at the places of the page's blocks; its time is 1 at clean data."""
    net, empty = Net(), EMPTY.expand(BATCH, -1, -1)
    model = lambda x, t, extra: net(x, t, extra.get("label", empty))  # noqa: E731

    def ours():
        Recipe.load("soar_flow_matching")
        names = {"torch": torch, "device": "cpu", "t": 1 - SIGMAS, "samples": Z0, "model": model}
        names |= {"conditioning": {"label": COND}, "args": SimpleNamespace(cfg_scale=1.5)}
        exec("".join(PAGE["flow_matching"]), names)
        return names["loss"]

    theirs = lambda: errors(lambda z, s: -net(z, 1 - s, COND)).mean()  # noqa: E731
    return Trainer(NOISE, theirs, ours, net)


STUBS = (musubi, ai_toolkit, simpletuner, sd_scripts, diffsynth, onetrainer, ltx_video,
         diffusion_pipe, unirl, flow_matching)  # fmt: skip


@pytest.fixture
def patch(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # musubi's recipe reads a file there
    return monkeypatch


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.__name__)
def test_recipe_is_its_loss_at_lambda_zero_and_takes_a_soar_step(stub, patch):
    trainer, (*_, wrong) = stub(patch), TRAINERS[stub.__name__]
    assert off(trainer) < 1e-5
    assert failures(trainer, wrong, F32) == []


@pytest.mark.parametrize("stub, settings", [
    (ai_toolkit, {"linear_timesteps2": True}), (ai_toolkit, {"do_guidance_loss": True}),
    (ai_toolkit, {"blank_prompt_preservation": True}), (simpletuner, {"loss_type": "huber"}),
    (sd_scripts, {"alpha_masks": torch.ones(BATCH, 8, 8)}), (onetrainer, {"masked_training": True}),
    (onetrainer, {"train_text_encoder_3_or_embedding": lambda: True}),
    (onetrainer, {"kind": "PRIOR_PREDICTION"}), (onetrainer, {"activations": True}),
    (onetrainer, {"offload": True}), (diffsynth, {"cfg_scale": 1}),
    (diffsynth, {"min_timestep_boundary": 1}),
    (diffsynth, {"first_frame_latents": 1}), (diffusion_pipe, {"huber_delta": 1}),
])  # fmt: skip
def test_a_setting_that_a_recipe_would_get_wrong_is_refused(stub, settings, patch):
    with pytest.raises(ValueError, match="this recipe is for|SOAR|loss_type|onetrainer: not with"):
        stub(patch, **settings).ours()


def test_musubi_in_mode_sigma_has_no_offset(patch):
    assert off(musubi(patch, offset=0)) < 1e-5


def test_validation_keeps_the_trainers_own_loss(patch):
    with torch.no_grad():
        assert onetrainer(patch).ours() == "the own loss"
        trainer = diffusion_pipe(patch)
        assert off(trainer) < 1e-5 and not called(trainer.ours, NOISE).terms


def test_unirl_scales_every_term(patch):
    found = []
    for scale in (1.0, 0.25):
        trainer = unirl(patch, scale)
        found.append(gradients(called(trainer.ours, NOISE).loss, trainer))
    assert len(found[0]) > 10
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x / 4)


# --- streamed.py ---


@pytest.mark.parametrize("backward, low, high", [
    (lambda loss: (2**16 * loss / 4).backward(), 0.9999, 1.0001),
    (lambda loss: (2**16 * loss).backward(), 2, 9),  # without the division
    (lambda loss: (loss / 4).backward(), 0, 0.7),  # without the scale
])  # fmt: skip
def test_whole_sees_a_backward_that_does_less_than_the_trainers(backward, low, high, patch):
    """Of a trainer with a GradScaler and four micro-batches; at lambda 0 nothing is to be seen."""
    trainer = simpletuner(patch)._replace(backward=lambda loss: (2**16 * loss / 4).backward())
    patch.setitem(globals(), "plain", lambda: SimpleNamespace(backward=backward, process_index=0))

    def norm(lambda_aux, one_sum):
        loss = called(trainer.ours, NOISE, lambda_aux, one_sum=one_sum).loss
        return sum(x.square().sum() for x in gradients(loss, trainer).values()).sqrt()

    assert norm(0.0, False) == norm(0.0, True)
    assert low < norm(1.0, False) / norm(1.0, True) < high
