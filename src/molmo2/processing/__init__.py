"""The processor: chat, prompts and their visual tokens."""
