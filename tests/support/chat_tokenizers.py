"""Small tokenizers with chat templates in the style of real families, made on the spot."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "the quick brown fox jumps over the lazy dog. What is the capital of France? Paris.",
    "Answer: yes\n\nQuestion: why? Because it is so, said the user to the assistant.",
    "system user assistant think\n\n\n### Instruction:\n### Response:\n",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
] * 3

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Thinking is stripped from earlier turns, the last turn gets a think block whatever it holds, and
# `enable_thinking: false` puts an empty one into the generation prompt.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' }}
        {%- if loop.first and system is defined %}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}
        {%- endif %}
        {{- message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message.content }}{% endgeneration %}"
    "{{ '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

# No end token: an answer stops at the token that opens the next turn.
GLM = """\
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + '\\n' + call.function.arguments | tojson }}
        {{- '</tool_call>' }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# Other end tokens in the middle, at the end and behind a call; the tool's turn names the function.
HARMONY = """\
{%- for m in messages %}
    {%- if m.tool_calls %}
        {{- '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}
        {{- m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson }}
        {{- '<|call|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>' + messages[loop.index0 - 1].tool_calls[0].function.name + '<|message|>' }}
        {{- m.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# Two end tokens, and a prompt that opens thoughts unless told not to.
FORCED = """\
{%- for m in messages %}
    {{- '<|start|>' + m.role + '<|message|>' }}
    {%- if m.role == 'assistant' %}
        {{- '<think></think>' + m.content.split('</think>')[-1] }}
    {%- else %}{{- m.content }}{%- endif %}
    {{- '<|end|><|return|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|message|><think>' }}
    {{- '</think>' if enable_thinking is false else '\\n' }}
{%- endif %}"""

TEMPLATES = {
    "glm": GLM,
    "harmony": HARMONY,
    "forced": FORCED,
    "chatml": CHATML,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "marked": MARKED,
    "bare": BARE,
}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
    "<|start|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
]


@cache
def _backend(add_bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    for word in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False)])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return str(tokenizer.to_str())


def chat_tokenizer(style: str | None = None, *, add_bos: bool = False, **options: Any) -> Any:
    """Returns a byte-level BPE tokenizer.

    Args:
        style: A key of `TEMPLATES`, or None for a base model's tokenizer.
        add_bos: Whether it puts `<s>` before a text by itself.
        options: Settings of the tokenizer, for example `pad_token`.
    """
    ends = {"llama3": "<|eot_id|>", "llama2": "</s>", "bare": "</s>", None: "</s>"}
    ends |= {"glm": "</s>", "harmony": "<|return|>", "forced": "<|return|>"}
    options = {"bos_token": "<s>", "eos_token": ends.get(style, "<|im_end|>"), **options}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(add_bos)), **options
    )
    tokenizer.chat_template = TEMPLATES[style] if style else None
    return tokenizer


def trained_text(tokenizer: Any, labels: Any) -> str:
    """Returns the text of the trained labels."""
    return str(tokenizer.decode([int(label) for label in labels if label >= 0]))
