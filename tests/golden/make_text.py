#!/usr/bin/env python3
"""Makes tests/golden/text (chat templates) and tests/golden/tokenizers, with what the reference libraries say of them.

Rerun, from anywhere (the results are committed; the test suite never runs this):

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers tokenizers jinja2
    /tmp/golden/bin/python tests/golden/make_text.py

text/<name>.json is one template, written for this file in the manner of a published family, and conversations
rendered by transformers' own environment (trim_blocks, lstrip_blocks, loop controls, its tojson):

    {"name", "template", "bos_token", "eos_token", "now": "2026-07-04T09:05:03" | null,
     "cases": [{"name", "messages", "tools": [...] | null, "add_generation_prompt", "kwargs": {},
                "text": rendered, or the message of the refusal, "error": bool}]}

expressions.json holds one-line templates: {"cases": [{"template", "messages", "text", "error"}]}.

`now` is the clock that strftime_now reads; where it is null the text does not depend on the clock.

tokenizers/<name>/ holds tokenizer.json, tokenizer_config.json and cases.json:

    {"encode": [{"text", "ids": without special tokens, "ids_special": with them,
                 "decoded": of ids_special, special tokens skipped, "decoded_special": and kept,
                 "stream": [text or null per id of ids_special, special tokens kept]}],
     "decode": [{"ids", "skip_special_tokens", "decoded"}]}       id lists cut where no text ends
"""

import datetime
import json
import shutil
from pathlib import Path

import tokenizers as tk
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import DecodeStream
from transformers.utils import chat_template_utils

HERE = Path(__file__).resolve().parent
NOW = datetime.datetime(2026, 7, 4, 9, 5, 3)


# --- templates -------------------------------------------------------------------------------------------------------

LLAMA31 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message is taken off the front, so that tools can go beside it. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\n\n" }}
{%- endif %}
{{- "Knowledge ends: December 2023\n" }}
{{- "Today is " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "Functions you may call. Answer with JSON {\"name\": ..., \"parameters\": ...}.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there is none!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Choose one of these functions, or none.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model takes one tool call at a time!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
                {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {%- if builtin_tools is defined %}
            {{- "<|eom_id|>" }}
        {%- else %}
            {{- "<|eot_id|>" }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL_V3 = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a careful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nSignatures inside <tools></tools>:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nCall one with:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are a careful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ZEPHYR = r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

GEMMA = r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}"
    "{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}"
    "{%- else %}{% set ns.system_prompt = ns.system_prompt ~ '\\n\\n' ~ message['content'] %}{%- endif %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}"
    "{%- if message['content'] is none %}{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + (tool['function']['arguments'] | tojson) + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
    "{%- else %}{{'<｜Assistant｜>' + message['content'] + '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + (tool['function']['arguments'] | tojson) + '\\n' + '```' + '<｜tool▁call▁end｜>'}}{%- endif %}"
    "{%- set ns.is_first = true -%}{%- else %}{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + (tool['function']['arguments'] | tojson) + '\\n' + '```' + '<｜tool▁call▁end｜>'}}{%- endif %}"
    "{%- endfor %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}{%- if ns.is_tool %}"
    "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- set ns.is_tool = false -%}"
    "{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
    "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- set ns.is_output_first = false %}"
    "{%- else %}{{'\\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)

# A signature printer: recursive macros with defaults and keyword arguments, as function-calling templates have them.
TYPES = r"""{%- macro type_of(schema, depth=0, optional_mark='?') -%}
    {%- if schema.enum is defined -%}
        {{- schema.enum | map('tojson') | join(' | ') -}}
    {%- elif schema.type == 'array' -%}
        {%- if 'items' in schema -%}{{ type_of(schema['items'], depth=depth + 1) }}[]{%- else -%}any[]{%- endif -%}
    {%- elif schema.type == 'object' and schema.properties is defined -%}
        {{- "{\n" -}}
        {%- for name, child in schema.properties.items() -%}
            {{- '  ' * (depth + 1) ~ name ~ ('' if name in schema.get('required', []) else optional_mark) ~ ': ' ~ type_of(child, depth + 1) -}}
            {%- if child.description %} // {{ child.description.strip() | replace('\n', ' ') }}{% endif -%}
            {{- ",\n" -}}
        {%- endfor -%}
        {{- '  ' * depth ~ '}' -}}
    {%- elif schema.type in ['integer', 'number'] -%}number
    {%- elif schema.type is string -%}{{ schema.type }}
    {%- elif schema.type is iterable -%}{{ schema.type | join(' | ') }}
    {%- else -%}any
    {%- endif -%}
{%- endmacro -%}
{%- macro signature(tool) -%}
    {%- set f = tool.function if tool.function is defined else tool -%}
    {{- '// ' + f.description | default('no description', true) + '\n' -}}
    {{- 'type ' + f.name + ' = (_: ' + type_of(f.parameters) + ') => any;\n' -}}
{%- endmacro -%}
{%- if tools -%}
namespace functions {
{% for tool in tools %}
{{ signature(tool) }}
{% endfor %}
}
{% endif -%}
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content }}
{% endfor %}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

# Content in parts, break and continue, groups of equal roles, filters over lists.
PARTS = r"""{%- set image_count = namespace(value=0) -%}
{%- set systems = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}
{%- set rest = messages | rejectattr('role', 'equalto', 'system') | list -%}
{{- bos_token -}}
{%- if systems -%}[SYS]{{ systems | join(' / ') }}[/SYS]
{%- endif -%}
{%- for message in rest -%}
    {%- if message.get('hidden', false) -%}{%- continue -%}{%- endif -%}
    {%- if message.role == 'stop' -%}{%- break -%}{%- endif -%}
    {%- if loop.first or loop.previtem.role != message.role -%}
        {{- '\n<' ~ message.role ~ '>' -}}
    {%- else -%}
        {{- ' + ' -}}
    {%- endif -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content is mapping -%}
        {{- message.content.text -}}
    {%- elif message.content is iterable -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif 'image' in part or part['type'] == 'image_url' -%}
                {%- set image_count.value = image_count.value + 1 -%}
                {{- 'Picture ' ~ image_count.value ~ ': ' if add_vision_id is defined and add_vision_id else '' -}}<|image|>
            {%- else -%}
                {{- raise_exception('Unknown part: ' ~ part.type) -}}
            {%- endif -%}
            {%- if not loop.last %}{{ '\n' }}{% endif -%}
        {%- endfor -%}
    {%- elif message.content is none -%}
        (nothing)
    {%- else -%}
        {{- raise_exception('content must be text') -}}
    {%- endif -%}
    {%- if loop.nextitem is not defined or loop.nextitem.role != message.role -%}
        {{- '</' ~ message.role ~ '>' -}}
    {%- endif -%}
{%- else -%}
    empty
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n<assistant>' -}}{%- endif -%}
"""

# Whitespace control in every combination, comments, raw, sets and filters over blocks.
WHITESPACE = """{# a comment #}
{% set greeting %}
Hello,
   world
{% endset %}
  {% if true %}
  kept indentation of text
  {% endif %}
{{ greeting | upper | trim }}
{%- if messages %}

  minus before
{%- endif +%}
   plus after
  {%+ if true %}indented by plus{% endif %}

a {{- ' b ' -}} c
{% raw %}{{ not rendered }}{% endraw %}

{% filter upper %}filtered {{ messages[0].content }}{% endfilter %}

{% for m in messages %}
\t* {{ m.role }}: {{ m.content | indent(4) }}
{% endfor %}
{% for m in messages -%}
    {{ loop.index }}/{{ loop.length }} rev {{ loop.revindex }} {{ loop.revindex0 }} {{ loop.cycle('odd', 'even') }}
    {#- tight #};
{%- endfor %}

{% with %}{% set x = 1 %}{{ x }}{% endwith %}

{% if add_generation_prompt %}
assistant:
{% endif %}
"""

# Methods of Python's str, dict and list, and filters and tests, that published templates use: each line is a template.
METHODS = r"""strip={{ s.strip() }}|
lstrip={{ s.lstrip() }}|
rstrip={{ s.rstrip() }}|
strip chars={{ s.strip('xX .') }}|
rstrip chars={{ 'path///'.rstrip('/') }}|
upper={{ s.upper() }}|lower={{ s.lower() }}|title={{ 'two words'.title() }}|capitalize={{ 'aBC'.capitalize() }}|
replace={{ s.replace('a', 'AA') }}|replace n={{ 'aaa'.replace('a', 'b', 2) }}|filter={{ s | replace('a', '') }}|
split={{ 'a,b,,c'.split(',') | join('-') }}|split n={{ 'a,b,c'.split(',', 1) | join('-') }}|split ws={{ '  a  b '.split() | join('-') }}|rsplit={{ 'a.b.c'.rsplit('.', 1) | join('-') }}|
lines={{ 'a\nb\n\nc'.splitlines() | join(';') }}|
starts={{ 'yes' if s.startswith('  ') else 'no' }}|ends={{ 'yes' if s.endswith(('z', ' ')) else 'no' }}|
find={{ 'hello'.find('l') }} {{ 'hello'.find('z') }}|count={{ 'hello'.count('l') }}|
join={{ ', '.join(['a', 'b']) }}|
digits={{ 'yes' if '123'.isdigit() else 'no' }} {{ 'yes' if 'a1'.isalpha() else 'no' }} {{ 'yes' if 'AB'.isupper() else 'no' }}|
prefix={{ 'prefix-body'.removeprefix('prefix-') }}|
slices={{ s[2:5] }}|{{ s[-3:] }}|{{ s[::-1] }}|{{ 'abcdef'[::2] }}|{{ 'abcdef'[4:1:-1] }}|{{ 'abcdef'[:-1] }}|
list={{ [1, 2, 3, 4][::-1] | join(',') }}|{{ [1, 2, 3, 4][1:] | join(',') }}|{{ [1, 2, 3, 4][-2:] | join(',') }}|{{ [1, 2, 3, 4][3:0:-2] | join(',') }}|
concat={{ ([1] + [2, 3]) | join(',') }}|{{ 'n' ~ 1 ~ 2.5 }}|{{ 'ab' * 3 }}|
dict={% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% for k in {'b': 1, 'a': 2} %}{{ k }},{% endfor %}{{ {'b': 1, 'a': 2}.keys() | list | join(',') }} {{ {'b': 1}.values() | list | join(',') }} {{ {'b': 1}.get('z', 'none') }} {{ {'b': 1}.get('b') }}|
dictsort={% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}|
in={{ 'y' if 'a' in 'cat' else 'n' }}{{ 'y' if 'a' not in ['b'] else 'n' }}{{ 'y' if 'k' in {'k': 1} else 'n' }}|
arith={{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 5 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }}|
range={{ range(3) | join(',') }} {{ range(5, 0, -2) | join(',') }}|
len={{ s | length }} {{ messages | count }}|first={{ messages | first | attr('role') }}|last={{ (messages | last).role }}|
number={{ '12' | int + 1 }} {{ 'x' | int(7) }} {{ '1.5' | float }}|
default={{ missing | default('d') }} {{ '' | default('e', true) }} {{ none | default('f', true) }}|
tests={{ 'y' if s is string else 'n' }}{{ 'y' if 1 is number else 'n' }}|
tests of numbers={{ 'y' if 1 is integer else 'n' }}{{ 'y' if 1.0 is float else 'n' }}{{ 'y' if true is boolean else 'n' }}{{ 'y' if messages is sequence else 'n' }}{{ 'y' if messages[0] is mapping else 'n' }}{{ 'y' if missing is undefined else 'n' }}{{ 'y' if none is none else 'n' }}{{ 'y' if 3 is odd else 'n' }}{{ 'y' if 4 is divisibleby 2 else 'n' }}{{ 'y' if 'a' is eq('a') else 'n' }}{{ 'y' if 'a' is in(['a']) else 'n' }}|
chain={{ 'y' if 1 < 2 <= 2 else 'n' }}|and-or={{ '' or 'fallback' }} {{ 'a' and 'b' }}|
nested={{ messages[0]['meta']['tags'][0] if messages[0].meta is defined and messages[0].meta.tags else 'untagged' }}|
undefined attribute={{ 'none' if messages[0].nowhere is not defined else 'some' }}{% if messages[0].nowhere %}x{% endif %}|
unique={{ ['a', 'b', 'a'] | unique | join(',') }}|sort={{ [3, 1, 2] | sort | join(',') }} {{ ['b', 'A'] | sort(reverse=true) | join(',') }}|reverse={{ 'abc' | reverse }} {{ [1, 2] | reverse | join(',') }}|
max={{ [3, 1, 2] | max }} {{ [3, 1, 2] | min }} {{ [3, 1, 2] | sum }}|
format={{ '%s-%d' | format('a', 3) }}|abs={{ -3 | abs }}|round={{ 2.567 | round(1) }}|
string={{ 5 | string + 'x' }}|escape={{ '<a & b>' }}|safe={{ '<b>' | safe }}|
printed={{ true }} {{ false }} {{ none }}|{{ 1.0 }} {{ 1e16 }} {{ 1e-05 }} {{ 0.1 + 0.2 }}|
printed empty={{ [] }} {{ {} }}|
printed lists={{ [1, 'a', none, true, 2.0] }} {{ (1,) }} {{ (1, 2) }}|
printed text={{ 'tab\tquote\'s' }} {{ ['it\'s', "say \"x\"", 'both \' "', 'tab\t', 'é日', '\\'] }}|
printed dict={{ {'a': 'b', 'c': {'d': [none]}} }}|
joined={{ [true, none, 1.5] | join(' ') }} {{ 'a' ~ true ~ none }}|
namespace={% set ns = namespace(n=0, t='') %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% set ns.t = ns.t ~ i %}{% endfor %}{{ ns.n }} {{ ns.t }}|
scoping={% set x = 1 %}{% for i in [1, 2] %}{% set x = 9 %}{% endfor %}{{ x }}|
loop filter={% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{% endfor %}|
loop recursion={% for t in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}{{ t.n }}{{ loop.depth }}{{ loop(t.c) }}{% endfor %}|
unpack={% for a, b in [[1, 2], [3, 4]] %}{{ a }}-{{ b }};{% endfor %}{% set c, d = 'xy' %}{{ c }}{{ d }}|
call block={% macro box(w) %}[{{ w }}:{{ caller() }}]{% endmacro %}{% call box('k') %}body{% endcall %}|
varargs={% macro f(a, b='B', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f('x') }} {{ f('x', c=1) }} {{ f(b='y', a='z') }}|
groupby={% for k, g in [{'r': 'u', 'c': 1}, {'r': 'a', 'c': 2}, {'r': 'u', 'c': 3}] | groupby('r') %}{{ k }}:{{ g | map(attribute='c') | join('+') }};{% endfor %}|
batch={% for row in [1, 2, 3, 4, 5] | batch(2) %}{{ row | join(',') }};{% endfor %}|
select={{ [1, 0, 2, none] | select | join(',') }} {{ [1, 2, 3] | select('odd') | join(',') }} {{ [{'a': 1}, {}] | selectattr('a', 'defined') | list | length }}|
wordcount={{ 'a b c' | wordcount }}|truncate={{ 'abcdefghij' | truncate(5, true, '') }}|center={{ 'x' | center(5) }}|
tojson in text={{ ('{"a": ' ~ ([1, 'é'] | tojson) ~ '}') }}|
error: string plus number={{ 'a' + 1 }}|
error: undefined attribute of undefined={{ missing.attribute }}|
error: unknown filter={{ 'a' | no_such_filter }}|
error: missing method={{ 'a'.no_such_method() }}|
error: add none={{ none + 'a' }}|
error: index={{ messages[7].role }}|
error: number of text={{ 'x' * 'y' }}|
undefined prints nothing={{ missing }}{{ messages[0].nowhere }}{{ messages[7] }}|
"""

# How Python prints values, where a template prints one as it is.
VALUES = r"""{%- for m in messages -%}
{{ m.role }}: {{ m.content }}
string: {{ m.content | string }}
json: {{ m.content | tojson }}
{% endfor -%}
"""

JSON = r"""{%- for m in messages -%}
plain {{ m.content | tojson }}
two {{ m.content | tojson(indent=2) }}
four {{ m.content | tojson(indent=4) }}
sorted {{ m.content | tojson(sort_keys=true) }}
tight {{ m.content | tojson(separators=(',', ':')) }}
ascii {{ m.content | tojson(ensure_ascii=true) }}
{% endfor -%}
"""

CLOCK = r"""{%- set stamp = strftime_now("%Y-%m-%d") -%}
{{ stamp | length }} {{ strftime_now("%d %B %Y") | length > 10 }} {{ strftime_now("100%%") }}
"""

NOW_TEMPLATE = r"""{{- strftime_now("%d %b %Y") }}|{{ strftime_now("%Y-%m-%d") }}|{{ strftime_now("%A %B %-d, %Y %H:%M:%S %p %I %j %y %a") }}
"""

GENERATION = r"""{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- else -%}
{{ '<|' + m.role + '|>' + m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


# --- conversations ---------------------------------------------------------------------------------------------------

def u(content, **more):
    return {"role": "user", "content": content, **more}


def a(content, **more):
    return {"role": "assistant", "content": content, **more}


def s(content, **more):
    return {"role": "system", "content": content, **more}


WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a place, <now> & \"soon\".",
    "parameters": {"type": "object", "properties": {
        "place": {"type": "string", "description": " City,\nor name: Zürich, 東京 "},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": ["integer", "null"], "minimum": 0, "default": None}},
        "required": ["place"]}}}
SEARCH = {"type": "function", "function": {
    "name": "search", "description": "", "parameters": {"type": "object", "properties": {
        "query": {"type": "object", "properties": {"terms": {"type": "array", "items": {"type": "string"}}, "exact": {"type": "boolean"}},
                  "required": ["terms"]},
        "limit": {"type": "number"}, "anything": {}, "list": {"type": "array"}}, "required": ["query", "limit"]}}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {
    "place": "Zürich \"HB\"\n", "days": 2, "exact": True, "none": None, "f": 1.0}}}
CALL2 = {"id": "call67890", "type": "function", "function": {"name": "search", "arguments": {}}}
TOOL = {"role": "tool", "content": "{\"temp\": 21.5}", "tool_call_id": "call12345"}
TOOL2 = {"role": "tool", "content": "nothing <b>", "tool_call_id": "call67890"}

SHORT = [u("Hi")]
TURNS = [s("  Be brief.\n"), u("  What is 2+2?  "), a("\n4 \n"), u("Why?\n\n")]
UNICODE = [u("naïve 日本語 👩‍👩‍👧 e\u0301 <|im_end|> {{ 7*7 }} {% raise %} \\n '\"")]
TOOLS_TURNS = [s("Use tools."), u("Weather?"), a(None, tool_calls=[CALL]), TOOL, a("It is 21.5."), u("Thanks")]
THINK = [u("Q1"), a("<think>\nbecause\n</think>\n\nA1"), u("Q2"), a("<think>\n\nhm\n\n</think>\n\nA2")]

PLAIN = [("short", SHORT, None, True, {}), ("turns", TURNS, None, True, {}), ("turns without prompt", TURNS, None, False, {}),
         ("unicode", UNICODE, None, True, {})]


def templates():
    """name -> (template, bos, eos, now, cases of (name, messages, tools, add_generation_prompt, kwargs))."""
    date = {"date_string": "4 Jul 2026"}
    return {
        "llama31": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>", None, [
            (n, m, t, g, date) for n, m, t, g, _ in PLAIN] + [
            ("tools in user", TOOLS_TURNS, [WEATHER, SEARCH], True, date),
            ("tools in system", TOOLS_TURNS, [WEATHER, SEARCH], True, {**date, "tools_in_user_message": False}),
            ("custom tools", [u("x")], None, True, {**date, "custom_tools": [WEATHER]}),
            ("builtin tools", [u("x"), a("", tool_calls=[{"function": {"name": "brave_search", "arguments": {"query": "q", "n": "2"}}}]),
                               {"role": "ipython", "content": {"output": "é"}}], None, True,
             {**date, "builtin_tools": ["brave_search", "code_interpreter"]}),
            ("tool result in parts", [u("x"), {"role": "tool", "content": [{"a": 1}, "b"]}], None, True, date),
            ("no user for tools", [s("only")], [WEATHER], True, date),
            ("two calls", [u("x"), a(None, tool_calls=[CALL, CALL2])], None, True, date),
        ]),
        "llama31-now": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>", NOW, [("short", SHORT, None, True, {})]),
        "mistral-v3": (MISTRAL_V3, "<s>", "</s>", None, PLAIN + [
            ("tools", TOOLS_TURNS, [WEATHER, SEARCH], False, {}),
            ("tool calls, none content", [u("a"), a(None, tool_calls=[CALL, CALL2]), TOOL, TOOL2], None, False, {}),
            ("tool content in a mapping", [u("a"), a("", tool_calls=[CALL]), {**TOOL, "content": {"content": "inner"}}], None, False, {}),
            ("user after user", [u("a"), u("b")], None, False, {}),
            ("assistant first", [a("a"), u("b")], None, False, {}),
            ("short id", [u("a"), a(None, tool_calls=[{**CALL, "id": "x"}])], None, False, {}),
            ("unknown role", [u("a"), {"role": "critic", "content": "c"}, u("d")], None, False, {}),
        ]),
        "qwen25": (QWEN25, None, "<|im_end|>", None, PLAIN + [
            ("tools", TOOLS_TURNS, [WEATHER, SEARCH], True, {}),
            ("tools without system", [u("x")], [WEATHER], True, {}),
            ("two tool results", [u("x"), a("Calling", tool_calls=[CALL, CALL2]), TOOL, TOOL2, u("and?")], None, True, {}),
            ("system in the middle", [u("x"), s("mid"), u("y")], None, True, {}),
            ("empty tools", [u("x")], [], True, {}),
        ]),
        "qwen3": (QWEN3, None, "<|im_end|>", None, PLAIN + [
            ("thinking off", SHORT, None, True, {"enable_thinking": False}),
            ("thinking on", SHORT, None, True, {"enable_thinking": True}),
            ("old thoughts dropped", THINK, None, False, {}),
            ("thoughts then question", THINK + [u("Q3")], None, True, {"enable_thinking": False}),
            ("reasoning field", [u("Q"), a("A", reasoning_content="\nR\n")], None, False, {}),
            ("tool steps", [u("Q"), a("<think>\nt1\n</think>\n\n", tool_calls=[CALL, CALL2]), TOOL, TOOL2, a("<think>\nt2\n</think>\n\nDone")],
             [WEATHER], False, {}),
            ("arguments as text", [u("Q"), a("", tool_calls=[{"function": {"name": "f", "arguments": "{\"a\": 1}"}}])], None, True, {}),
            ("tool response as user", [u("Q"), a("x"), u("<tool_response>r</tool_response>")], None, True, {}),
            ("content in parts", [u([{"type": "text", "text": "ignored"}])], None, True, {}),
        ]),
        "chatml": (CHATML, "<s>", "<|im_end|>", None, PLAIN + [("none content", [u(None)], None, True, {})]),
        "zephyr": (ZEPHYR, "<s>", "</s>", None, PLAIN),
        "phi3": (PHI3, "<s>", "<|endoftext|>", None, PLAIN + [("empty system", [s(""), u("x")], None, True, {})]),
        "gemma": (GEMMA, "<bos>", "<eos>", None, [
            ("short", SHORT, None, True, {}), ("turns", TURNS[1:], None, True, {}), ("turns without prompt", TURNS[1:], None, False, {}),
            ("unicode", UNICODE, None, True, {}), ("system refused", TURNS, None, True, {}), ("two users", [u("a"), u("b")], None, True, {})]),
        "deepseek": (DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", None, PLAIN + [
            ("tools", [s("one"), s("two"), u("Q"), a(None, tool_calls=[CALL, CALL2]), TOOL, TOOL2], None, True, {}),
            ("tools answered", [u("Q"), a("Calling", tool_calls=[CALL]), TOOL, a("Done"), u("More")], None, True, {}),
            ("thoughts dropped", THINK, None, True, {}),
        ]),
        "types": (TYPES, "", "", None, [
            ("two tools", SHORT, [WEATHER, SEARCH], True, {}), ("bare function", SHORT, [SEARCH["function"]], False, {}),
            ("no tools", TURNS, None, True, {})]),
        "parts": (PARTS, "<s>", "</s>", None, [
            ("text", TURNS, None, True, {}), ("empty", [], None, True, {}),
            ("parts", [u([{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "?"}])], None, True, {}),
            ("numbered", [u([{"type": "image", "image": "x"}, {"type": "image", "image": "y"}])], None, True, {"add_vision_id": True}),
            ("hidden and stop", [u("1"), u("2", hidden=True), u("3"), a("4"), {"role": "stop", "content": ""}, u("5")], None, False, {}),
            ("mapping and none", [s("a"), u({"text": "m"}), a(None), s("b")], None, False, {}),
            ("unknown part", [u([{"type": "audio"}])], None, True, {}), ("number", [u(7)], None, True, {})]),
        "whitespace": (WHITESPACE, "", "", None, [("turns", TURNS, None, True, {}), ("lines", [u("a\nb\n\nc")], None, False, {})]),
        "values": (VALUES, "", "", None, [("values", [
            u(True), u(None), u(3), u(2.0), u(1e22), u(-0.5), u("text"), u({"a": 1, "b": [True, None, 1.5], "c": {"d": "it's"}}), u(["x", 1, False])],
            None, False, {})]),
        "json": (JSON, "", "", None, [("values", [
            u({"b": 1, "a": [1, 2.0, -0.0, 1e22, 1e-7, 123456789012345678], "z": {"y": {}, "x": []}, "é": "日本 \u2028 👋 <>&'\" \\ / \t\n\r\x00\x1f\x7f"}),
            u([]), u({}), u("plain"), u(None), u(True), u(0.1), u([[], [[]], {"a": {}}])], None, False, {})]),
        "clock": (CLOCK, "", "", None, [("lengths", SHORT, None, False, {})]),
        "clock-now": (NOW_TEMPLATE, "", "", NOW, [("formats", SHORT, None, False, {})]),
        "generation-tag": (GENERATION, "", "</s>", None, PLAIN),
    }


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def render(template, messages, tools, add_generation_prompt, kwargs, bos, eos):
    special = {k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v is not None}
    try:
        out = chat_template_utils.render_jinja_template([messages], tools=tools, chat_template=template,
                                                        add_generation_prompt=add_generation_prompt, **kwargs, **special)
    except Exception as error:  # noqa: BLE001 - jinja's and Python's own errors both mean: no text
        return f"{error}", True
    rendered = out[0] if isinstance(out, tuple) else out
    return (rendered[0] if isinstance(rendered, list) else rendered), False


def make_templates():
    folder = HERE / "text"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chat_template_utils.datetime = FixedClock
    for name, (template, bos, eos, now, cases) in templates().items():
        out = []
        for case_name, messages, tools, add_generation_prompt, kwargs in cases:
            text, error = render(template, json.loads(json.dumps(messages)), tools, add_generation_prompt, kwargs, bos, eos)
            out.append({"name": case_name, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt,
                        "kwargs": kwargs, "text": text, "error": error})
        body = {"name": name, "template": template, "bos_token": bos, "eos_token": eos,
                "now": now.isoformat() if now else None, "cases": out}
        (folder / f"{name}.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        refused = [f"{c['name']}: {c['text']}" for c in out if c["error"]]
        print(f"text/{name}: {len(out)} cases" + "".join(f"\n    refused: {r}" for r in refused))


def make_expressions():
    """One small template per line of METHODS, over two conversations, so that each fails alone."""
    conversations = [[u("  a banana. Xx ")], [u("éa\tß", meta={"tags": ["t"]}), a("z")]]
    cases = []
    for line in METHODS.strip().splitlines():
        template = "{%- set s = messages[0].content -%}\n" + line
        for messages in conversations:
            text, error = render(template, json.loads(json.dumps(messages)), None, False, {}, "", "")
            assert error == line.startswith("error:"), (line, text)
            cases.append({"template": template, "messages": messages, "text": text, "error": error})
    rows = ",\n".join("  " + json.dumps(c, ensure_ascii=False) for c in cases)
    (HERE / "expressions.json").write_text('{"cases": [\n%s\n]}\n' % rows)
    print(f"expressions: {len(cases)} cases")


# --- tokenizers ------------------------------------------------------------------------------------------------------

STORY = """The harbour lay quiet under a low sky. Boats came in through the narrow channel one after another, their lamps
lit early, and the keeper of the light wrote each name in his book. He had kept that book for thirty-one years; it
was heavier than the ledger of the bank. "You're late," he said to the pilot. "I'm not," she'd answered, "the tide's
early." They've argued so since 1987, and we'll hear them argue again tomorrow, because that is what they do.
In winter the wind blew 45 knots from the north-west, and in summer 5 or 6 from anywhere at all. The price of fish was
12.50 on Monday, 13.75 on Tuesday and 1,024 pieces of nothing on Friday. She counted: 1 2 3 10 100 1000 10000.

def tide(hour, height=2.5):
    if hour % 12 == 6:
        return height * -1
    for step in range(hour):
        height += 0.1 * step  # rising
    return {"hour": hour, "height": height}

fn main() { let mut total = 0; for i in 0..10 { total += i; } println!("{total}"); }
SELECT name, depth FROM boats WHERE depth > 3 AND name LIKE 'S%' ORDER BY depth DESC;
<p class="note">See https://example.org/tides?hour=6&place=harbour#low</p>

Der Hafen lag still; die Möwen schrien über den Dächern. Größe, Straße, Übung, schön.
Le phare s'éteint à l'aube, et l'été déjà s'enfuit. Où êtes-vous, garçon?
El niño comió piñas en el muelle mañana. Привет, море и корабли. Γαλάζιο πέλαγος.
港は静かだった。船は一隻ずつ狭い水路を通って来た。灯台守は名前を書いた。東京の天気は晴れです。
港口很安静。船一艘接一艘地驶过狭窄的水道。今天天气很好,我们去看海。 안녕하세요 바다.
مرحبا بالبحر. שלום. 🚢⚓🌊 👍🏽 👩‍👩‍👧 🇨🇭 ❤️ e\u0301 a\u0308 n\u0303
"""

EXAMPLES = [
    "", " ", "  ", "   leading", "trailing   ", "Hello world", " Hello", "Hello  two   three", "a\nb", "a\n\nb", "\n\n\n", "a \n b", "\r\n\r\nx\t\ty",
    "You're, I'M, we'll, they've, she'd, it's, 'S", "1234567890", "12.50 and 1,024", "x=3;y==4!=5", "def f(a):\n    return a**2\n",
    "naïve café", "e\u0301 vs \u00e9", "a\u0308o\u0308", "日本語のテキスト。", "今天天气很好", "안녕하세요", "Привет, мир", "مرحبا", "שלום",
    "👋", "👩‍👩‍👧 family", "👍🏽🇨🇭❤️", "mixed 日本 and 👋 text", "\u200b\u00a0\u3000wide", "𝔘𝔫𝔦", "\ufffd", "\u0000\u0001\u001f", "ﬁ ﬂ ½ ²",
    "▁underscore▁ bar", "<0x41> literal", "http://example.org/a?b=c&d=%20", "{\"a\": [1, 2.5, null]}", "snake_case camelCase SCREAMING",
    "tab\tseparated\tvalues", "!!!???...", "----====", "supercalifragilistic", "xyzzy qwertz", "ꙮ ༄ ᚠ",
]


def special_examples(specials):
    first, second = specials[0], specials[1]
    return [f"{first}Hello{second}", f" {first} spaced {second} ", f"{first}{second}", f"no{second}space", second[:-1], f"\n{first}\n"]


def dump(folder, tokenizer, config, specials):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    tokenizer = tk.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encode, decode = [], []
    for text in EXAMPLES + special_examples(specials):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids_special = tokenizer.encode(text).ids
        stream = DecodeStream(skip_special_tokens=False)
        steps = [stream.step(tokenizer, i) for i in ids_special]
        whole = tokenizer.decode(ids_special, skip_special_tokens=False)
        if "\ufffd" not in text:
            assert "".join(x or "" for x in steps) == whole, (folder.name, text, steps, whole)
        encode.append({"text": text, "ids": ids, "ids_special": ids_special, "decoded": tokenizer.decode(ids_special),
                       "decoded_special": whole, "stream": steps})
        for cut in {1, len(ids) // 2, len(ids) - 1} & set(range(1, len(ids))):
            part = ids[:cut] if len(encode) % 2 else ids[cut:]
            decode.append({"ids": part, "skip_special_tokens": False, "decoded": tokenizer.decode(part, skip_special_tokens=False)})
    lines = lambda rows: ",\n".join("  " + json.dumps(r, ensure_ascii=False) for r in rows)
    text = '{"encode": [\n%s\n], "decode": [\n%s\n]}\n' % (lines(encode), lines(decode))
    assert json.loads(text) == {"encode": encode, "decode": decode}
    (folder / "cases.json").write_text(text)
    size = (folder / "tokenizer.json").stat().st_size
    assert size < 150_000, size
    print(f"tokenizers/{folder.name}: vocab {tokenizer.get_vocab_size()}, {size // 1024} KiB, {len(encode)} texts, {len(decode)} cuts")


def added(tokenizer, special, plain=()):
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])


def byte_level(pattern, normalizer, ignore_merges, vocab):
    tokenizer = tk.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator([STORY], trainer)
    return tokenizer


def llama3_like():
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = byte_level(pattern, None, True, 1200)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
    added(tokenizer, special)
    bos = tokenizer.token_to_id(special[0])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]}:1 $B:1", special_tokens=[(special[0], bos)])])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True,
              "model_max_length": 131072}
    dump(HERE / "tokenizers" / "llama3-like", tokenizer, config, special)


def qwen_like():
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = byte_level(pattern, normalizers.NFC(), False, 1500)
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    added(tokenizer, special, ["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False,
              "clean_up_tokenization_spaces": False, "model_max_length": 131072}
    dump(HERE / "tokenizers" / "qwen-like", tokenizer, config, special + ["<think>"])


def byte_fallback_bpe(controls, vocab):
    """A BPE over ▁-spelled text whose unknown characters fall back to <0xNN> tokens, as sentencepiece exports it."""
    learner = tk.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    # Characters seen once stay out of the alphabet, so that bytes are really used.
    common = "".join(c if STORY.count(c) > 1 else " " for c in STORY)
    learner.train_from_iterator([common], trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<unk>"], show_progress=False))
    state = json.loads(learner.to_str())["model"]
    pieces = controls + [f"<0x{b:02X}>" for b in range(256)] + [p for p in state["vocab"] if p != "<unk>"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def llama2_like():
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = tk.Tokenizer(byte_fallback_bpe(special, 900))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    added(tokenizer, special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False,
              "rstrip": False, "single_word": False}, "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False,
              "rstrip": False, "single_word": False}, "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    dump(HERE / "tokenizers" / "llama2-like", tokenizer, config, special[1:])


def mistral_like():
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    tokenizer = tk.Tokenizer(byte_fallback_bpe(special, 1100))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    added(tokenizer, special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
              "add_eos_token": False, "add_prefix_space": None, "legacy": False}
    dump(HERE / "tokenizers" / "mistral-like", tokenizer, config, special[3:])


def main():
    print(f"transformers {transformers.__version__}, tokenizers {tk.__version__}")
    make_templates()
    make_expressions()
    for make in (llama3_like, qwen_like, llama2_like, mistral_like):
        make()


if __name__ == "__main__":
    main()
