"""The loop against the Trainer, against itself with other batch shapes, and against faults."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt2
from datasets import Dataset
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from cli.errors import UserError
from corpus.position import Position
from corpus.tokenize import tokenize
from data import TrainingData, collate, group_texts, make_loader
from distributed.world import World
from generate import SamplingConfig, generate
from modeling.compile import compile_layers, should_compile, uncompiled
from perplexity import evaluate
from train import TrainingConfig, learning_rate_at, make_optimizer, train_step
from training import checkpoint
from training.monitor import memory_advice, micro_batch_memory
from training.plan import count_steps
from training.state import describe, make_moments, moments, seed_step, trained_weights

STEPS, WARMUP, PEAK, DECAY, CLIP = 50, 10, 3e-3, 0.1, 0.5


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def blocks(rows, tokenizer):
    return group_texts(tokenize(rows, tokenizer), 32)


def test_equals_the_trainer(blocks, tokenizer, tmp_path):
    """The same model, blocks, order, warmup, decay, clipping and accumulation give the same losses and weights."""
    batches = list(make_loader(blocks, 4, most=4 * 2 * STEPS % len(blocks) + 8))  # full blocks only
    batches = [batches[i % (len(batches) - 1)] for i in range(2 * STEPS)]

    ours = tiny_gpt2(len(tokenizer))
    optimizer, scaler = make_optimizer(ours, DECAY), no_scaler()
    our_losses = []
    for step in range(STEPS):
        rate = learning_rate_at(step, TrainingConfig(learning_rate=PEAK), WARMUP, WARMUP, STEPS)
        loss, *_ = train_step(ours, optimizer, scaler, batches[2 * step : 2 * step + 2], rate, CLIP)
        our_losses.append(loss.item())

    class Losses(TrainerCallback):
        def __init__(self):
            self.values = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.values.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    theirs = tiny_gpt2(len(tokenizer))
    losses = Losses()
    # The Trainer divides by all labels, also by the first label of each block, which is never predicted. So its loss
    # of blocks of 32 is 31/32 of the mean. Ignoring the first label changes no prediction and gives our mean.
    rows = [
        {"input_ids": ids.tolist(), "labels": [-100, *labels[1:].tolist()]}
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    trainer = InOrder(
        model=theirs,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=PEAK,
            warmup_steps=WARMUP,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="linear",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda items: collate([{k: torch.tensor(v) for k, v in item.items()} for item in items]),
        callbacks=[losses],
    )
    trainer.train()

    assert len(losses.values) == STEPS and our_losses[0] - our_losses[-1] > 0.5
    assert our_losses == pytest.approx(losses.values, abs=1e-5)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gap = (parameter - reference[name]).abs()
        if name.endswith("attn.c_attn.bias"):
            # Softmax ignores a constant that all keys share. So the gradient of a key's bias is zero but for rounding.
            # AdamW divides it by its own size, which gives noise of the size of the learning rate.
            query, key, value = gap.chunk(3)
            assert key.max() < 0.1
            gap = torch.cat([query, value])
        assert gap.max() < 1e-5, name


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_learning_rate_is_the_schedule_of_transformers(schedule, warmup):
    config = TrainingConfig(max_steps=STEPS, schedule=schedule, learning_rate=PEAK, warmup_steps=warmup)
    num_steps, warmup_steps, decay_step = count_steps(config, None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    names = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    parts = {"num_decay_steps": num_steps - decay_step, "decay_type": "linear"} if schedule == "wsd" else {}
    theirs = get_scheduler(names.get(schedule, schedule), optimizer, warmup, STEPS, parts)
    for step in range(STEPS):
        rate = learning_rate_at(step, config, warmup_steps, decay_step, num_steps)
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert learning_rate_at(STEPS - 1, config, warmup_steps, decay_step, num_steps) < PEAK or schedule == "constant"
    if schedule != "constant":
        config.min_learning_rate = PEAK / 10
        assert learning_rate_at(STEPS, config, warmup_steps, decay_step, num_steps) == PEAK / 10
        assert learning_rate_at(decay_step, config, warmup_steps, decay_step, num_steps) == pytest.approx(PEAK)


@pytest.mark.parametrize(("num_steps", "share", "wanted"), [(1, 0.1, 0), (2, 0.99, 1), (10, 0.1, 1), (15, 0.1, 2)])
def test_a_fraction_of_warmup_is_shorter_than_any_run(num_steps, share, wanted):
    assert count_steps(TrainingConfig(max_steps=num_steps, warmup_steps=share), None)[:2] == (num_steps, wanted)


def updated(micro_batches, vocab_size, steps=3):
    model = tiny_gpt2(vocab_size)
    optimizer = make_optimizer(model, DECAY)
    for _ in range(steps):
        loss, norm, tokens, _ = train_step(model, optimizer, no_scaler(), micro_batches, 1e-3, CLIP)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), loss.item(), norm.item(), tokens


@pytest.mark.parametrize("short", [False, True])
def test_accumulation_does_not_change_the_update(blocks, tokenizer, short):
    items = [blocks[i] for i in range(7)] + [blocks[len(blocks) - 1 if short else 7]]
    assert (len(items[-1]["input_ids"]) < 32) == short
    shapes = [[collate(items[i : i + size]) for i in range(0, 8, size)] for size in (4, 2, 8, 1)]  # 2x4, 4x2, 1x8, 8x1
    (weights, loss, norm, tokens), *others = (updated(shape, len(tokenizer)) for shape in shapes)
    assert tokens == sum(len(item["labels"]) - 1 for item in items)
    for other_weights, other_loss, other_norm, other_tokens in others:
        assert (weights - other_weights).abs().max() < 1e-6
        assert (other_loss, other_norm) == (pytest.approx(loss, abs=1e-6), pytest.approx(norm, rel=1e-5))
        assert other_tokens == tokens


def test_loss_is_the_mean_over_the_tokens_of_the_update(blocks, tokenizer):
    items = [blocks[0], blocks[len(blocks) - 1]]
    model = tiny_gpt2(len(tokenizer))
    sums = [
        model(input_ids=i["input_ids"][None], labels=i["labels"][None]).loss * (len(i["labels"]) - 1) for i in items
    ]
    expected = sum(sums) / sum(len(item["labels"]) - 1 for item in items)
    loss, *_ = train_step(model, make_optimizer(model, 0), no_scaler(), [collate([i]) for i in items], 0.0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_decay_spares_biases_and_norms(tokenizer):
    model = tiny_gpt2(len(tokenizer))
    decayed, spared = make_optimizer(model, DECAY).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == DECAY and spared["weight_decay"] == 0
    spared = {names[parameter] for parameter in spared["params"]}
    assert spared == {n for n in names.values() if n.endswith("bias") or ".ln_" in n}
    assert len(decayed["params"]) + len(spared) == len(names)


def test_a_loss_that_is_not_finite_leaves_the_weights_bitwise(blocks, tokenizer):
    model = tiny_gpt2(len(tokenizer))
    optimizer = make_optimizer(model, DECAY)
    batch = collate([blocks[0]])
    train_step(model, optimizer, no_scaler(), [batch], 1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * math.nan)
    loss, *_ = train_step(model, optimizer, no_scaler(), [batch], 1e-3)
    hook.remove()
    assert math.isnan(loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for state, saved in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], saved[key]) for key in saved)
    train_step(model, optimizer, no_scaler(), [batch], 1e-3)  # and it goes on
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_follow_float32(blocks, tokenizer, precision):
    batch = collate([blocks[i] for i in range(4)])
    losses = {}
    for name in ("fp32", precision):
        model = tiny_gpt2(len(tokenizer))
        optimizer, scaler = make_optimizer(model, DECAY), torch.amp.GradScaler("cpu", enabled=name == "fp16")
        losses[name] = [train_step(model, optimizer, scaler, [batch], 1e-3, 1.0, name)[0].item() for _ in range(10)]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses[precision] != losses["fp32"]


def test_an_overflow_of_fp16_loses_no_update(blocks, tokenizer):
    """The scaler skips the step and lowers its scale. Then the step is taken again with the same blocks."""
    batch = collate([blocks[0]])
    plain, model = tiny_gpt2(len(tokenizer)), tiny_gpt2(len(tokenizer))
    train_step(plain, make_optimizer(plain, 0), torch.amp.GradScaler("cpu"), [batch], 1e-3, 1.0, "fp16")
    optimizer, scaler = make_optimizer(model, 0), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    loss, norm, *_ = train_step(model, optimizer, scaler, [batch], 1e-3, 1.0, "fp16")
    assert math.isfinite(loss + norm) and 1 < scaler.get_scale() < 2.0**39
    assert {state["step"].item() for state in optimizer.state.values()} == {1}  # independent of the number of skips
    assert torch.allclose(model.lm_head.weight, plain.lm_head.weight, atol=2e-4)


def test_fp16_ends_where_no_scale_helps(blocks, tokenizer):
    model = tiny_gpt2(len(tokenizer))
    optimizer, scaler = make_optimizer(model, DECAY), torch.amp.GradScaler("cpu")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * math.nan)
    before = model.lm_head.weight.clone()
    loss, *_ = train_step(model, optimizer, scaler, [collate([blocks[0]])], 1e-3, 1.0, "fp16")
    assert math.isnan(loss) and torch.equal(model.lm_head.weight, before)
    assert scaler.get_scale() == 2.0**16  # the scale for the next step is unchanged


def test_out_of_memory_in_the_optimizer_is_not_the_micro_batch_size(blocks, tokenizer):
    model, batch = tiny_gpt2(len(tokenizer)), collate([blocks[i] for i in range(4)])
    optimizer = make_optimizer(model, DECAY)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    optimizer.register_step_pre_hook(fail)
    with (
        pytest.raises(UserError, match=r"out of memory in the optimizer\. Use a smaller model"),
        micro_batch_memory(SimpleNamespace(micro_batch_size=4, block_size=32)),
    ):
        train_step(model, optimizer, no_scaler(), [batch], 1e-3)


def test_out_of_memory_names_the_flag_to_pass():
    for size, words in (
        (5, r"^--micro_batch_size 5: out of memory. Pass --micro_batch_size 2, which leaves the steps as they are.$"),
        (1, r"^--block_size 32: out of memory with one block at once. Lower --block_size"),
    ):
        config = SimpleNamespace(micro_batch_size=size, block_size=32)
        with pytest.raises(UserError, match=words), micro_batch_memory(config):
            torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="another mistake"), memory_advice("out of memory", "Use less"):
        raise RuntimeError("another mistake")


def test_an_update_without_anything_to_predict_changes_nothing(blocks, tokenizer):
    model = tiny_gpt2(len(tokenizer))
    optimizer, before = make_optimizer(model, DECAY), model.lm_head.weight.clone()
    one = {key: tensor[:, :1] for key, tensor in collate([blocks[0]]).items()}
    loss, norm, tokens, _ = train_step(model, optimizer, no_scaler(), [one], 1e-3)
    assert (loss.item(), norm.item(), tokens) == (0, 0, 0) and torch.equal(model.lm_head.weight, before)
    scaler = torch.amp.GradScaler("cpu")
    for batch, changes in ((one, False), (collate([blocks[0]]), True)):  # in fp16 training goes on as well
        train_step(model, optimizer, scaler, [batch], 1e-3, 1.0, "fp16")
        assert torch.equal(model.lm_head.weight, before) != changes


OPTIMIZERS = {
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, fused=False),
    "SGD, fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups),
    "SGD, momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "Adagrad, fused": lambda groups: torch.optim.Adagrad(groups, fused=True),
}


def save(path, model, optimizer):
    tensors = {"weights": trained_weights(model), "optimizer": moments(model, optimizer)}
    checkpoint.save(path, tensors, {"moments": describe(tensors["optimizer"])}, World())


def restore(path, model, optimizer):
    state = checkpoint.load(path)
    checkpoint.load_tensors(path / "optimizer", make_moments(model, optimizer, state["moments"]), World())
    checkpoint.load_tensors(path / "weights", trained_weights(model), World())


def parameter_groups(model):
    return [{"params": list(model.parameters()), "weight_decay": DECAY}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_with_any_optimizer(blocks, tokenizer, name, tmp_path):
    """A gradient is poisoned at the first step and at a later one. The optimizer's state survives a checkpoint."""
    model, batch = tiny_gpt2(len(tokenizer)), collate([blocks[0]])
    optimizer = OPTIMIZERS[name](parameter_groups(model))

    def numbers():
        moments = {(i, k): v for i, state in enumerate(optimizer.state.values()) for k, v in state.items()}
        return {key: value.clone() for key, value in {**moments, **model.state_dict()}.items() if value is not None}

    for _ in range(2):
        before = numbers()
        poison = model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
        result = train_step(model, optimizer, no_scaler(), [batch], 1e-3)
        poison.remove()
        assert math.isfinite(result.loss) and math.isnan(result.grad_norm)  # the monitor reports it
        after = numbers()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert all(not value.any() for key, value in after.items() if key not in before)  # moments begin at 0
        train_step(model, optimizer, no_scaler(), [batch], 1e-3)  # training goes on
        after = numbers()
        assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
        assert all(value.isfinite().all() for value in after.values())

    again = tiny_gpt2(len(tokenizer))
    fresh = OPTIMIZERS[name](parameter_groups(again))
    save(tmp_path / "step", model, optimizer)
    restore(tmp_path / "step", again, fresh)
    losses = [train_step(*pair, no_scaler(), [batch], 1e-3).loss for pair in ((model, optimizer), (again, fresh))]
    assert losses[0] == losses[1] and torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_compile_auto_is_for_long_runs_of_models_that_compile(tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, another = tiny_gpt2(len(tokenizer)), tiny_gpt2(len(tokenizer))
    another._can_compile_fullgraph = False  # transformers says so of some mixtures of experts
    assert [should_compile("auto", model, flops) for flops in (8e14, 1e15)] == [False, True]
    assert [should_compile(choice, another, 1e15) for choice in ("auto", "on", "off")] == [False, True, False]
    monkeypatch.setenv("PATH", "")
    assert not should_compile("auto", model, 1e15)
    with pytest.raises(UserError, match=r"--compile on: needs g\+\+"):
        should_compile("on", model, 0)


def test_compiled_code_is_kept_where_it_outlives_a_reboot(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given, used in ((default_cache_dir(), tmp_path / "torch" / "inductor"), (tmp_path / "mine",) * 2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(given))  # importing torch sets it to its default
        compile_layers(tiny_gpt2(len(tokenizer)), 16)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(used)


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers_from_one_code_a_shape(blocks, tokenizer):
    """This includes short last batches, an evaluation with one, and samples of growing length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_gpt2(len(tokenizer))
    losses = []
    for compiled in (False, True):
        model.load_state_dict(tiny_gpt2(len(tokenizer)).state_dict())
        if compiled:
            compile_layers(model, 16)
        optimizer = make_optimizer(model, 0)
        batches = TrainingData(blocks, 0).batches(5, 5, Position(), same_shape=compiled)
        for _ in range(2 * math.ceil(len(blocks) / 5)):
            micro_batches, position, _ = next(batches)
            losses.append(train_step(model, optimizer, no_scaler(), micro_batches, 1e-3)[0].item())
        assert position == Position(2, 0)
        losses.append(evaluate(model, make_loader(blocks, 5, same_shape=compiled))[0])
        with uncompiled(compiled):
            generate(model, tokenizer, ["one"], SamplingConfig(max_new_tokens=5))
    assert len(blocks) % 5 and losses[: len(losses) // 2] == pytest.approx(losses[len(losses) // 2 :], abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_is_taken_up_to_the_bit(blocks, tokenizer, precision, tmp_path):
    """With dropout, a restored model and optimizer go on exactly like the originals."""

    def start():
        model = tiny_gpt2(len(tokenizer), dropout=0.1).train()
        return model, make_optimizer(model, DECAY)

    def go_on(model, optimizer, position, steps):
        batches = TrainingData(blocks, 3).batches(4, 8, position)
        for step in range(steps):
            seed_step(3, step, 0)
            update, position, _ = next(batches)
            train_step(model, optimizer, no_scaler(), update, 1e-3, precision=precision)
        return position

    model, optimizer = start()
    position = go_on(model, optimizer, Position(), 4)
    save(tmp_path / "step", model, optimizer)
    go_on(model, optimizer, position, 4)
    again, again_optimizer = start()
    torch.manual_seed(99)
    restore(tmp_path / "step", again, again_optimizer)
    go_on(again, again_optimizer, position, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert "lm_head.weight" not in trained_weights(model)  # tied to the embedding, saved once
