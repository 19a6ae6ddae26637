"""Models with chat templates, and templates as checkpoints have them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tiny import byte_level_tokenizer, write_json, write_tiny

from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.checkpoint.read import load_config
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.model import Model

# Renders roles and texts, and nothing else.
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Refuses all but turns of user and assistant that alternate.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Qwen3's: tools and calls as JSON, reasoning only after the last user's turn, other roles than these four ignored.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role in ('user', 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set said = m.content if m.content is string else '' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{% if call.function %}{% set call = call.function %}{% endif %}"
    '{% if said or not loop.first %}\n{% endif %}<tool_call>\n{"name": "{{ call.name }}", "arguments": '
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}}\n"
    "</tool_call>"
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(directory: Path, template: str, **changes: Any) -> Path:
    """Write a tiny checkpoint with a chat template."""
    write_tiny(directory, **changes)
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    write_json(directory / "tokenizer_config.json", fields)
    return directory


def chat_model(directory: Path, template: str = PLAIN, *, tokenizer: bool = True, **changes: Any) -> Model:
    """Make a model without parameters, which reads data but decodes nothing."""
    if tokenizer:
        write_chat_model(directory, template, **changes)
    else:
        write_tiny(directory, tokenizer=False)
    read = byte_level_tokenizer() if tokenizer else None
    config, backend, kind = load_config(directory), BACKENDS["switch"], jnp.dtype("float32")
    return Model(config, abstract_decoder(config, backend, kind), backend, kind, read, (), directory)
