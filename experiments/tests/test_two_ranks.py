"""soar_terms under DistributedDataParallel, as train.py runs it."""

import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import soar
from test_soar import Case

SHAPE = (4, 3, 2)
CONFIG = soar.SoarConfig(num_rollout_paths=2, num_aux_points=2, num_sampling_steps=2)
SEED = 7


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def run_rank(rank, folder):
    """Half of the batch: every term but the last under no_sync, the last one adds up the ranks'."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    case = Case(SHAPE, CONFIG, SEED)
    case.model.null.requires_grad_(False)  # no gradient reaches it: DDP would wait for one
    ddp = DistributedDataParallel(case.model)
    normalizer = soar.loss_normalizer(case.draws.t.double(), CONFIG) / 2  # DDP takes the mean
    terms = case.part(slice(2 * rank, 2 * rank + 2)).terms(ddp, normalizer=normalizer)
    for _ in range(CONFIG.num_rollout_paths * CONFIG.num_aux_points):
        with ddp.no_sync():
            next(terms).loss.backward()
    local = gradients(case.model)
    next(terms).loss.backward()
    both = gradients(case.model)
    assert not any(torch.equal(a, b) for a, b in zip(local, both))
    save_file({str(i): x for i, x in enumerate(both)}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_ranks_under_one_no_sync_schedule_get_the_single_process_gradients(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    case = Case(SHAPE, CONFIG, SEED)
    expected = [x for x in case.gradients(case.loss()) if x is not None]
    for rank in range(2):
        saved = load_file(tmp_path / f"{rank}.safetensors")
        both = [saved[str(i)] for i in range(len(saved))]
        assert_close(both, expected, rtol=1e-9, atol=1e-9)
