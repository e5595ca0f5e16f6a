"""PaliGemma: frames and prompts → text, boxes and masks, computed by vLLM with PaliGemma's own attention."""
