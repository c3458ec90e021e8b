"""Prompt texts that checkpoints were trained on: interface data, where a changed space changes what a model answers."""

THINK_THEN_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
"""System prompt for understanding with reasoning (Bagel's VLM_THINK_SYSTEM_PROMPT)."""

THINK_THEN_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
"""System prompt for drawing with a written plan first (Bagel's GEN_THINK_SYSTEM_PROMPT)."""
