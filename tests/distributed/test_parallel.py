"""The groups of weights that FSDP2 gathers, with one rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from benchmarks import formulas
from distributed import parallel
from modeling.architectures import transformer_layers
from modeling.compile import compile_layers
from modeling.loss import next_token_nll


@pytest.fixture
def group(tmp_path):
    """Make a process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model, ids):
    next_token_nll(model, ids, ids).backward()
    full = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in full.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_nothing_shares_is_freed_after_its_use(tied, group):
    torch.manual_seed(0)
    model, ids = formulas.llama(300, 32, 64, 2, 2, 1, tied).train(), torch.randint(300, (2, 16))
    expected, held = gradients(model, ids), []
    model.zero_grad()
    parallel.shard(model, torch.device("cpu"), "fp32")
    embedding, layers = model.get_input_embeddings(), transformer_layers(model)
    assert isinstance(embedding, FSDPModule) is not tied
    for layer in layers:
        layer.register_forward_hook(lambda *_: held.append(isinstance(embedding.weight, DTensor)))
        layer.register_full_backward_hook(lambda *_: held.append(isinstance(embedding.weight, DTensor)))
    found = gradients(model, ids)
    assert held == [not tied] * 4, held
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_gradients_that_wait_for_the_last_micro_batch_take_a_quarter_of_the_memory_at_most(group):
    torch.manual_seed(0)
    model, ids = formulas.llama(300, 32, 64, 2, 2, 1).train(), torch.randint(300, (2, 16))
    num_bytes = 4 * model.num_parameters()
    parallel.shard(model, torch.device("cpu"), "fp32")
    made = gradients(model, ids)
    parts, note = parallel.delayed_parts(model, 4 * num_bytes)
    assert len(parts) == 4 and note == "" and parallel.delayed_parts(model) == (parts, note)
    assert parallel.delayed_parts(model, 4 * num_bytes - 1) == ([], ", gradients reduced per micro-batch")
    assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
    twice = gradients(model, ids)  # a second micro-batch is added to the shards
    for name, gradient in made.items():
        torch.testing.assert_close(twice[name], 2 * gradient)


@pytest.mark.slow
def test_ddp_leaves_compiled_layers_whole(group, monkeypatch):
    """Otherwise a layer larger than a bucket of DDP would be split. Each part would be compiled and run alone."""
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # its default, restored after the test
    torch.manual_seed(0)
    model, ids = formulas.llama(300, 1024, 4096, 1, 4, 4), torch.randint(300, (1, 16))
    compile_layers(model, 16)
    model.is_compiled = True
    ddp = parallel.wrap_in_ddp(model, has_unused_weights=False)
    torch._dynamo.utils.counters.clear()
    ddp(input_ids=ids, labels=ids).backward()
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == 2  # the layer and the loss
