"""Drafts made and judged on a GPU, where the host need not know either: see `drafting.gpu`.

Workers on a CPU draft with `octavo.speculative` and need no kernel.
"""
