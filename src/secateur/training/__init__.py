"""Recover: train a cut model for a while, with or without the uncut one as a teacher.

Modules and token ids come in, trained weights go out; models are loaded and written by the caller.
"""
