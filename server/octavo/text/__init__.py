"""Text in, text out: tokenizer, chat template, detokenizer. Knows no engine, no HTTP, no torch."""
