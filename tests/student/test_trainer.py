from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.manifest import Shards, open_shards
from student.config import TrainConfig
from student.data import TRAIN, Order, load_examples
from student.model import Student
from student.trainer import Trainer

CONFIG = TrainConfig(epochs=3, batch_size=16)


def run_steps(model: Student, shards: Shards, order: Order, steps: int, wrap: bool = False) -> list[float]:
    examples = load_examples(shards, TRAIN)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if wrap else model
    trainer = Trainer(wrapped, CONFIG, steps, 3e-3, torch.device("cpu"))
    batches = [indices for epoch in range(1, 9) for indices in order.epoch(epoch)][:steps]
    return [trainer.step(examples.batch(i), CONFIG.batch_size)[0].means()["loss"] for i in batches]


def test_training_learns(model: Student, shards: Shards) -> None:
    losses = run_steps(model, shards, Order(len(load_examples(shards, TRAIN)), 16, 0, 0, 1), 60)
    assert losses[-1] < 0.4 * losses[0]


def test_same_seed_same_weights(model: Student, shards: Shards) -> None:
    twin = copy.deepcopy(model)
    order = Order(len(load_examples(shards, TRAIN)), 16, 0, 0, 1)
    assert run_steps(model, shards, order, 5) == run_steps(twin, shards, order, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def _worker(rank: int, folder: str, model: Student, shards_folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = copy.deepcopy(model)  # what spawn hands over lies in memory both workers share
    shards = open_shards(shards_folder)
    losses = run_steps(model, shards, Order(len(load_examples(shards, TRAIN)), 16, 0, rank, 2), 4, wrap=True)
    if rank == 0:
        torch.save({"losses": losses, "weights": model.state_dict()}, f"{folder}/result.pt")
    dist.destroy_process_group()


def test_two_workers_equal_one(model: Student, shards: Shards, tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path), model, shards.folder), nprocs=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    losses = run_steps(model, shards, Order(len(load_examples(shards, TRAIN)), 16, 0, 0, 1), 4)
    np.testing.assert_allclose(result["losses"], losses, rtol=1e-6)
    ours, theirs = (torch.cat([w.flatten() for w in weights.values()]) for weights in (model.state_dict(), result["weights"]))
    assert (ours - theirs).norm() / ours.norm() < 1e-6


def test_the_curriculum_meets_both_ends(model: Student) -> None:
    trainer = Trainer(model, CONFIG, 10, 3e-3, torch.device("cpu"))
    assert trainer.kl_weight() == pytest.approx(0.8)
    trainer.step_index = 9
    assert trainer.kl_weight() == pytest.approx(0.2)


def test_measuring_changes_nothing_and_does_not_depend_on_batches(model: Student, shards: Shards) -> None:
    examples = load_examples(shards, TRAIN)
    trainer = Trainer(model, CONFIG, 10, 3e-3, torch.device("cpu"))
    before = copy.deepcopy(model.state_dict())
    order = np.arange(30)
    one = trainer.measure([examples.batch(order)])
    three = trainer.measure(examples.batch(part) for part in np.split(order, [3, 11]))
    assert one == pytest.approx(three, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
