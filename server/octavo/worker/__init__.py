"""Executes steps: request table, input batch, model, sampler. Knows tensors; decides nothing."""
