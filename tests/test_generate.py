import copy
import os
import pty
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from architectures import GUIDE, MOE, SIZES, TODAY
from chat_families import make_tokenizer
from conftest import ROOT, chain_gpt2, run_script, tiny_gpt2
from texts import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.generation.streamers import BaseStreamer

from cli import printer
from cli.errors import UserError
from cli.printer import Printer
from corpus.chat import CHAT_TEMPLATE
from corpus.tokenize import end_ids
from generate import GenerateConfig, SamplingConfig, draw_sample, generate, read_prompts, respond, sampling_in_training
from modeling.architectures import generate_as_trained, make_causal
from modeling.loading import load_pretrained

PROMPTS = ["the model", "a", "token text of loss learns writes", "def return (self) :", "x = 1 \n"]
GREEDY = SamplingConfig(max_new_tokens=12, greedy=True)


@pytest.fixture(scope="module")
def model(model_dir):
    return load_pretrained(str(model_dir))


class Counter(BaseStreamer):
    tokens = -1  # the prompt comes first, as one call

    def put(self, value):
        self.tokens += 1

    def end(self):
        pass


def test_a_text_ends_with_what_ended_the_documents(model_dir, tokenizer):
    """In BERT's family the separator ends a document. Neither model nor tokenizer calls it end-of-text."""
    model, twin = load_pretrained(str(model_dir)), copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits are equal, so greedy decoding takes token 0
    for end, expected in ((tokenizer.decode([0]), 1), ("a", 9)):
        twin.eos_token, twin.sep_token = None, end
        generate(model, twin, ["the"], SamplingConfig(max_new_tokens=9, greedy=True), counter := Counter())
        assert counter.tokens == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode(model, tokenizer, training):
    model.train(training)
    generate(model, tokenizer, PROMPTS, GREEDY)
    assert model.training == training
    model.eval()


def test_batched_with_left_padding_equals_alone(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, GREEDY)
    assert together == [generate(model, tokenizer, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1 and all(together)


def test_an_architecture_that_cannot_hide_its_pads_is_not_padded(tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bart",
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
        init_std=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    together = generate(model, tokenizer, PROMPTS, GREEDY)
    assert together == [generate(model, tokenizer, [prompt], GREEDY)[0] for prompt in PROMPTS]


def test_equals_the_pipeline(model_dir, model, tokenizer):
    pipe = pipeline("text-generation", model=str(model_dir), device="cpu")
    for prompt, text in zip(PROMPTS, generate(model, tokenizer, PROMPTS, GREEDY), strict=True):
        made = pipe(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert made == text


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_what_is_streamed_is_what_is_returned(kind, tokenizer, capsys):
    if kind == "metaspace":  # as in Llama, a word decoded alone loses the space before it
        tokenizer = FAMILIES["metaspace"]()
    model = tiny_gpt2(len(tokenizer), n_positions=128).eval()
    sampling = SamplingConfig(max_new_tokens=40)
    torch.manual_seed(0)
    (text,) = generate(model, tokenizer, ["the model"], sampling)
    torch.manual_seed(0)
    generate(model, tokenizer, ["the model"], sampling, Printer(tokenizer))
    assert capsys.readouterr().out == text + "\n" and " " in text.strip()


def test_streaming_a_long_text_decodes_a_few_tokens_at_a_time(tokenizer, monkeypatch, capsys):
    model, lengths, decode = tiny_gpt2(len(tokenizer), n_positions=256).eval(), [], printer.decode
    monkeypatch.setattr(printer, "decode", lambda _, ids: [lengths.append(len(ids)), decode(tokenizer, ids)][1])
    (text,) = generate(model, tokenizer, ["the model"], SamplingConfig(max_new_tokens=200), Printer(tokenizer))
    assert capsys.readouterr().out == text + "\n"
    assert len(lengths) > 100 and max(lengths) < 60


def test_samples_differ_and_a_seed_repeats_them(model, tokenizer):
    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, tokenizer, PROMPTS[:1] * 3 + PROMPTS[1:2] * 3, SamplingConfig(max_new_tokens=12))

    first = sample(0)
    assert len(set(first)) == 6
    assert sample(0) == first != sample(1)


def test_top_k_of_one_is_greedy(model, tokenizer):
    sampling = SamplingConfig(max_new_tokens=12, top_k=1)
    assert generate(model, tokenizer, PROMPTS, sampling) == generate(model, tokenizer, PROMPTS, GREEDY)


def test_too_long_for_the_model(tokenizer):
    model = tiny_gpt2(len(tokenizer))
    with pytest.raises(UserError, match="--max_new_tokens 63: the model holds 64 positions"):
        generate(model, tokenizer, ["the model"], SamplingConfig(max_new_tokens=63))
    assert len(generate(model, tokenizer, [""], SamplingConfig(max_new_tokens=63, greedy=True))) == 1


def test_commands(model_dir, model, tokenizer, tmp_path):
    texts = dict(zip(PROMPTS, generate(model, tokenizer, PROMPTS, GREEDY), strict=True))
    flags = ("generate.py", "--model", model_dir, "--greedy", "--max_new_tokens", 12)
    alone = run_script(*flags, "--prompt", PROMPTS[0], cwd=tmp_path, fresh=True)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == PROMPTS[0] + texts[PROMPTS[0]] + "\n"
    assert alone.stderr == ""
    lines = [prompt for prompt in PROMPTS if "\n" not in prompt]
    expected = "".join(f"{prompt}{texts[prompt]}\n\n" for prompt in lines)
    assert run_script(*flags, cwd=tmp_path, stdin="\n".join(lines) + "\n\n").stdout == expected
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    assert run_script(*flags, "--prompts_file", "prompts.txt", "--batch_size", 3, cwd=tmp_path).stdout == expected


def test_bf16_is_of_the_weights_and_not_of_the_rotations(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), initializer_range=0.5, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    (text,) = generate(model, tokenizer, PROMPTS[:1], GREEDY)
    flags = ("--model", tmp_path, "--greedy", "--max_new_tokens", 12, "--precision", "bf16", "--prompt", PROMPTS[0])
    assert run_script("generate.py", *flags, cwd=tmp_path).stdout == PROMPTS[0] + text + "\n"


def test_a_chat_keeps_the_conversation(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    speaker = copy.deepcopy(tokenizer)
    speaker.chat_template = CHAT_TEMPLATE
    speaker.save_pretrained(tmp_path / "model")
    sampling, messages, answers = SamplingConfig(max_new_tokens=4, greedy=True), [], []
    for turn in ("the", "a"):
        messages.append({"role": "user", "content": turn})
        text = speaker.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answers += generate(model, speaker, [speaker(text)["input_ids"]], sampling)
        messages.append({"role": "assistant", "content": answers[-1]})
    flags = ("generate.py", "--model", "model", "--chat", "--greedy", "--max_new_tokens", 4)
    done = run_script(*flags, cwd=tmp_path, stdin="the\na\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, answers[0] + "\n" + answers[1] + "\n", "")
    assert run_script(*flags, "--prompt", "the", cwd=tmp_path).stdout == answers[0] + "\n"


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer):
    speaker = copy.deepcopy(tokenizer)
    speaker.chat_template = CHAT_TEMPLATE
    assert end_ids(speaker) == [0]
    speaker.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    speaker.chat_template = CHAT_TEMPLATE.replace("eos_token or sep_token", "'<|im_end|>\\n'")
    end = speaker.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(speaker) == [0, end]
    model = chain_gpt2(len(speaker), {}, otherwise=end)
    generate(model, speaker, ["the"], SamplingConfig(max_new_tokens=9, greedy=True), counter := Counter())
    assert counter.tokens == 1


USER_BOT = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'BOT: ' }}{{ m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'BOT>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "stop"), [(USER_BOT, "\nUSER:"), (MARKED, "</turn>")])
def test_a_turn_that_ends_in_plain_text_ends_there(template, stop, capsys):
    """Each letter is a token. The model says a word, the stop, and "xxx" without end."""
    speaker, question = make_tokenizer(template), [{"role": "user", "content": "a"}]
    prompt = speaker.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    said = speaker(prompt[-1] + "Hi" + stop)["input_ids"]
    assert len({*said}) == len(said), "the chain would be a loop"
    model = chain_gpt2(len(speaker), dict(pairwise(said)), otherwise=speaker.convert_tokens_to_ids("x"))
    config = GenerateConfig(chat=True, greedy=True, max_new_tokens=30)
    messages = respond(model, speaker, ["a"], config, [], stream=True)
    assert messages[-1] == {"role": "assistant", "content": "Hi"}
    assert capsys.readouterr().out == "Hi\n"
    model.is_compiled = False
    in_training = replace(sampling_in_training(model, speaker, ["a"], seed=3, chat=True), greedy=True)
    assert draw_sample(model, speaker, in_training, "fp32", lambda: None, "a") == "a\nHi"


def test_prompts_are_split_at_line_ends_alone(tmp_path):
    lines = ["a\fb", "c\u2028d", "e\x85f\x1cg", "h\ri"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\n".join([lines[0], lines[1] + "\r", "", *lines[2:], ""]).encode())
    assert read_prompts(GenerateConfig(prompts_file=str(path))) == lines
    stdin = os.dup(0)
    try:
        with open(path) as file:
            os.dup2(file.fileno(), 0)
        assert read_prompts(GenerateConfig()) == lines
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)


LEAKS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 20,
    "num_beams": 2,
    "num_return_sequences": 2,
    "stop_strings": ["e"],
    "max_length": 3,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "suppress_tokens": [*range(10, 200)],
    "begin_suppress_tokens": [*range(10, 200)],
    "do_sample": True,
    "top_k": 3,
}


@pytest.mark.parametrize("leaks", [*({name: value} for name, value in LEAKS.items()), LEAKS], ids=[*LEAKS, "all"])
def test_settings_of_the_file_change_nothing(leaks, model, tokenizer, tmp_path):
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        before = len(ids)
        while len(ids) < before + 12 and (len(ids) == before or ids[-1] != 0):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[before:], skip_special_tokens=True))
    leaky = copy.deepcopy(model)
    for name, value in leaks.items():
        setattr(leaky.generation_config, name, value)
    settings = leaky.generation_config.to_dict()
    assert generate(leaky, tokenizer, PROMPTS, GREEDY) == expected
    assert generate(leaky, tokenizer, PROMPTS[:1], GREEDY) == expected[:1]
    assert leaky.generation_config.to_dict() == settings  # a run saves it


JETMOE = {"kv_channels": 8, "num_key_value_heads": 2, **MOE}
DBRX = {"d_model": 32, "n_heads": 2, "n_layers": 2, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4}}
DBRX |= {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
BATCHED = {
    name: (GUIDE | TODAY)[name] for name in ("GIT", "RecurrentGemma", "XLNet", "Mixtral", "Qwen2-MoE", "gpt-oss")
}
BATCHED |= {"JetMoE": ("jetmoe", SIZES | JETMOE), "DBRX": ("dbrx", DBRX)}


@pytest.mark.parametrize("name", BATCHED)
def test_batched_text_equals_alone(name, tokenizer):
    """GIT sees its pads from the second step on, and RecurrentGemma before a single token. XLNet cannot batch a mask.

    The other models have routers with a loss of their own.
    """
    kind, sizes = BATCHED[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | {"vocab_size": len(tokenizer), "initializer_range": 0.5})
    config.output_router_logits = name not in ("GIT", "RecurrentGemma", "XLNet")
    make_causal(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    generate_as_trained(model)
    together = generate(model, tokenizer, PROMPTS, GREEDY)
    assert together == [generate(model, tokenizer, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len({*together}) > 1


def test_no_finished_run(tmp_path):
    done = run_script("generate.py", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("generate.py: error: --model: no finished run under runs/")


def test_interactive_in_a_terminal(model_dir, tmp_path):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--model", str(model_dir), "--greedy", "--max_new_tokens", "5"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
    )
    os.close(terminal)
    shown = b""
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    answers = [b"the model\n", b"a\n", b"\x04"]
    try:
        while data := os.read(controller, 1024):
            shown += data
            if answers and shown.count(b"prompt> ") == 4 - len(answers):
                os.write(controller, answers.pop(0))
    except OSError:  # Linux reports a closed terminal like this
        pass
    watchdog.cancel()
    assert process.wait(timeout=10) == 0
    assert shown.count(b"prompt> ") == 3 and b"the model" in shown.split(b"prompt> ")[1]
