"""Training of draft heads: from a served model's own outputs to a folder that drafts for it."""
