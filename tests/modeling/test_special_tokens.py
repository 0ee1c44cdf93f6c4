"""A saved model stops in plain transformers, and in every program that reads generation_config.json."""

import pytest
import torch
from architectures import GUIDE
from conftest import chain_gpt2, run_script
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, pipeline

from corpus.tokenize import set_special_tokens
from modeling.adapters import save_adapter
from modeling.trained import LoraConfig, add_lora

QUICK = ("--max_steps", 1, "--learning_rate", 1e-9, "--batch_size", 2, "--block_size", 32, "--precision", "fp32")


@pytest.mark.parametrize("options", [(), ("--lora_rank", 2)])
def test_a_saved_chat_model_stops_at_the_end_of_a_turn(options, speaker, tmp_path):
    flags = ("--model", speaker / "model", "--train_files", speaker / "chats.jsonl", "--text_column", "messages")
    flags += (*QUICK, *options, "--eval_fraction", 0.3, "--output_dir", "run", "--sample_prompt", "a")
    done = run_script("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample: a\nHi\n") == 2 and "model --chat --prompt" in done.stdout
    saved, tokenizer = str(tmp_path / "run/model"), AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(saved).eos_token_id == ends
    model = AutoModelForCausalLM.from_pretrained(speaker / "model" if options else saved)
    if options:  # for an adapter, transformers and peft let the caller load the generation config
        model = PeftModel.from_pretrained(model, saved).merge_and_unload()
        model.generation_config = GenerationConfig.from_pretrained(saved)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answered = pipe([{"role": "user", "content": "a"}], max_new_tokens=9, do_sample=False)[0]["generated_text"]
    assert answered[-1] == {"role": "assistant", "content": "Hi"}


def test_a_model_with_a_new_tokenizer_stops_where_its_documents_end(text_file, tmp_path):
    model = chain_gpt2(400, {}, otherwise=0)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 399
    model.save_pretrained(tmp_path / "base")
    flags = ("--model", "base", "--tokenizer", "train:300", "--train_files", text_file)
    done = run_script("train.py", *flags, *QUICK, "--max_eval_blocks", 2, "--output_dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    for saved in (AutoConfig, GenerationConfig):
        ids = saved.from_pretrained(tmp_path / "run/model")
        assert ids.eos_token_id == tokenizer.eos_token_id == 0
        assert ids.bos_token_id == tokenizer.bos_token_id
        assert ids.pad_token_id == (tokenizer.pad_token_id if saved is GenerationConfig else 399)
    pipe = pipeline("text-generation", model=str(tmp_path / "run/model"), device="cpu")
    (made,) = pipe("the", max_new_tokens=9, do_sample=False, return_tensors=True)
    assert made["generated_token_ids"] == [*tokenizer("the")["input_ids"], 0]


def test_positions_that_count_from_the_padding_stay_as_they_were(tokenizer, tmp_path):
    kind, sizes = GUIDE["RoBERTa"]
    config = AutoConfig.for_model(kind, **sizes | {"vocab_size": len(tokenizer), "is_decoder": True})
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(2, 9)[None]
    set_special_tokens(model, tokenizer, is_new=True)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("lora", [False, True])
def test_a_config_that_samples_without_saying_so_is_saved(lora, tokenizer, tmp_path):
    """transformers refuses to save a temperature without do_sample if the config has changed."""
    model = chain_gpt2(len(tokenizer), {}, otherwise=0)
    model.generation_config = GenerationConfig(eos_token_id=5, temperature=0.6, top_p=0.9)
    if lora:
        add_lora(model, LoraConfig(lora_rank=2))
    set_special_tokens(model, tokenizer, is_new=False)
    (save_adapter if lora else PreTrainedModel.save_pretrained)(model, tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.do_sample, saved.temperature, saved.top_p) == ([5, 0], True, 0.6, 0.9)
