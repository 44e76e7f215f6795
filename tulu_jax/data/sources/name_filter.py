"""The name filter of TÜLU V2: rows that mention other assistants or their makers go.

Substrings, letter case ignored, in any message: "Palm" also hits "palm tree" and "BARD" hits
"bombard", as upstream. Source: open-instruct `reformat_datasets.py` of November 2023.
"""

from tulu_jax.data import registry

NAMES = (
    "OpenAI",
    "Open AI",
    "ChatGPT",
    "Chat GPT",
    "GPT-3",
    "GPT3",
    "GPT 3",
    "GPT-4",
    "GPT4",
    "GPT 4",
    "GPT-3.5",
    "GPT3.5",
    "GPT 3.5",
    "BingChat",
    "Bing Chat",
    "BARD",
    "Palm",
    "Anthropic",
    "Claude",
    "LAION",
    "Open Assistant",
    "OpenAssistant",
)
_LOWERED = tuple(name.lower() for name in NAMES)


def names_no_assistant(example: dict) -> bool:
    contents = (message["content"].lower() for message in example["messages"])
    return not any(name in content for content in contents for name in _LOWERED)


NAME_FILTER = registry.Filter(name="names an assistant or its maker", keep=names_no_assistant)
