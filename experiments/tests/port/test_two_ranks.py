"""The recipes under DistributedDataParallel, on two ranks, and over micro-batches."""

import contextlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import soar
from experiments.port.run_hooks import randn
from experiments.port.run_recipes import HERE, PAGE
from experiments.tests.top.training import ends

BATCH = 4


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


class Net(torch.nn.Module):
    """A small model, whose every weight has a gradient."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(randn(1, 16, 1, 1))
        self.text = torch.nn.Parameter(randn(2, 8, 16))

    def no_sync(self):
        return contextlib.nullcontext()

    def forward(self, z, time, cond):
        text = cond.mean(1) @ self.text
        return self.scale * z + time.view(-1, 1, 1, 1) / 1000 * text[..., None, None]


LEVELS = torch.tensor([0.9, 0.2, 0.7, 0.4])


def recipe(form, model, rows, **options):
    """A step of one form of recipe on some rows of the batch, with these rows of its draws."""
    z0, cond = randn(3, BATCH, 16, 4, 4), randn(4, BATCH, 5, 8)
    z1, t, u, path_noise, _ = soar.draw(z0.shape, soar.SoarConfig(), torch.Generator())
    draws = soar.Draws(z1[rows], t[rows], u[:, :, rows], path_noise[:, rows], None)
    z0, cond, levels = z0[rows], cond[rows], LEVELS[rows]
    empty = randn(5, 1, 5, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soar, "draw", lambda *_: draws)
        names = {"torch": torch, "device": "cpu", "seed": None, "rank": 0, "model": model}
        names |= {"encode": lambda prompts: empty, "latents": z0, "cond": cond}
        names["sample_levels"] = lambda count: levels
        if form == "terms":
            for block in PAGE["Any trainer"]:
                exec(block, names)
            return
        velocity = lambda z, sigma, cond: model(z, 1000 * sigma, cond)  # noqa: E731
        text = (cond, empty.expand(len(z0), -1, -1), soar.SoarConfig())
        if form == "hook":
            exec((HERE / "recipes/streamed.py").read_text(), names)
            call = (torch.Tensor.backward, velocity, z0, levels, *text, None)
            names["streamed"](*call, **options).backward()
            return
        draws = soar.with_levels(draws, levels, soar.SoarConfig())
        if form == "no_sync":
            names |= {"soar_terms": soar.soar_terms, "z0": z0, "velocity": velocity, "draws": draws}
            exec(PAGE["DDP"][0], names | {"uncond": text[1], "config": text[2]})
        else:
            soar.soar_loss(velocity, z0, draws, *text, **options).backward()


FORMS = ("terms", "hook", "sum", "no_sync")
ALL_REDUCES = {"terms": 7, "hook": 7, "sum": 1, "no_sync": 1}  # the model is one bucket


def run_rank(folder):
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    made = {}
    for form in FORMS:
        net, reduced = Net(), []
        ddp = DistributedDataParallel(net)

        def counted(_, bucket):
            reduced.append(bucket.index())
            return allreduce_hook(None, bucket)

        ddp.register_comm_hook(None, counted)
        recipe(form, ddp, slice(2 * rank, 2 * rank + 2))
        assert len(reduced) == ALL_REDUCES[form], (form, len(reduced))
        made[form] = gradients(net)
    save_file(made, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ended, said = ends(2, lambda: run_rank(folder), folder / "log")
    assert ended == [0, 0], said
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
def test_recipes_under_ddp_get_the_single_process_gradients_of_the_sum(form, ranks):
    whole, halves = Net(), Net()
    recipe("sum", whole, slice(0, BATCH))
    expected = gradients(whole)
    assert all(x.grad.any() for x in whole.parameters())
    for saved in ranks:
        assert_close(saved[form], expected, rtol=1e-4, atol=1e-6)
    for rows in (slice(0, 2), slice(2, BATCH)):  # accumulated by one process
        recipe(form, halves, rows)
    assert_close(gradients(halves) / 2, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["hook", "sum"])
def test_unequal_micro_batches_get_the_gradients_of_the_whole_with_a_normalizer(form):
    whole, parts, without = Net(), Net(), Net()
    recipe("sum", whole, slice(0, BATCH))
    config = soar.SoarConfig()
    normalizer = soar.loss_normalizer(soar.t_from_sigma(LEVELS), config) / 2  # the trainer's mean
    for rows in (slice(0, 1), slice(1, BATCH)):
        recipe(form, parts, rows, normalizer=normalizer)
        recipe(form, without, rows)
    assert_close(gradients(parts) / 2, gradients(whole), rtol=1e-4, atol=1e-6)
    for x, y in zip(without.parameters(), whole.parameters()):
        assert not torch.allclose(x.grad / 2, y.grad, rtol=0.01)
