"""Which K/V blocks hold which tokens. Knows block ids and token ids; no tensors, no time."""
