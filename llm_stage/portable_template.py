"""The chat template of an exported model in Jinja, as transformers' processors run it: the same ids as `ChatFormat`, without mmkit.

A chat here has typed parts ({"type": "image"}, {"type": "text", "text": ...}) or plain strings; one image goes first, on a line of its own,
as in training.
"""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from llm_stage.chat_format import IMAGE_MARK, ChatFormat, Turn
from llm_stage.llava_card import LlavaCard

# Typed parts -> strings, the image of a one-image turn in front, a system prompt where the chat brings none.
_PRELUDE = """\
{%- set plain = namespace(messages=[], text='') -%}
{%- if system_prompt and (not messages or messages[0]['role'] != 'system') -%}
{%- set plain.messages = [{'role': 'system', 'content': system_prompt}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set plain.text = message['content'] if message['content'] is string else '' -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- set plain.text = plain.text ~ ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' and plain.text.count('<image>') == 1 -%}
{%- set plain.text = ('<image>\\n' ~ plain.text.replace('<image>', '').strip()).strip() -%}
{%- endif -%}
{%- set plain.messages = plain.messages + [{'role': message['role'], 'content': plain.text}] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""
_BODIES = {
    "vicuna_v1": """\
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{ m['content'] ~ ' ' if m['content'] else '' }}
{%- elif m['role'] == 'user' -%}{{ 'USER: ' ~ m['content'] ~ ' ASSISTANT:' }}
{%- else -%}{{ (' ' if m['content'] else '') ~ m['content'] ~ eos_token }}
{%- endif -%}
{%- endfor -%}""",
    "llama_2": """\
{%- set head = namespace(text='') -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{%- set head.text = '<<SYS>>\\n' ~ m['content'] ~ '\\n<</SYS>>\\n\\n' if m['content'] else '' -%}
{%- elif m['role'] == 'user' -%}{{ '[INST] ' ~ head.text ~ m['content'] ~ ' [/INST]' }}{%- set head.text = '' -%}
{%- else -%}{{ (' ' ~ m['content'] ~ ' ' if m['content'] else '') ~ eos_token }}
{%- endif -%}
{%- endfor -%}""",
    "chatml": """\
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{ '<|im_start|>system\\n' ~ m['content'] ~ '<|im_end|>' if m['content'] else '' }}
{%- elif m['role'] == 'user' -%}{{ '<|im_start|>user\\n' ~ m['content'] ~ '<|im_end|><|im_start|>assistant\\n' }}
{%- else -%}{{ m['content'] ~ '<|im_end|>' }}
{%- endif -%}
{%- endfor -%}""",
}


def portable_template(card: LlavaCard, tokenizer: Any) -> str | None:
    """A Jinja template that renders chats as the model was trained on them.

    Args:
        card: The model's; its template and system prompt count.
        tokenizer: The model's, whose own template is taken where the card says so.

    Returns:
        The template; None where there is none to be had (plain, which is no chat, or a template that is not written here).
    """
    chat_format = ChatFormat(tokenizer, card.template, system=card.system)
    body = tokenizer.get_chat_template() if card.template == "own" else _BODIES.get(card.template)
    if body is None:
        return None
    return f"{{%- set system_prompt = {json.dumps(chat_format.system or '')} -%}}\n{_PRELUDE}{body}"


def same_ids(card: LlavaCard, processor: Any, tokens_per_image: int) -> bool:
    """Whether the processor's template gives the ids of `ChatFormat` for a chat of two rounds with an image, asked for the second answer."""
    asked = "What is this?", "And what colour is it?"
    chat = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (20, 30))}, {"type": "text", "text": asked[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red apple."}]},
        {"role": "user", "content": [{"type": "text", "text": asked[1]}]},
    ]
    turns = [Turn("user", f"{IMAGE_MARK}\n{asked[0]}"), Turn("assistant", "A red apple."), Turn("user", asked[1])]
    expected = ChatFormat(processor.tokenizer, card.template, system=card.system).prompt_ids(turns, 1, tokens_per_image)
    found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")
    return bool(found["input_ids"][0].tolist() == expected)
