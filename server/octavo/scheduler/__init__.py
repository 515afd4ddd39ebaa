"""What runs in the next step. Knows token counts and block ids; no tensors, text, time or HTTP."""
