"""Gradient checkpointing: the same gradients, and with "selective" no product is computed twice."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import formulas
from modeling.architectures import PRODUCTS, recompute_activations
from modeling.loss import linear_head, next_token_nll
from modeling.precision import autocast


class Counts(TorchDispatchMode):
    """Counts the operations of its context."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation] += 1
        return operation(*args, **(kwargs or {}))


def make_model(kind, choice, length=64):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = formulas.gpt2(2, 64, 2, vocabulary=300, length=length)  # with dropout
    else:
        model = formulas.llama(300, 64, 128, 2, 2, 1)
    if choice != "off":
        recompute_activations(model, choice)
    return model.train(), torch.randint(300, (2, length))


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_are_those_without_it_and_products_are_kept(kind, precision):
    made, products, operations = {}, {}, {}
    for choice in ("off", "selective", "full"):
        model, ids = make_model(kind, choice, 256)  # longer than SHORT_BLOCK: flash attention
        linear_head(model)  # run its probe now, as before training: its casts would be reused
        with autocast(ids.device, precision):
            nll = next_token_nll(model, ids, ids)
        with Counts() as backward:
            nll.backward()
        made[choice] = gradients(model)
        products[choice] = sum(backward.counts[operation] for operation in PRODUCTS)
        operations[choice] = backward.counts.total()
    assert all(torch.equal(*pair) for pair in zip(made["off"], made["full"], strict=True))
    assert all(torch.equal(*pair) for pair in zip(made["off"], made["selective"], strict=True))
    assert products["off"] == products["selective"] < products["full"]
    assert operations["off"] < operations["selective"] < operations["full"]
