"""Documents, prompts, tokenizer, image transforms, layout and the mask rule: one source for training and generation."""
