"""Kinds of device, as layers see them."""
