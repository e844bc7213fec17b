"""Encoders, and models with biases or several stacks, whose layers are reproduced."""

from model_case import Case

ENCODERS: list[Case] = []
