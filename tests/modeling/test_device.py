"""The choice of the device, its limits, and steps without host syncs."""

import copy
import math

import pytest
import torch
from conftest import tiny_gpt2
from transformers import LlamaConfig, LlamaForCausalLM

import perplexity
import train
from benchmarks.contenders import HostSyncs
from cli.errors import NoMemoryError, UserError, as_user_error, out_of_memory
from distributed.world import is_connection_error
from modeling import precision
from modeling.loss import next_token_nll
from modeling.precision import autocast, prepare_device, resolve_precision, select_device, sum_dtype
from train import make_optimizer, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def arithmetic_as_before():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.mark.parametrize(
    "choice, device, is_on", [("auto", "cpu", 1), ("auto", "cuda", 0), ("on", "cuda", 1), ("off", "cpu", 0)]
)
def test_determinism_is_a_choice(choice, device, is_on, monkeypatch):
    torch.use_deterministic_algorithms(False)
    prepare_device(choice, torch.device(device), "fp32")
    assert torch.are_deterministic_algorithms_enabled() == is_on
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_tf32_is_for_what_autocast_leaves_in_float32(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    for device, name in (("cuda", "fp32"), ("cpu", "bf16"), ("cuda", "bf16")):
        prepare_device("off", torch.device(device), name)
    assert chosen == ["high"]


def test_an_operation_without_a_deterministic_version_is_named():
    prepare_device("on", CPU, "fp32")
    with pytest.raises(RuntimeError) as failed:
        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
    message = str(as_user_error(failed.value))
    assert message.startswith("--deterministic: put_ ") and message.endswith("Use --deterministic off.")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA driver error: out of memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nLast error:\nFailed to CUDA calloc 6291456 bytes",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_runs_out_is_recognized(text):
    error = torch.distributed.DistBackendError(text) if "NCCL" in text else RuntimeError(text)
    assert out_of_memory(error) and isinstance(as_user_error(error), NoMemoryError)
    assert not out_of_memory(UserError("--micro_batch_size 8: out of memory. Pass --micro_batch_size 4."))
    assert is_connection_error(error) == ("NCCL" in text)  # World checks for memory first


def test_a_gpu_that_cannot_be_used_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    select = select_device.__wrapped__
    assert select() == CPU and not capsys.readouterr().err
    (tmp_path / "nvidia0").touch()
    assert select() == CPU
    assert capsys.readouterr().err.startswith("warning: THE GPU IS NOT USED: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants no GPU
    assert select() == CPU and not capsys.readouterr().err


def test_each_accelerator_has_a_precision_and_a_dtype_for_sums():
    assert [resolve_precision("auto", torch.device(name)) for name in ("xpu", "mps")] == ["bf16", "fp32"]
    assert [sum_dtype(torch.device(name)) for name in ("cpu", "cuda", "xpu", "mps")] == [torch.float64] * 3 + [
        torch.float32
    ]


def batches(number: int = 1) -> list[dict[str, torch.Tensor]]:
    ids = [torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(number)]
    return [{"input_ids": each, "labels": each} for each in ids]


def test_sums_may_be_float32(monkeypatch):
    """A CPU stands for a device without float64."""
    model = tiny_gpt2(100)
    results = []
    for dtype in (torch.float64, torch.float32):
        for module in (train, perplexity):
            monkeypatch.setattr(module, "sum_dtype", lambda device, dtype=dtype: dtype)
        trained = copy.deepcopy(model)
        step = train_step(
            trained, make_optimizer(trained, 0.0), torch.amp.GradScaler("cpu", enabled=False), batches(2), 1e-3
        )
        loss, _ = perplexity.evaluate(trained, batches(4))
        assert step.loss.dtype == dtype
        results.append((step.loss.item(), step.grad_norm.item(), loss))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_host_does_not_wait_in_a_step(kind, name):
    """Only the log step waits, because it reads the results."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    llama = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = tiny_gpt2(100) if kind == "gpt2" else LlamaForCausalLM(llama)
    optimizer, scaler = make_optimizer(model, 0.01), torch.amp.GradScaler("cpu", enabled=False)
    steps = [batches(3), batches(2)]
    train_step(model, optimizer, scaler, steps[0], 1e-3, precision=name)  # the first step makes the moments
    with HostSyncs(facts := {}) as counted:
        result = train_step(model, optimizer, scaler, steps[1], 1e-3, precision=name)
    assert facts["syncs"] == 0
    with counted:
        assert math.isfinite(result.loss.item())
    assert facts["syncs"] == 1


def test_on_a_cpu_attention_with_dropout_keeps_scores_of_bfloat16():
    """The gradients are as near to float32's as gradients with float32 scores."""
    torch.manual_seed(0)
    model, (batch,) = tiny_gpt2(100), batches()
    batch["labels"] = batch["input_ids"]

    def run(name):
        dtypes = set()
        length = batch["input_ids"].shape[1]

        def pack(tensor):
            if tensor.shape[-2:] == (length, length) and tensor.is_floating_point():
                dtypes.add(tensor.dtype)
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(CPU, name):
            next_token_nll(model, **batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), dtypes

    exact, _ = run("fp32")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    plain, dtypes = run("bf16")
    assert dtypes == {torch.float32}
    prepare_device("auto", CPU, "bf16")
    reduced, dtypes = run("bf16")
    assert dtypes == {torch.bfloat16}
    assert (reduced - exact).norm() <= 1.2 * (plain - exact).norm() < 0.05 * exact.norm()
