"""Chat templates that ship with Glasstune, for tokenizers that have none of their own."""

from __future__ import annotations

from typing import Any

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + END + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

# The prompt of Stanford Alpaca. A user text that holds the `### Input:` header gets the sentence
# that the published prompt uses for rows with an input.
ALPACA = """\
{%- set turns = namespace(first=true) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- set turns.first = false -%}
{%- elif message.role == 'user' -%}
{%- if turns.first and '\\n\\n### Input:\\n' in message.content -%}
{{- 'Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.\\n\\n' -}}
{%- elif turns.first -%}
{{- 'Below is an instruction that describes a task. Write a response that appropriately \
completes the request.\\n\\n' -}}
{%- endif -%}
{%- set turns.first = false -%}
{{- '### Instruction:\\n' + message.content + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Response:\\n' + message.content + END -}}
{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}
{%- else -%}
{{- raise_exception('the alpaca template has no place for the role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}"""

PLAIN = """\
{%- set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'} -%}
{%- for message in messages -%}
{{- names[message.role] + ':\\n' + message.content -}}
{%- if message.role == 'assistant' -%}{{- END -}}{%- endif -%}
{%- if not (loop.last and message.role == 'assistant') -%}{{- '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:\\n' -}}
{%- endif -%}"""

JINJA = {"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}
NAMES = (*JINJA, "baichuan2")


def named_source(name: str, tokenizer: Any, *, adds_bos: bool) -> str:
    """Returns the Jinja source of a named template, fitted to a tokenizer.

    Args:
        name: A key of `JINJA`.
        tokenizer: Tells which tokens exist. ChatML closes a turn with `<|im_end|>` where that is
            one token, else with the tokenizer's end token, so that no vocabulary grows and the
            model's own stop still works.
        adds_bos: Whether the tokenizer opens a text with its begin token; the template then does
            the same, exactly once.
    """
    single = name == "chatml" and "<|im_end|>" in tokenizer.get_vocab()
    end = "'<|im_end|>'" if single else "eos_token"
    opening = "{{- bos_token -}}\n" if adds_bos else ""
    return opening + JINJA[name].replace("END", end)
