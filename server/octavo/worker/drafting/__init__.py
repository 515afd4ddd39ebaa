"""Drafts by models: the tensor side of `octavo.speculative.BatchProposer`."""
