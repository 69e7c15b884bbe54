"""Writes pythonisms.json: small templates with the Python habits of real chat templates, rendered by Hugging Face.

Run with transformers and jinja2 installed: python3 tests/golden/text/pythonisms.py
"""
import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

U = lambda text: {"role": "user", "content": text}
A = lambda text, **more: {"role": "assistant", "content": text, **more}
S = lambda text: {"role": "system", "content": text}
CHAT = [S("  Be brief.\n"), U("Hi <there>"), A("Hello\n"), U("Bye ö \"q\" ")]
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "It's \"ö\" & <b>", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1.0}}, "required": ["city"]}}}
CALL = A(None, tool_calls=[{"id": "abc", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln", "n": [1, 2.5, None, True]}}}])
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abc", "content": "{\"t\": 3}"}

TEMPLATES = {
    # ChatML, Zephyr, Phi
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}": [CHAT],
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}": [CHAT],
    "{{ bos_token }}{% for message in messages %}{% if message['role'] in ['user', 'system'] and message['content'] %}{{'<|' ~ message.role ~ '|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}": [CHAT, [U("")]],
    # alternation, exceptions, index arithmetic, slicing
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'].strip() %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}": [CHAT, [A("first")], [U("a"), U("b")]],
    # namespaces, backwards walks, break and continue
    "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}{%- set ns.multi_step_tool = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{{ ns.last }}:{%- for m in messages %}{% if loop.index0 == ns.last %}{%- break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }},{% endfor %}": [CHAT],
    # thinking
    "{%- for message in messages %}{%- set content = message.content %}{%- set reasoning = '' %}{%- if message.reasoning_content is defined and message.reasoning_content is not none %}{%- set reasoning = message.reasoning_content %}{%- elif '</think>' in content %}{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}[{{ message.role }}|{{ reasoning.strip('\\n') }}|{{ content }}]{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}": [[U("q"), A("<think>\nhm\n</think>\n\nyes"), A("plain", reasoning_content="\nwhy\n")]],
    # tools
    "{%- if tools %}{{- '# Tools\\n' }}{%- for tool in tools %}{{- \"\\n\" }}{{- tool | tojson }}{%- endfor %}{{ '\\n' }}{{ tools | tojson(indent=4) }}{%- endif %}{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}{%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}{{- '\\n<tool_call>\\n{\"name\": \"' }}{{- tool_call.name }}{{- '\", \"arguments\": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{%- elif message.role == 'tool' %}{{ message.name ~ '=' ~ message.content }}{%- else %}{{ message.content }}{%- endif %}{%- endfor %}": [[U("w?"), CALL, RESULT], CHAT],
    "{% for name, value in messages[0].items() %}{{ name }}={{ value }};{% endfor %}{% for k in messages[0].keys() %}{{ k }},{% endfor %}{{ messages[0].get('x', 'none') }}{{ messages[0].values()|list|length }}": [CHAT],
    "{%- macro show(x, level=1) -%}{{ '  ' * level }}{{ x.type }}{% if x.properties is mapping %}{% for k, v in x.properties|items %}({{ k }}:{{ show(v, level + 1) }}){% endfor %}{% endif %}{%- endmacro -%}{% for t in tools or [] %}{{ show(t.function.parameters) }}{{ t.function.parameters.required|join(', ') }}{% endfor %}": [CHAT],
    "{{ tools | tojson(indent=2, sort_keys=true) }}|{{ tools[0].function.description | tojson(ensure_ascii=true) }}|{{ {'a': [], 'b': {}} | tojson(indent=2) }}|{{ tools[0].function.parameters.required | tojson(separators=(',', ':')) }}": [CHAT],
    # types and printing
    "{{ true }} {{ none }} {{ 1.0 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ [1, 'a', none, false] }} {{ {'a': 'b'} }} {{ 'x' if false }}|{{ missing }}|{{ missing is defined }}|{{ messages[0].missing is none }}": [CHAT],
    "{{ 'a' is string }}{{ [1] is string }}{{ [1] is iterable }}{{ 'a' is iterable }}{{ {} is mapping }}{{ 3 is number }}{{ 'ab' is sequence }}{{ none is none }}{{ 'x' not in ['y'] }}{{ 3 is not string }}{{ true is boolean }}{{ 5 is odd }}": [CHAT],
    "{{ '%s has %d' % ('x', 3) }} {{ '%s!' % messages[0].role|upper }} {{ '%05.1f%%' % 2.25 }} {{ 'a-b-c'.split('-')[-1] }} {{ 'a b  c'.split()|join('|') }} {{ 'Abc'.lower() ~ 'x'.upper() }} {{ 'abc'[::-1] }} {{ 'abc'[1:] }} {{ 'abc'[-1] }} {{ 'a.b'.replace('.', '-') }} {{ ' x '|trim }}|{{ 'title case'.title() }}|{{ 'xay'.find('a') }}|{{ 'k=v=w'.split('=', 1) }}|{{ 'k=v=w'.rsplit('=', 1)[0] }}": [CHAT],
    "{{ messages | map(attribute='role') | list | join('/') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ (messages | selectattr('role', 'eq', 'user') | first).content }} {{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | join(';') }} {{ (messages|last)['role'] }} {{ messages[-1].role }} {{ [3, 1, 2] | sort | join }} {{ range(3) | list }} {{ {'b': 1, 'a': 2} | dictsort }}": [CHAT],
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if not loop.last else 'end' }} {% endfor %}": [CHAT],
    # content that is text or a list of parts
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'text' %}<{{ part['text'] }}>{% endif %}{% endfor %}{% endif %};{% endfor %}": [CHAT, [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]],
    # assistant masks, comments, white space control
    "{#- a comment -#}\n{% for m in messages %}\n    {%- if m.role == 'assistant' %}\n        {% generation %}{{ m.content }}{% endgeneration %}\n    {%- else %}\n  {{ m.content }}\n    {%- endif %}\n{% endfor %}\n": [CHAT],
    "{%- set x = 'outer' %}{% for m in messages %}{% set x = m.role %}{% endfor %}{{ x }}{% set block %}  in {{ x }} {% endset %}[{{ block }}]{{ block | trim | length }}": [CHAT],
    # dates and defaults
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}Today Date: {{ date_string }}{{ '\\n' -}} {{ tools_in_user_message | default(true) }}{{ documents is none }}{{ tools is none }}": [CHAT],
    # errors
    "{{ messages.foo.bar }}": [CHAT],
    "{{ messages[0].content + 1 }}": [CHAT],
    "{{ raise_exception('no') }}": [CHAT],
    "{{ missing + 'x' }}": [CHAT],
    "{{ missing | tojson }}": [CHAT],
    "{{ messages[0].content.nosuch() }}": [CHAT],
}

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
out = []
for template, chats in TEMPLATES.items():
    cases = []
    for messages in chats:
        for tools in ([None, [TOOL]] if "tools" in template else [None]):
            for more in ([{}, {"enable_thinking": False}] if "enable_thinking" in template else [{"date_string": "1 Jan 2030"}, {}] if "date_string" in template else [{}]):
                generate = "add_generation_prompt" in template
                case = {"messages": messages, "tools": tools, "add_generation_prompt": generate, "kwargs": more}
                try:
                    text, _ = render_jinja_template(conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=generate, **SPECIAL, **more)
                    case |= {"text": text[0], "error": False}
                except Exception as e:
                    case |= {"text": "", "error": True}
                cases.append(case)
    out.append({"template": template, "cases": cases})
    if len(cases) and all(c["error"] for c in cases):
        print("always an error:", template[:60])
path = Path(__file__).with_suffix(".json")
path.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
