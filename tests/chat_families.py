"""Chat templates in the forms of well-known families, each with a tokenizer and the form of an answer."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # contents are stripped, and the results of tools are JSON
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') }}<|eot_id|>"
    "{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | tojson if m.role == 'tool' else m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # the last message of the user holds the system message and the tools
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if system else messages %}"
    "{% set last = (rest | selectattr('role', 'eq', 'user') | list)[-1] %}"
    "{% if rest[0].role != 'user' %}{{ raise_exception('the user comes first') }}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}"
    "{% if m == last and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{{ '[INST] ' + (system if m == last else '') + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{{ (call.function | tojson)[:-1] }}"
    ', "id": "{{ call.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]{{ eos_token }}'
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (system if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}{%- else %}"
    "{{- '<|im_start|>' + m.role }}{%- if m.content or not m.tool_calls %}{{- '\n' + m.content }}{%- endif %}"
    '{%- for call in m.tool_calls %}{{- \'\n<tool_call>\n{"name": "\' + call.function.name }}'
    "{{- '\", \"arguments\": ' + call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GENERATION = (  # only answers are stripped
    "{% for m in messages %}\n{{ '<|im_start|>' + m.role + '\n' }}\n  {%- if m.role == 'assistant' %}\n"
    "  {%- generation -%} {{ m.content | trim }}{%- endgeneration -%}\n"
    "  {%- else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(template, *special, eos="</s>", bos=None, rstrip=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, chat_template=template)


def call_text(call, key="arguments"):
    function = call["function"]
    return f'{{"name": "{function["name"]}", "{key}": {json.dumps(function["arguments"], ensure_ascii=False)}}}'


def plain(end, strip=False):
    return lambda m: (m["content"].strip() if strip else m["content"]) + end


def llama(m):
    return (call_text(m["tool_calls"][0], "parameters") if "tool_calls" in m else m["content"].strip()) + "<|eot_id|>"


def mistral(m):
    calls = [f'{call_text(call)[:-1]}, "id": "{call["id"]}"}}' for call in m.get("tool_calls", [])]
    return (f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else f" {m['content']}") + "</s>"


def qwen(m):
    calls = [f"<tool_call>\n{call_text(call)}\n</tool_call>" for call in m.get("tool_calls", [])]
    return "\n".join([m.get("content")] * (bool(m.get("content")) or not calls) + calls) + "<|im_end|>"


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": (make_tokenizer(CHATML, *IM), plain("<|im_end|>")),
    "chatml without its tokens": (make_tokenizer(CHATML), plain("<|im_end|>")),
    "chatml-eos": (make_tokenizer(CHATML, *IM, eos="<|im_end|>"), plain("<|im_end|>")),
    "llama": (make_tokenizer(LLAMA3, "<|eot_id|>", bos="<s>"), llama),
    "mistral": (make_tokenizer(MISTRAL, "[INST]", "[/INST]", bos="<s>"), mistral),
    "phi": (make_tokenizer(PHI3, "<|end|>", "<|user|>", "<|assistant|>", rstrip=True), plain("<|end|>")),
    "gemma": (make_tokenizer(GEMMA, "<end_of_turn>", bos="<bos>", eos="<eos>"), plain("<end_of_turn>", strip=True)),
    "qwen": (make_tokenizer(QWEN, *IM), qwen),
    "generation": (make_tokenizer(GENERATION, *IM), plain("<|im_end|>", strip=True)),
}
