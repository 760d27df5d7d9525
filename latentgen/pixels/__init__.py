"""Labelled diffusion in pixels, each family of the field by one key: the classic exercise, with its likelihoods."""
