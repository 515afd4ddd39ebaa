"""Drafts made and judged on a GPU, where the host need not know either: see `drafting.gpu`; and
what lies between two passes of a head on a CPU: `drafting.cpu`.
"""
