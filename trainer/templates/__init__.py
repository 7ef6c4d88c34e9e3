"""What a conversation is as text and tokens: templates, turns read back, special tokens, grammars."""
