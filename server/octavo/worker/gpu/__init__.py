"""Executes steps on a GPU: state that stays there, one upload a step, graphs. Decides nothing."""
