"""Chat templates that write what the published ones of each class write, for a user's and an assistant's turn."""

_PARTS = (
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
_TRIMMED = (
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}"
)
_TURNS = "{% for m in messages %}TURN{% endfor %}{% if add_generation_prompt %}START{% endif %}"


def _template(turn: str, start: str, before: str = "") -> str:
    written = before + _TURNS.replace("TURN", turn).replace("START", start)
    return written.replace("\n", "{{ '\\n' }}")  # Jinja drops a new line behind a block


def _chatml(image: str, before: str = "") -> str:
    turn = "<|im_start|>{{ m['role'] }}\n" + _PARTS.replace("IMAGE", image) + "<|im_end|>\n"
    return _template(turn, "<|im_start|>assistant\n", before)


LLAVA = _template(
    "{{ m['role'] | upper }}: "
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}",
    "ASSISTANT:",
)
LLAVA_NEXT = _template(
    "{% if m['role'] == 'user' %}[INST] " + _PARTS.replace("IMAGE", "<image>\n") + " [/INST]"
    "{% else %} {{ m['content'][0]['text'] }}</s>{% endif %}",
    "",
)
PIXTRAL = _template(
    "{% if m['role'] == 'user' %}[INST]" + _PARTS.replace("IMAGE", "[IMG]") + "[/INST]"
    "{% else %}{{ m['content'][0]['text'] }}</s>{% endif %}",
    "",
    "<s>",
)
LLAVA_ONEVISION = _template(  # its assistant's turn begins otherwise than its generation prompt, as published
    "<|im_start|>{{ m['role'] }} {% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}{% for part in m['content'] %}{% if part['type'] == 'text' %}\n{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>",
    "<|im_start|>assistant\n",
)
QWEN25_VL = _chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
)
QWEN3_VL = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
INTERNVL = _chatml("<IMG_CONTEXT>\n")
GEMMA3 = _template(
    "<start_of_turn>{% if m['role'] == 'assistant' %}model{% else %}{{ m['role'] }}{% endif %}\n"
    + _TRIMMED.replace("IMAGE", "<start_of_image>")
    + "<end_of_turn>\n",
    "<start_of_turn>model\n",
    "<bos>",
)
IDEFICS3 = _template(
    "{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    + _PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n",
    "Assistant:",
    "<|im_start|>",
)
_HEADER = "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
MLLAMA = _template(_HEADER + _TRIMMED.replace("IMAGE", "<|image|>") + "<|eot_id|>", _ASSISTANT, "<|begin_of_text|>")
LLAMA = _template(_HEADER + "{{ m['content'] | trim }}<|eot_id|>", _ASSISTANT, "<|begin_of_text|>")
