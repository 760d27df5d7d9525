"""Muon: its update is the orthogonal factor of the momentum; what it leaves to AdamW is torch's own."""

import pytest
import torch
from torch import nn

from latentgen.training.loop import LoopSettings
from latentgen.training.muon import MATCHED, Muon, orthogonal
from latentgen.training.optimizer import make_optimizer


def test_singular_values_come_near_1_and_the_singular_vectors_stay() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for given in (matrices, matrices.mT):
        found = orthogonal(given).double()
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(found.flatten(1), (left @ right).flatten(1)).min() > 0.95


def test_the_first_update_is_the_orthogonal_gradient_as_large_as_adamws() -> None:
    kernel = nn.Parameter(torch.zeros(16, 8, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(2))
    optimizer = Muon([{"params": [kernel]}], lr=0.5)
    optimizer.step()
    left, _, right = torch.linalg.svd(kernel.grad.reshape(16, 72), full_matrices=False)
    update = -(kernel.detach().reshape(16, 72)) / 0.5
    assert torch.nn.functional.cosine_similarity(update.flatten(), (left @ right).flatten(), dim=0) > 0.95
    assert abs(float(update.square().mean().sqrt()) / MATCHED - 1) < 0.2


def test_what_is_not_orthogonal_goes_as_torchs_adamw() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (nn.Parameter(torch.ones(5, 4)) for _ in range(2))
    groups = [{"params": [ours], "orthogonal": False, "weight_decay": 0.1}]
    optimizers = Muon(groups, lr=0.01), torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(5, 4, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_maps_alone_are_decayed_and_tables_are_left_to_adamw(name: str) -> None:
    table, kernel, bias = (nn.Parameter(torch.ones(shape)) for shape in ((5, 4), (3, 4, 3, 3), (4,)))
    what = LoopSettings(steps=1, batch=1, rate=1e-3, weight_decay=0.1, optimizer=name)
    groups = make_optimizer([table, kernel, bias], what, {table}).param_groups
    found = {weight: (group["weight_decay"], group.get("orthogonal")) for group in groups for weight in group["params"]}
    muon = name == "muon"
    assert found[table] == (0.1, False if muon else None)
    assert found[kernel] == (0.1, True if muon else None)
    assert found[bias] == (0.0, False if muon else None)
