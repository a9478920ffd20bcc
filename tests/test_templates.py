"""Templates of thinking and tool-calling families, rebuilt in short with the constructs of the published ones.

Each is rendered with options, thoughts, tool calls and their results, as transformers' apply_chat_template renders it.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from jinja2.exceptions import TemplateError
from test_chat import HOSTILE, IM, Made, Style, make, talk
from test_tokenizer import one_line_error, write

import chat
import tokenizer as tokenizers
from errors import UserError

QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
          and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
HARMONY = r"""{%- macro typed(spec, many=false) -%}
    {%- if spec.type == "array" -%}{{- typed(spec['items']) + "[]" if spec['items'] else "any[]" }}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.enum -%}{{ '"' + spec.enum | join('" | "') + '"' }}
    {%- else -%}{{- spec.type or "any" }}{%- endif -%}
{%- endmacro -%}
{%- macro described(tools) -%}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\ntype " + tool.name + " = (_: {\n" }}
        {%- for name, spec in tool.parameters.properties.items() %}
            {{- name }}{%- if name not in (tool.parameters.required or []) %}{{- "?" }}{%- endif %}
            {{- ": " + typed(spec) }}
            {%- if spec.default is defined %}{{- " // default: " + spec.default | tojson }}{%- endif %}
            {{- ",\n" if not loop.last else "\n" }}
        {%- endfor %}
        {{- "}) => any;\n\n" }}
    {%- endfor %}
{%- endmacro -%}
{%- macro system() -%}
    {%- if model_identity is not defined %}{%- set model_identity = "You are a model." %}{%- endif %}
    {{- model_identity + "\nDate: " + strftime_now("%Y-%m-%d") + "\n\n" }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\n\n" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system() + "<|end|>" }}
{%- if messages[0].role in ("developer", "system") %}
    {%- set developer_message = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set developer_message = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|>" + developer_message }}
    {%- if tools %}{{- "\n\n## functions\n\n" + described(tools) }}{%- endif -%}
    {{- "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "<|channel|>final<|message|>" in (message.content or "") %}{{- raise_exception("Tags") }}{%- endif %}
        {%- if message.tool_calls is defined and message.tool_calls %}
            {%- set future = namespace(found=false) %}
            {%- for later in loop_messages[loop.index:] %}
                {%- if later.role == 'assistant' and not later.tool_calls %}{%- set future.found = true %}
                    {%- break %}{%- endif %}
            {%- endfor %}
            {%- if message.content and message.thinking %}{{- raise_exception("Both content and thinking") }}
            {%- elif message.content and not future.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>" }}
            {%- elif message.thinking and not future.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- "<|start|>assistant to=functions." ~ call.name ~ "<|channel|>commentary json<|message|>" }}
            {{- call.arguments | tojson }}{{- "<|call|>" }}
            {%- set last_tool_call.name = call.name %}
        {%- else %}
            {%- set last_tool_call.name = none %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}{{- raise_exception("No call before it") }}{%- endif %}
        {{- "<|start|>functions." + last_tool_call.name + " to=assistant<|message|>" + message.content | tojson }}
        {{- "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
MINISTRAL = r"""{%- set default_system_message = 'Be good.' %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' -}}{%- if messages[0]['content'] is string %}{{- messages[0]['content'] -}}{%- endif %}
    {{- '[/SYSTEM_PROMPT]' -}}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
    {%- if default_system_message != '' %}
        {{- '[SYSTEM_PROMPT]' + default_system_message + '[/SYSTEM_PROMPT]' }}
    {%- endif %}
{%- endif %}
{%- if tools is defined and tools is not none and tools|length > 0 %}
    {{- '[AVAILABLE_TOOLS]' + (tools| tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and
          (message.tool_calls is not defined or message.tool_calls is none or message.tool_calls | length == 0)) %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('Roles must alternate, not ' + message['role'] + '.') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- if (message['content'] is none or message['content'] == '' or message['content']|length == 0)
              and (message['tool_calls'] is not defined or message['tool_calls'] is none) %}
            {{- raise_exception('An answer without content or calls.') }}
        {%- endif %}
        {%- if message['content'] is string and message['content'] != '' %}{{- message['content'] }}
        {%- elif message['content'] is defined and message['content'] | length > 0 %}
            {%- for block in message['content'] | sort(attribute='type', reverse=True) %}{{ block }}{%- endfor %}
        {%- endif %}
        {%- if message['tool_calls'] is defined and message['tool_calls'] is not none %}
            {%- for tool in message['tool_calls'] %}
                {%- set arguments = tool['function']['arguments'] %}
                {%- if arguments is not string %}{%- set arguments = arguments|tojson|safe %}
                {%- elif arguments == '' %}{%- set arguments = '{}' %}{%- endif %}
                {{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}
            {%- endfor %}
        {%- endif %}
        {{- eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS]' + message['content']|string + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No such role: ' + message['role'] + '.') }}
    {%- endif %}
{%- endfor %}"""
GRANITE4 = r"""{%- set prefix = 'Tools:\n<tools>' %}
{%- if available_tools is defined and available_tools %}{%- set tools = available_tools %}{%- endif %}
{%- set ns = namespace(tools_message=prefix, default='You help.', system='') %}
{%- if tools %}
    {%- for tool in tools %}{%- set ns.tools_message = ns.tools_message + '\n' + (tool | tojson) %}{%- endfor %}
{%- else %}{%- set ns.tools_message = '' %}{%- endif %}
{%- for document in documents or [] %}
    {%- set ns.default = ns.default + '\n' + (document | tojson(indent=1)) %}
{%- endfor %}
{%- if messages[0].role == 'system' %}
    {%- if messages[0].content is string %}{%- set ns.system = messages[0].content %}
    {%- elif messages[0].content is iterable %}
        {%- for entry in messages[0].content %}{%- set ns.system = ns.system + entry.text %}{%- endfor %}
    {%- endif %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + (ns.system or ns.default) + ns.tools_message + '<|end_of_text|>\n' }}
{%- for message in messages %}
    {%- set content = namespace(val='') %}
    {%- if message.content is string %}{%- set content.val = message.content %}
    {%- elif message.content is iterable %}
        {%- for entry in message.content %}{%- set content.val = content.val + entry.text %}{%- endfor %}
    {%- endif %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
        {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + content.val + '<|end_of_text|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' + content.val }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content.val) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>' ~ call.function.name ~ call.function.arguments | tojson ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|end_of_text|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_of_role|>user<|end_of_role|>\n' + content.val + '<|end_of_text|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""
SMOLLM3 = r"""{# ───── defaults ───── #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\n" -}}
{%- if messages[0].role == "system" -%}
    {%- set system_message = messages[0].content -%}
    {%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}
    {%- elif "/think" in system_message -%}{%- set reasoning_mode = "/think" -%}{%- endif -%}
    {%- set custom_instructions = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "Date: " ~ strftime_now("%d %B %Y") ~ "\nMode: " + reasoning_mode + "\n\n" -}}
{%- if custom_instructions -%}{{- custom_instructions + "\n\n" -}}{%- endif -%}
{%- if xml_tools or python_tools or tools -%}
    {%- if tools -%}{%- set xml_tools = tools -%}{%- endif -%}
    {%- set ns = namespace(xml_tool_string="<tools>\n") -%}
    {%- for tool in xml_tools[:] -%}
        {%- set ns.xml_tool_string = ns.xml_tool_string ~ (tool | string) ~ "\n" -%}
    {%- endfor -%}
    {{- ns.xml_tool_string + "</tools>\n" -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}{{ "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if reasoning_mode == "/think" -%}
            {{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}{{ "<|im_start|>" + "user\n" + content + "<|im_end|>\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" ~ ("" if reasoning_mode == "/think" else "<think>\n\n</think>\n") }}
{%- endif -%}"""
DEEPSEEK = r"""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}
{%- endfor %}{{bos_token}}{{ns.system_prompt}}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}{{'None<｜end▁of▁sentence｜>'}}{%- endif %}
    {%- if message['role'] == 'assistant' and message['tool_calls'] %}
        {%- for tool in message['tool_calls'] %}
            {{- '<｜Assistant｜>' + tool['type'] + tool['function']['name'] + '\n```json\n' }}
            {{- tool['function']['arguments'] | tojson + '\n```<｜end▁of▁sentence｜>'}}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}
            {%- set ns.is_tool = false -%}
        {%- else %}{% set content = message['content'] %}
            {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
            {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}
        {%- endif %}
    {%- endif %}
    {%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}
    {%- endif %}
{%- endfor -%}
{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\n'}}{% endif %}"""
OLMO3 = r"""{%- set has_system = messages|selectattr('role', 'equalto', 'system')|list|length > 0 -%}
{%- if not has_system -%}
    {{- '<|im_start|>system\nYou help. ' -}}
    {%- if tools is none or (tools | length) == 0 -%}{{- '<functions></functions><|im_end|>\n' -}}
    {%- else -%}{{- '<functions>' -}}{{- tools | tojson -}}{{- '</functions><|im_end|>\n' -}}{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- '<|im_start|>system\n' + message['content'] -}}
        {%- if tools is not none -%}{{- '<functions>' -}}{{- tools | tojson -}}{{- '</functions>' -}}
        {%- elif message.get('functions', none) is not none -%}{{- ' ' + message['functions'] -}}{%- endif -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message['role'] == 'user' -%}{{- '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\n' + message.get('content', '') -}}
        {%- if message.get('tool_calls', none) is not none -%}
            {{- '<function_calls>' -}}
            {%- for tool_call in message['tool_calls'] -%}
                {{- tool_call['function']['name'] + '(' -}}
                {%- for name, value in tool_call['function']['arguments'].items() -%}
                    {{- name + '=' -}}{{- value | tojson -}}{%- if not loop.last -%}{{ ', ' }}{%- endif -%}
                {%- endfor -%}
                {{- ')' -}}{%- if not loop.last -%}{{ '\n' }}{%- endif -%}
            {%- endfor -%}
            {{- '</function_calls>' -}}
        {%- endif -%}
        {%- if not loop.last -%}{{- '<|im_end|>' + '\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
    {%- elif message['role'] in ['environment', 'tool'] -%}
        {{- '<|im_start|>environment\n' + message['content'] + '<|im_end|>\n' -}}
    {%- endif -%}
    {%- if loop.last and add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>' -}}{%- endif -%}
{%- endfor -%}"""
GEMMA3 = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model
'}}{%- endif -%}"""

HARMONY_NAMES = [f"<|{name}|>" for name in ("start", "end", "message", "channel", "call", "return", "constrain")]
BRACKETS = "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS]"
ROLES = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
BARS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁outputs▁end｜>"]
STYLES = {
    "qwen3": Style("bytes", IM, QWEN3, {"eos_token": "<|im_end|>", "bos_token": None}),
    "gpt-oss": Style("bytes", HARMONY_NAMES, HARMONY, {"eos_token": "<|return|>", "bos_token": "<s>"}),
    "ministral3": Style("bytes", [*BRACKETS.split(), "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], MINISTRAL),
    "granite4": Style("bytes", ROLES, GRANITE4, {"eos_token": "<|end_of_text|>"}),
    "smollm3": Style("bytes", IM, SMOLLM3, {"eos_token": "<|im_end|>"}),
    "deepseek-r1": Style("bytes", BARS, DEEPSEEK, {"bos_token": BARS[0], "eos_token": BARS[1]}),
    "olmo3": Style("bytes", IM, OLMO3),
    "gemma3": Style("bare", ["<start_of_turn>", "<end_of_turn>"], GEMMA3),
}
PLACE = {"type": "string", "description": 'é <in> "quotes" & \''}
PROPERTIES = {
    "place": PLACE,
    "days": {"type": "integer", "default": 1},
    "unit": {"enum": ["C", "F"]},
    "tags": {"type": "array", "items": {"type": "string"}},
    "more": {"type": ["string", "null"]},
}
WEATHER = {"name": "weather", "description": "How it is.", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "weather", "arguments": {"place": "Łódź", "days": 2}},
}


def said(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


ASKED, RESULT = talk("How is it in Łódź?"), {"role": "tool", "content": '{"t": 5}', "tool_call_id": "abcdefghi"}
CHATS = {
    "plain": talk("Hello, world!"),
    "system": talk("Hello", "Yes.", "And?", system="Be brief. /no_think"),
    "developer": [{"role": "developer", "content": "Be brief."}, *ASKED],
    "thoughts within": talk("Hello", "<think>\nhm\n</think>\n\nYes.", "And?"),
    "reasoning_content": [*ASKED, said("Fine.", reasoning_content="\nhm\n"), *ASKED],
    "thinking": [*ASKED, said("Fine.", thinking="hm"), *ASKED],
    "a call": [*ASKED, said("", tool_calls=[CALL], reasoning_content="call it"), RESULT],
    "a call and more": [*ASKED, said("See.", tool_calls=[CALL]), RESULT, said("Fine."), *ASKED],
    "calls": [*ASKED, said(None, tool_calls=[CALL, CALL]), RESULT, RESULT],
    "both": [*ASKED, said("See.", tool_calls=[CALL], thinking="hm"), RESULT],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"tools": []},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"reasoning_effort": "high"},
    {"documents": [{"title": "a", "text": "ü"}]},
    {"model_identity": "", "tools": TOOLS},
]
READ = {  # by which families
    "tools": STYLES.keys() - {"deepseek-r1", "gemma3"},
    "enable_thinking": {"qwen3", "smollm3"},
    "reasoning_effort": {"gpt-oss"},
    "documents": {"granite4"},
    "model_identity": {"gpt-oss"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root, found = tmp_path_factory.mktemp("templates"), {}
    for name, style in STYLES.items():
        folder = make(root / name, style)
        backend = transformers.AutoTokenizer.from_pretrained(folder)
        found[name] = Made(chat.load(folder, tokenizers.load(folder)), backend, style)
    return found


def read_by(name: str) -> Iterator[dict[str, Any]]:
    return (options for options in OPTIONS if all(name in READ[option] for option in options))


@pytest.mark.parametrize("name", STYLES)
def test_ids_equal_transformers(made: dict[str, Made], name: str) -> None:
    """Or both refuse; at least the first three chats are refused by no family but for a role that it does not know."""
    ours, theirs, refused = made[name].ours, made[name].theirs, set()
    for options in read_by(name):
        for key, messages in CHATS.items():
            wanted = found = None
            with suppress(TemplateError, TypeError):
                wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
            with suppress(UserError):
                found = ours.prompt(messages, options)
            assert found == wanted, (key, options)
            refused |= {key} if wanted is None else set()
    assert refused <= {
        "gpt-oss": {"both"},
        "ministral3": {"developer"},
        "deepseek-r1": {"calls"},
        "gemma3": {"developer", "a call", "a call and more", "calls", "both"},
    }.get(name, set())


@pytest.mark.parametrize("name", STYLES)
def test_each_option_is_read_or_refused(made: dict[str, Made], name: str) -> None:
    ours, texts = made[name].ours, set()
    for option, families in READ.items():
        value = next(options[option] for options in OPTIONS if option in options)
        if name not in families:
            one_line_error(
                lambda option=option, value=value: ours.prompt(ASKED, {option: value}), f"reads no '{option}'"
            )
        else:
            texts.add(ours.tokenizer.decode(ours.prompt(ASKED, {option: value})))
    others = {ours.tokenizer.decode(ours.prompt(ASKED))}
    assert len(texts - others) == sum(name in families for families in READ.values())  # each changes the text
    for option in ("messages", "add_generation_prompt", "enable_thinkin"):
        one_line_error(lambda given={option: 0}: ours.prompt(ASKED, given), f"no '{option}'; its options are: ")


@pytest.mark.parametrize("name", STYLES)
def test_turns_go_on(made: dict[str, Made], name: str) -> None:
    """What follows an answer, whatever it thought, ends it and asks again."""
    template = made[name].ours
    for answer in (said("Fine."), said("<think>\nhm\n</think>\n\nFine.", reasoning_content="hm")):
        ids = template.next_turn([*ASKED, answer, *ASKED])
        whole = template.prompt([*ASKED, said("Fine."), *ASKED])
        assert whole[-len(ids) :] == ids and template.tokenizer.decode(whole[: -len(ids)]).endswith("Fine.")


@pytest.mark.parametrize("name", STYLES)
def test_hostile_text_stays_text(made: dict[str, Made], name: str) -> None:
    """Names of special tokens in thoughts, calls, results and tools are none, wherever they stand."""
    template = made[name].ours
    special = set(template.tokenizer.special_ids.values())

    def count(text: str) -> int:
        call = CALL | {"function": {"name": "weather", "arguments": {text: [text, {"x": text}]}}}
        answers = [said("", tool_calls=[call], reasoning_content=text), RESULT | {"content": text}]
        messages = [*ASKED, *answers] if name != "gemma3" else talk(text, text, text, system=text)
        tools = [{"type": "function", "function": WEATHER | {"description": text}}]
        ids = template.prompt(messages, {"tools": tools} if name in READ["tools"] else {})
        return sum(i in special for i in ids)

    plain = count("x")
    for text in [*HOSTILE, *(name for name in template.tokenizer.special_ids if name not in ("<s>", "</s>"))]:
        assert count(text) == plain, text


def test_a_template_for_tools(tmp_path: Path, made: dict[str, Made]) -> None:
    """The list of an older file has one of its own; transformers takes it where tools are given."""
    tokenizer = made["qwen3"].ours.tokenizer
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    template = chat.load(tmp_path, tokenizer)
    assert tokenizer.decode(template.prompt(ASKED)) == "plain"
    assert tokenizer.decode(template.prompt(ASKED, {"tools": [1]})) == "[1]"
    assert tokenizer.decode(chat.load(tmp_path, tokenizer, {"tools": [2]}).prompt(ASKED)) == "[2]"
    write(tmp_path, "chat_template.jinja", "plain")
    assert tokenizer.decode(chat.load(tmp_path, tokenizer).prompt(ASKED)) == "plain"
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path / "additional_chat_templates", "tool_use.jinja", "{{ tools }}")
    assert tokenizer.decode(chat.load(tmp_path, tokenizer, {"tools": [3]}).prompt(ASKED)) == "[3]"
    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path, "tokenizer_config.json", {"chat_template": [*named[:1], {"name": "tool_use", "template": 5}]})
    one_line_error(lambda: chat.load(tmp_path, tokenizer), "tokenizer_config.json")


def test_options_of_a_template_and_of_a_call(made: dict[str, Made], tmp_path: Path) -> None:
    """Those of a call count before those that it was loaded with; special tokens may be given too."""
    source = "{{ bos_token }}{{ a }}{{ b | tojson }}{{ messages[0].content }}"
    write(tmp_path, "chat_template.jinja", source)
    write(tmp_path, "tokenizer_config.json", {"bos_token": "B"})
    tokenizer = made["qwen3"].ours.tokenizer
    template = chat.load(tmp_path, tokenizer, {"a": 1, "b": [True, None]})
    assert tokenizer.decode(template.prompt(talk("x"))) == "B1[true, null]x"
    assert tokenizer.decode(template.prompt(talk("x"), {"a": 2, "bos_token": "C"})) == "C2[true, null]x"
    one_line_error(lambda: chat.load(tmp_path, tokenizer, {"c": 1}), "chat_template.jinja", "reads no 'c'", ": a, b")
    assert json.dumps(template.options) == '{"a": 1, "b": [true, null]}'
