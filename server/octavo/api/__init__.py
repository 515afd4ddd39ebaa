"""The OpenAI HTTP API. Knows requests and text; imports no torch, scheduler or K/V cache."""
