"""PaliGemma, computed as PaliGemma: the engine, its prompts and masks."""
