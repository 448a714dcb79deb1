"""Chat templates in the styles in use, tokenizers to try them with, and texts that break tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from bildung.data import nursery
from bildung.tokens.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, tokenizer_from_gguf
from bildung.tokens.tokenizer import Tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>"]
SPECIALS += ["<|end_header_id|>", "<|eot_id|>"]
PROSE = [
    "The capital of France is Paris. It's 1998, isn't it?  Two  spaces\n\nand a new paragraph.",
    "def add(a, b):\n    return a + b\n",
    "\n\n",
    "\n\n",
    "Hello",
    "Hello",
    "user assistant system tool hello Hello world answer question [INST] [/INST]",
]

# A default system message goes in front, as in SmolLM2-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims contents and writes BOS itself.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% "
    "endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n"
    "\n' }}{% endif %}"
)
# Lists tools as JSON, uses `{%-`, tool answers come as a user's turn.
QWEN2 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Refuses roles that do not alternate; no header before answers, so the generation prompt is empty.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if "
    "message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + "
    "message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + "
    "'<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
STYLES: dict[str, tuple[str, str | None, str, str]] = {  # template, BOS, EOS, pre-tokenizer
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>", "smollm"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "llama-bpe"),
    "qwen2": (QWEN2, None, "<|im_end|>", "qwen2"),
    "mistral": (MISTRAL, "<s>", "</s>", "tekken"),
}

TEXTS = [
    "",
    " ",
    "Hello world",
    "a  17 b 17",
    "x\n\n  12\t\t3",
    "   lead and trail  \n",
    "1234567 3.14 ½ Ⅷ ٣٤",
    "été naïve Ångström e\u0301",
    "日本語のテキスト 한국어 العربية",
    "🙂👍🏽👨‍👩‍👧 flag 🇫🇷",
    "it's I'll WE'RE don't 'sure",
    "def f(x):\n\treturn {'a': [1, 2]}  # why\r\n",
    "https://example.org/a?b=c&d=%20",
    "\u00a0\u2003\ufeffodd\u200bspaces\u0000null",
    "word " * 50,
    "aAbB_camelCaseXML",
]


def conversation(*contents: str) -> list[dict[str, str]]:
    """user, assistant, user, assistant, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def byte_level(
    template: str | None = None, bos: str | None = None, eos: str | None = "<|im_end|>", pre: str = "gpt-2"
) -> Tokenizer:
    """A small byte-level BPE tokenizer with the special tokens of every style above."""
    backend = tokenizers.Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        PROSE,
        trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    return Tokenizer(backend, {"bos_token": bos, "eos_token": eos, "pad_token": eos}, template)


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """GGUF metadata of a small SentencePiece vocabulary: bytes, letters, and a few words built up by score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    # "s>", "</" and "/s" are what `</s>` could be merged from
    words = [
        "s>",
        "</",
        "/s",
        "▁▁",
        "he",
        "el",
        "ll",
        "▁a",
        "hell",
        "hello",
        "▁hello",
        "or",
        "ld",
        "wor",
        "world",
        "▁world",
    ]
    pieces = [*words, "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'[]/<>|_", "é", "\n"]
    pieces.remove("\n")  # a newline is the byte token <0x0A>
    metadata = {
        "model": "llama",
        "tokens": tokens + pieces,
        "token_type": kinds + [NORMAL] * len(pieces),
        "scores": [0.0] * len(tokens) + [-float(i) for i in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (metadata | more).items()}


def sentencepiece(template: str | None = None) -> Tokenizer:
    """The tokenizer of `sentencepiece_metadata`, Llama 2's kind."""
    return tokenizer_from_gguf({**sentencepiece_metadata(), "tokenizer.chat_template": template})


def real_gguf() -> Path:
    """The SmolLM2 GGUF, where `make test` put it; skips the test when it is not here (tests fetch nothing)."""
    entry = nursery.entry_called("smollm2")
    if not nursery.is_current("smollm2") and nursery.installed(entry) is None:
        pytest.skip("SmolLM2 is not here; `bildung nursery smollm2` fetches it")
    return nursery.fetch_file("smollm2")
